"""``opmix score``: error rates of a model on tasks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from opmix_dist.tasks.records import Task
    from opmix_dist.tasks.scoring import Generator, Scored
    from opmix_dist.tasks.unseen import Unseen


def add_score_command(commands: Any) -> None:
    """Add ``score`` to the subcommands of ``opmix``."""
    score = commands.add_parser(
        "score",
        help="error rates of a model on tasks: multiple choice, exact match, tool calls, code of yours",
        description="Prints the share of wrong replies for each file and kind of task, with its standard "
        "error, in which examples of one group are not independent, and Wilson's 95%% interval.",
    )
    score.add_argument("model", help="folder or hub id of a Hugging Face model, such as RUN/export/hf")
    score.add_argument(
        "--tasks", required=True, nargs="+", type=Path, metavar="FILE",
        help="JSON lines of tasks, or folders of domains with a tasks.jsonl",
    )  # fmt: skip
    score.add_argument(
        "--unseen-by", nargs="+", type=Path, default=[], metavar="RUN",
        help="leave out the tasks that searches of these runs, or lifecycles, and of all runs that they go "
        "on from chose mixtures by",
    )  # fmt: skip
    score.add_argument("--limit", type=int, help="take the first so many tasks of each file")
    score.add_argument(
        "--choices", choices=("likelihood", "generation"), default="likelihood",
        help="multiple choice: by the choices' likelihoods (default) or by the reply",
    )  # fmt: skip
    score.add_argument("--max-new-tokens", type=int, default=64, help="of a reply (default: 64)")
    score.add_argument("--batch-size", type=int, default=16, help="prompts in a pass (default: 16)")
    score.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    score.add_argument("--generation", choices=("transformers", "vllm"), default="transformers")
    score.add_argument(
        "--allow-code", action="store_true", help="import and call the scorers that tasks name"
    )
    score.add_argument("--json", action="store_true", help="print JSON in place of the table")
    score.add_argument("--out", type=Path, help="file for each task's reply and error, as JSON lines")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.tasks.records import read_tasks
    from opmix_dist.terminal import open_console

    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    read = {str(path): read_tasks(path) for path in arguments.tasks}
    tasks = _unseen(arguments, read)
    with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers imports to generate, logs there
        found = _scored(arguments, tasks)
    if arguments.out is not None:
        _write_replies(arguments.out, tasks, found)
    rows = list(_rows(tasks, found))
    if arguments.json:
        left_out = {name: one.left_out for name, one in tasks.items()} if arguments.unseen_by else {}
        print(json.dumps({"model": arguments.model, "rows": rows, "left_out": left_out}))
        return
    open_console().print(_table(rows))


def _unseen(arguments: argparse.Namespace, tasks: dict[str, list[Task]]) -> dict[str, Unseen]:
    """Without those that ``--unseen-by`` leaves out, and no more than ``--limit``; says so."""
    from opmix_dist.tasks.unseen import Unseen, searched_digests
    from opmix_dist.telling import tell

    seen = searched_digests(arguments.unseen_by)
    found = {name: Unseen.of(name, given, seen) for name, given in tasks.items()}
    for name, one in found.items() if arguments.unseen_by else ():
        count = len(tasks[name])
        tell(f"{name}: searches chose by {one.left_out} of {count} tasks, which are left out", sys.stderr)
    if not arguments.unseen_by:
        _warn_of_own_searches(Path(arguments.model), tasks)
    return {name: one.first(arguments.limit) for name, one in found.items()}


def _warn_of_own_searches(model: Path, tasks: dict[str, list[Task]]) -> None:
    """Where the model is a run's export."""
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.tasks.unseen import searched_digests
    from opmix_dist.telling import tell

    run = RunDir(model.resolve().parent.parent)
    if not run.config_file.is_file() or run.export != model.resolve():
        return
    try:
        seen = searched_digests([run.path])
    except UserError as error:
        tell(f"warning: whether searches chose by these tasks is not known: {error}", sys.stderr)
        return
    for name, given in tasks.items():
        if count := sum(task.digest in seen for task in given):
            text = f"searches chose the model's mixtures by {count} of these {len(given)} tasks"
            tell(f"warning: {name}: {text}: --unseen-by {run.path} leaves them out", sys.stderr)


def _scored(arguments: argparse.Namespace, tasks: dict[str, Unseen]) -> dict[str, Scored]:
    import torch

    from opmix_dist.data.tokenizer import load_tokenizer
    from opmix_dist.models.source import checkpoint_source
    from opmix_dist.tasks.generation import ATTENTION
    from opmix_dist.tasks.scoring import ScoringOptions, score

    device = _device(arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    model = checkpoint_source(arguments.model, attention=ATTENTION).whole()
    torch.nn.Module.to(model, device)
    options = ScoringOptions(
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        choices=arguments.choices,
        allow_code=arguments.allow_code,
    )
    with _generator(arguments, device) as generator:
        return {
            file: score(
                model, tokenizer, one.tasks, options, where=file, numbers=one.numbers, generator=generator
            )
            for file, one in tasks.items()
        }


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device is cuda but torch sees no GPU: set it to cpu or auto")
    return "cuda" if available and name != "cpu" else "cpu"


@contextmanager
def _generator(arguments: argparse.Namespace, device: str) -> Iterator[Generator | None]:
    """None: transformers."""
    if arguments.generation == "transformers":
        yield None
        return
    from opmix_dist.tasks.vllm import FolderReplies

    replies = FolderReplies(arguments.model, device, arguments.max_new_tokens)
    try:
        yield replies
    finally:
        replies.close()


def _write_replies(file: Path, tasks: dict[str, Unseen], found: dict[str, Scored]) -> None:
    from opmix_dist.atomic import write_bytes

    lines = []
    for name, scored in found.items():
        of_file = tasks[name]
        each = zip(of_file.numbers, of_file.tasks, scored.replies, scored.errors.tolist(), strict=True)
        for number, task, reply, error in each:
            line = {"file": name, "number": number, "kind": task.kind, "group": task.group}
            lines.append(json.dumps({**line, "answer": task.answer, "reply": reply, "error": error}))
    try:
        write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise UserError(f"cannot write --out {file}: {error.strerror}") from None


def _rows(tasks: dict[str, Unseen], found: dict[str, Scored]) -> Iterator[dict[str, Any]]:
    """For each kind of each file."""
    import numpy as np

    from opmix_dist.tasks.error_rates import ErrorRate

    for name, scored in found.items():
        for kind in dict.fromkeys(scored.kinds):
            of_kind = np.array([one == kind for one in scored.kinds])
            groups = [task.group for task in tasks[name].tasks if task.kind == kind]
            rate = ErrorRate.of(scored.errors[of_kind], groups)
            yield {
                "file": name,
                "kind": kind,
                "tasks": rate.count,
                "groups": rate.groups,
                "error": rate.mean,
                "stderr": rate.stderr,
                "interval": [rate.low, rate.high],
            }


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Share of wrong replies")
    for column in ("tasks", "kind"):
        table.add_column(column)
    for column in ("examples", "groups", "error", "standard error", "95% interval"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["file"], row["kind"], f"{row['tasks']:,}", f"{row['groups']:,}", f"{row['error']:.1%}",
            f"{row['stderr']:.1%}" if row["groups"] > 1 else "–", f"{low:.1%} to {high:.1%}",
        )  # fmt: skip
    return table
