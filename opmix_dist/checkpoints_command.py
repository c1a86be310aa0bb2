"""``opmix checkpoints RUN``: what there is to resume from, and whether it is whole. It changes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opmix_dist.train.checkpoint_list import Listed

DAMAGED = 1
"""Exit status where a checkpoint is damaged, or there is none that is whole."""


def add_checkpoints_command(commands: Any) -> None:
    """Add ``checkpoints`` to the subcommands of ``opmix``."""
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list a run's checkpoints: step, size, engine, and whether they are as they were written",
        description="Compares each checkpoint's files with what was written, by size or by content. The exit "
        "status is 1 where one is damaged or there is none.",
    )
    checkpoints.add_argument("run_dir", type=Path, metavar="RUN")
    checkpoints.add_argument(
        "--checksums", action="store_true", help="read every file and compare its content, not its size only"
    )
    checkpoints.add_argument("--json", action="store_true", help="a JSON object for each, one a line")
    checkpoints.set_defaults(run=_checkpoints)


def _checkpoints(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.train.checkpoint_list import list_checkpoints

    found = list_checkpoints(RunDir(arguments.run_dir), checksums=arguments.checksums)
    if arguments.json:
        _print_json(found, arguments.checksums)
    else:
        _print(found, arguments.checksums)
    standings = {checkpoint.standing for checkpoint in found}
    return 0 if "whole" in standings and "damaged" not in standings else DAMAGED


def _print_json(found: Sequence[Listed], checksums: bool) -> None:
    import dataclasses
    import json

    for checkpoint in found:
        row = dataclasses.asdict(checkpoint) | {"folder": str(checkpoint.folder)}
        print(json.dumps(row | {"compared": _compared(checkpoint, checksums)}))


def _print(found: Sequence[Listed], checksums: bool) -> None:
    from rich.table import Table

    from opmix_dist.terminal import open_console, say

    console = open_console()
    if not found:
        say(console, "there is no checkpoint")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in _COLUMNS.items():
        table.add_column(name, justify=justify, no_wrap=name != "")
    for checkpoint in found:
        table.add_row(*_cells(checkpoint, checksums))
    console.print(table)
    whole = [checkpoint.step for checkpoint in found if checkpoint.standing == "whole"]
    start = f"step {max(whole):,}" if whole else "nowhere: no checkpoint is whole"
    say(console, f"a resume goes on from {start}", style=None if whole else "red")


_COLUMNS: dict[str, Any] = {
    "step": "right",
    "size": "right",
    "written": "left",
    "by": "left",
    "compared": "left",
    "standing": "left",
    "": "left",
}


def _cells(checkpoint: Listed, checksums: bool) -> tuple[str, ...]:
    at = checkpoint.at
    written = "" if at is None else datetime.fromtimestamp(at).isoformat(" ", "seconds")
    by = checkpoint.engine + (f" on {checkpoint.ranks} rank(s)" if checkpoint.ranks is not None else "")
    size, compared = _binary(checkpoint.bytes), _compared(checkpoint, checksums)
    return f"{checkpoint.step:,}", size, written, by, compared, checkpoint.standing, checkpoint.why


def _compared(checkpoint: Listed, checksums: bool) -> str:
    if checkpoint.standing == "unfinished":
        return ""
    if not checkpoint.has_manifest:
        return "not recorded"
    return "checksums" if checksums else "sizes"


def _binary(size: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << bits:
            return f"{size / (1 << bits):,.1f} {unit}"
    return f"{size} B"
