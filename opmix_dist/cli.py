"""``opmix``: the one console command."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from opmix_dist import __version__
from opmix_dist.errors import UserError
from opmix_dist.process import end_process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a UserError becomes one line on standard error and status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments, rest)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # All ranks usually meet the same mistake. Rank 0 tells it at once and the launcher then ends the
            # others; only a mistake that rank 0 does not meet gets told here.
            time.sleep(3.0)
        print(f"opmix: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opmix", description=sys.modules["opmix_dist"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="ingest text into MDS shards, one folder per domain")
    prepare.add_argument("--out", required=True, type=Path, help="folder to write")
    prepare.add_argument("--builtin", action="store_true", help="domains from this installation's own files")
    prepare.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="folder, glob or file; repeatable",
    )
    prepare.add_argument("--text-field", default="text", help="JSONL field or Parquet column with the text")
    prepare.add_argument(
        "--tokenizer", default="train", help="`train` a BPE, or an HF tokenizer by path or id"
    )
    prepare.add_argument("--vocab-size", type=int, default=4096, help="of a trained tokenizer")
    prepare.add_argument("--sequence-length", type=int, default=256, help="tokens per sample")
    prepare.add_argument("--eval-fraction", type=float, default=0.05, help="share of held-out documents")
    prepare.add_argument("--max-eval-documents", type=int, help="bound on each domain's held-out documents")
    prepare.add_argument("--builtin-max-bytes", type=int, help="text in each built-in domain, bytes")
    prepare.add_argument("--seed", type=int, default=0, help="of the split and of the built-in choice")
    prepare.add_argument("--workers", type=int, help="tokenising processes; default: all cores")
    prepare.add_argument("--overwrite", action="store_true", help="replace domains made with other settings")
    prepare.set_defaults(run=_prepare)

    train = commands.add_parser(
        "train",
        help="train, search and switch the mixture; any setting as --dotted.key value",
        description="Start it with torchrun for several ranks, or as it is for one.",
    )
    train.add_argument("config", type=Path, help="YAML configuration")
    train.add_argument("--print-config", action="store_true", help="print the documented settings and stop")
    train.set_defaults(run=_train)

    pool = commands.add_parser("pool", help="a pool as a launch of its own, for a run with pool.external")
    pool.add_argument("--run", dest="run_dir", required=True, type=Path, help="the trainers' run directory")
    pool.set_defaults(run=_pool)

    report = commands.add_parser("report", help="write RUN/report.html")
    report.add_argument("run_dir", type=Path)
    report.add_argument("--baseline", type=Path, default=None, help="another run to compare with")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="print tables of several runs; the first is the baseline")
    compare.add_argument("run_dirs", nargs="+", type=Path)
    compare.set_defaults(run=_compare)
    return parser


def _prepare(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.data.ingest import PrepareConfig, prepare

    domains: dict[str, list[str]] = {}
    for text in arguments.domain:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--domain {text} must be NAME=PATH")
        domains.setdefault(name, []).append(path)
    names = {field.name for field in dataclasses.fields(PrepareConfig)} - {"domains"}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    prepare(PrepareConfig(domains=domains, **given))


def _train(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.config import load_config, to_yaml

    config = load_config(arguments.config, rest)
    if arguments.print_config:
        print(to_yaml(config, documented=True), end="")
        return
    from opmix_dist.train.job import run_job

    run_job(config)
    if os.environ.get("RANK", "0") == "0":
        _write_report(config.run_dir)


def _write_report(run_dir: str) -> None:
    """After a run; the run itself is whole whatever happens here."""
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.html import write_report

    try:
        print(f"report: {write_report(RunDir(run_dir))}")
    except (UserError, OSError) as error:
        print(f"opmix: no report: {error}; `opmix report {run_dir}` tries again", file=sys.stderr)


def _pool(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.pool.supervisor import run_pool

    run_pool(arguments.run_dir)


def _report(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.html import write_report

    baseline = RunDir(arguments.baseline) if arguments.baseline else None
    print(write_report(RunDir(arguments.run_dir), baseline=baseline))


def _compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    from rich import print

    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.tables import comparison_table

    print(comparison_table([(path.name, RunDir(path)) for path in arguments.run_dirs]))


if __name__ == "__main__":
    end_process(main())
