"""``opmix compare RUN RUN ...``: what runs and lifecycles came to, over seeds, and at what cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from opmix_dist.report.groups import Group

CONFIDENCE = 0.95


def add_compare_command(commands: argparse._SubParsersAction[Any]) -> None:
    compare = commands.add_parser(
        "compare",
        help="table of several runs or lifecycles: losses, forgetting, compute; over seeds, with intervals",
        description="Runs that differ in nothing but their seeds become one group, with mean and standard "
        "deviation; differences from the first group are paired by seed. Says what they do not have in "
        "common: tokens, data order, held-out samples, model.",
        epilog="RUN is the folder of a run or of a lifecycle, which must have ended.",
    )
    compare.add_argument("paths", nargs="*", type=Path, metavar="RUN", help="the first is the baseline")
    compare.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=RUN,RUN",
        help="a group by hand; repeatable, the baseline first, in place of RUN",
    )
    compare.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help=f"of the intervals (default: {CONFIDENCE:g})"
    )
    compare.add_argument("--out", type=Path, metavar="FILE.html", help="write it as one page with a picture")
    compare.add_argument("--json", action="store_true", help="all of it as one JSON value")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.report.comparable import checks
    from opmix_dist.report.compare_page import compare_page
    from opmix_dist.report.compare_tables import comparison_table, stage_tables, values
    from opmix_dist.report.compared import Compared
    from opmix_dist.terminal import open_console, say

    if not 0.5 < arguments.confidence < 1:
        raise UserError(
            f"--confidence {arguments.confidence:g}: give a share between 0.5 and 1, such as 0.95"
        )
    groups = _groups(arguments.paths, arguments.group)
    compared, found = Compared.of(groups, arguments.confidence), checks(groups)
    if arguments.out is not None:
        _write(arguments.out, compare_page(compared, found))
    if arguments.json:
        print(json.dumps(values(compared, found), allow_nan=False))
        return
    console = open_console()
    for check in found:
        say(console, f"{check.what}: {check.text}", style=None if check.same else "yellow")
    console.print(comparison_table(compared))
    for table in stage_tables(compared):
        console.print(table)
    for line in compared.compute_lines():
        say(console, line)
    for line in compared.uncounted():
        say(console, line, style="yellow")
    if arguments.out is not None:
        say(console, f"page: {arguments.out}")


def _groups(paths: Sequence[Path], given: Sequence[str]) -> list[Group]:
    from opmix_dist.report.courses import read_course
    from opmix_dist.report.groups import group_as_named, group_by_settings

    if bool(paths) == bool(given):
        raise UserError("give the runs to compare, or groups of them with --group NAME=RUN,RUN, not both")
    if paths:
        return group_by_settings([read_course(path) for path in paths])
    named = []
    for text in given:
        name, equals, members = text.partition("=")
        if not (name and equals and all(members.split(","))):
            raise UserError(f"--group {text}: write NAME=RUN,RUN")
        named.append((name, [read_course(Path(member)) for member in members.split(",")]))
    return group_as_named(named)


def _write(path: Path, content: bytes) -> None:
    from opmix_dist.atomic import write_bytes

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; --out FILE.html names another place"
        ) from None
