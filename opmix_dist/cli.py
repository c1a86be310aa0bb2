"""``opmix``: the one console command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opmix_dist import __version__
from opmix_dist.checkpoints_command import add_checkpoints_command
from opmix_dist.compare_command import add_compare_command
from opmix_dist.convert_command import add_convert_command
from opmix_dist.data_commands import add_data_commands
from opmix_dist.errors import UserError
from opmix_dist.fit_command import add_fit_command
from opmix_dist.launch_command import add_launch_command
from opmix_dist.launched_commands import add_launched_commands
from opmix_dist.lifecycle_command import add_lifecycle_command
from opmix_dist.mixture_command import add_mixture_command
from opmix_dist.plan_command import add_plan_command
from opmix_dist.process import end_process
from opmix_dist.score_command import add_score_command
from opmix_dist.search_command import add_search_command
from opmix_dist.telling import tell
from opmix_dist.top_command import add_top_command
from opmix_dist.validate_command import add_validate_command
from opmix_dist.what_if_command import add_what_if

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
WITH_SETTINGS = ("train", "lifecycle", "search", "fit", "launch", "resume", "plan", "validate")
"""Commands that take any setting of their configuration as ``--dotted.key value``."""
WITH_PROCESSES = ("prepare", "train", "lifecycle", "pool", "search", "launch", "resume", "validate")
"""Commands whose broken pipe may be that of a worker, which must not pass for a closed output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its status; a UserError becomes one line on standard error and status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in WITH_SETTINGS:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        status: int | None = arguments.run(arguments, rest)
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # All ranks usually meet the same mistake. Rank 0 tells it at once and the launcher then ends the
            # others; only a mistake that rank 0 does not meet gets told here.
            time.sleep(3.0)
        tell(f"opmix: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if arguments.command in WITH_PROCESSES:
            raise
        # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status or 0


class _Parser(argparse.ArgumentParser):
    """A mistyped option is an error, not the one it begins like: ``--over`` would replace a domain."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="opmix", description=sys.modules["opmix_dist"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    _add_prepare(commands)

    add_data_commands(commands)

    train = commands.add_parser(
        "train",
        help="train, search and switch the mixture; any setting as --dotted.key value",
        description="Start it with torchrun for several ranks, or as it is for one.",
    )
    train.add_argument("config", type=Path, help="YAML configuration")
    train.add_argument("--print-config", action="store_true", help="print the documented settings and stop")
    train.set_defaults(run=_train)

    add_lifecycle_command(commands)

    pool = commands.add_parser("pool", help="a pool as a launch of its own, for a run with pool.external")
    pool.add_argument("--run", dest="run_dir", required=True, type=Path, help="the trainers' run directory")
    pool.set_defaults(run=_pool)

    add_launch_command(commands)
    add_launched_commands(commands)
    add_top_command(commands)
    add_checkpoints_command(commands)
    add_search_command(commands)
    add_score_command(commands)
    add_fit_command(commands)
    add_mixture_command(commands)
    add_convert_command(commands)

    add_plan_command(commands)
    add_what_if(commands)
    add_validate_command(commands)

    report = commands.add_parser(
        "report", help="write RUN/report.html, of a lifecycle its stages'; of several runs, a comparison"
    )
    report.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN", help="of several, the baseline first"
    )
    report.add_argument("--baseline", type=Path, default=None, help="another run to compare one run with")
    report.add_argument(
        "--out", type=Path, help="file for the comparison of several runs (default: FIRST/comparison.html)"
    )
    report.set_defaults(run=_report)

    add_compare_command(commands)
    return parser


def _add_prepare(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Options bear the names of PrepareConfig's fields, whose defaults count where none is given here."""
    prepare = commands.add_parser(
        "prepare",
        help="ingest documents into MDS shards, one folder per domain",
        description="Ingest documents into MDS shards, one folder per domain. A run that was killed is gone "
        "on with by the same command, to the same bytes.",
        epilog="PATH is a file, a folder, a glob in quotes, or a URL such as s3://bucket/folder/*.jsonl.zst. "
        "Files are read by their names: .jsonl and .json lines (also .gz, .zst), .parquet, .arrow, Megatron "
        ".idx/.bin, flat token arrays .npy/.bin, MDS folders; any other file is one document of text.",
        argument_default=argparse.SUPPRESS,
    )
    prepare.add_argument("--out", required=True, type=Path, help="folder to write or to add domains to")

    sources = prepare.add_argument_group("sources")
    domain: dict[str, Any] = {"action": "append", "metavar": "NAME=PATH", "dest": "domains"}
    sources.add_argument(
        "--domain",
        **domain,
        help="a domain of texts or token ids; repeatable, also for one NAME. A document that several domains "
        "have stays in the first",
    )
    sources.add_argument("--chat-domain", **domain, type=_Chat, help="the same for rows of chats")
    sources.add_argument("--builtin", action="store_true", help="domains from this installation's own files")
    sources.add_argument(
        "--builtin-chat",
        action="append",
        metavar="NAME",
        help="also `tools` or `answers`: chats made from the standard library, with tasks.jsonl; repeatable",
    )
    sources.add_argument("--builtin-max-bytes", type=int, help="text in each built-in domain, bytes")
    sources.add_argument("--text-field", help="JSON field or column with the text (default: text)")
    sources.add_argument("--messages-field", help="the same for a chat's messages (default: messages)")
    sources.add_argument(
        "--token-dtype", choices=TOKEN_DTYPES, help="of token ids in files that do not say it"
    )

    tokens = prepare.add_argument_group("tokens and samples")
    tokens.add_argument(
        "--tokenizer", help="`train` a BPE (default), or a Hugging Face tokenizer by path or id"
    )
    tokens.add_argument("--vocab-size", type=int, help="of a trained tokenizer (default: 4096)")
    tokens.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template of chats, in place of its own"
    )
    tokens.add_argument("--sequence-length", type=int, help="most tokens of a sample (default: 256)")

    splits = prepare.add_argument_group("held-out documents")
    splits.add_argument("--eval-fraction", type=float, help="their share in each domain (default: 0.05)")
    splits.add_argument("--max-eval-documents", type=int, help="bound on their number in each domain")
    splits.add_argument("--eval-documents", type=int, help="their number in each domain, in place of a share")
    splits.add_argument("--seed", type=int, help="of their choice, and of the built-in files' (default: 0)")
    splits.add_argument(
        "--decontaminate",
        action="append",
        metavar="FILE",
        help="evaluation texts; documents that share words in a row with them are dropped from both splits. "
        "A text with fewer words counts as a whole. Repeatable",
    )
    splits.add_argument("--decontaminate-ngram", type=int, help="how many words in a row (default: 13)")

    output = prepare.add_argument_group("output and work")
    output.add_argument("--compression", choices=("zstd", "none"), help="of the shards (default: none)")
    output.add_argument(
        "--shard-bytes", type=_bytes, help="size of a shard before compression (default: 64MiB)"
    )
    output.add_argument("--workers", type=int, help="tokenising processes (default: one per core)")
    output.add_argument(
        "--record-seconds", type=float, help="time between records to go on from after a kill (default: 30)"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace domains made with other settings or files"
    )
    prepare.set_defaults(run=_prepare)


class _Chat(str):
    """A domain's argument that came with ``--chat-domain``."""


def _bytes(text: str) -> int:
    """``1000``, ``64MiB`` or ``1GB`` in bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text} is no size: write 1000000, 64MiB or 1GB") from None


def _prepare(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.data.ingest import PrepareConfig, prepare
    from opmix_dist.data.sources import parse_domains
    from opmix_dist.faults import points

    points.install("ingest", 0)
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    texts = given.pop("domains", [])
    chats = parse_domains(text for text in texts if isinstance(text, _Chat))
    both = set(chats) & set(parse_domains(text for text in texts if not isinstance(text, _Chat)))
    if both:
        raise UserError(f"{min(both)} is named by --domain and --chat-domain: use two names")
    prepare(PrepareConfig(domains=parse_domains(texts), chat_domains=tuple(chats), **given))


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.config import load_config
    from opmix_dist.settings import to_yaml

    config = load_config(arguments.config, rest)
    if arguments.print_config:
        print(to_yaml(config, documented=True), end="")
        return 0
    from opmix_dist.train.roles import run_job

    stopped = run_job(config)
    leads = os.environ.get("RANK", "0") == "0"
    if stopped is not None:
        if leads:
            tell(f"opmix: {config.run_dir} was {stopped.text}", sys.stderr)
        # torchrun would start ranks that fail again, or end the others while they still write; what
        # started torchrun reads RUN/stopped.json
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + signal.Signals[stopped.signal]
    if leads:
        _write_report(config.run_dir)
    return 0


def _write_report(run_dir: str) -> None:
    """After a run; the run itself is whole whatever happens here."""
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.html import write_report

    try:
        tell(f"report: {write_report(RunDir(run_dir))}")
    except (UserError, OSError) as error:
        tell(f"opmix: no report: {error}; `opmix report {run_dir}` tries again", sys.stderr)


def _pool(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.pool.supervisor import run_pool

    run_pool(arguments.run_dir)


def _report(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.exchange.lifecycles import is_lifecycle, runs_in
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.comparison import COMPARISON_FILE, write_comparison
    from opmix_dist.report.html import write_report

    if lifecycles := [path for path in arguments.run_dirs if is_lifecycle(path)]:
        if len(arguments.run_dirs) > 1 or arguments.baseline or arguments.out:
            raise UserError(
                f"{lifecycles[0]} is a lifecycle: name one alone for its stages' reports, or runs in its "
                "stages/; `opmix compare` compares lifecycles"
            )
        for stage in runs_in(lifecycles[0]):
            if stage.config_file.exists():
                tell(str(write_report(stage)))
        tell(f"the table of stages and domains: opmix compare {lifecycles[0]}")
        return
    runs = [RunDir(path) for path in arguments.run_dirs]
    if len(runs) > 1:
        if arguments.baseline:
            raise UserError("--baseline is for one run: of several, name the baseline first")
        tell(str(write_comparison(runs, arguments.out or runs[0].path / COMPARISON_FILE)))
        return
    if arguments.out:
        raise UserError("--out is for the comparison of several runs: one run's report lies in its folder")
    baseline = RunDir(arguments.baseline) if arguments.baseline else None
    tell(str(write_report(runs[0], baseline=baseline)))


if __name__ == "__main__":
    end_process(main())
