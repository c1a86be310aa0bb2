"""Readers of what comparisons take from runs and lifecycles."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opmix_dist.exchange import files
from opmix_dist.exchange.heldout import FILE as HELD_OUT
from opmix_dist.exchange.heldout import HeldOutLosses, sample_losses
from opmix_dist.exchange.lifecycles import LIFECYCLE_FILE
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.scores import FILE as SCORES
from opmix_dist.report.comparable import checks
from opmix_dist.report.compare_tables import comparison_table, stage_tables, values
from opmix_dist.report.compared import Compared
from opmix_dist.report.courses import read_course
from opmix_dist.report.groups import group_as_named
from tests.report.runs import STAGE_NAMES, write_lifecycle

LAST = f"life/stages/{STAGE_NAMES[-1]}"


def make_compared(root: Path) -> None:
    """A lifecycle with losses of samples and scores, and another to compare it with."""
    for name in ("life", "other"):
        write_lifecycle(root / name)
        run = RunDir(root / name / "stages" / STAGE_NAMES[-1])
        names = list(run.summary().final_loss)
        ids = np.repeat(np.arange(len(names)), 2)
        tokens, mask = np.ones((len(ids), 3), np.int64), np.ones((len(ids), 3), bool)
        found = sample_losses(names, ids, tokens, mask, np.arange(len(ids)) * 1.5)
        write_record(run.eval_file.with_name(HELD_OUT), HeldOutLosses(step=1, domains=found))
        rates = {"tasks": 4, "error": 0.25, "stderr": 0.2, "interval": [0.0, 0.7]}
        score = {"file": "data/code/tasks.jsonl", "kind": "exact_match", **rates}
        files.write_json(run.path / SCORES, {"model": "m", "rows": [score]})


def _compare(root: Path) -> object:
    """All that is printed, and what is given to scripts."""
    courses = [(name, [read_course(root / name)]) for name in ("other", "life")]
    groups = group_as_named(courses)
    compared = Compared.of(groups, 0.95)
    console = Console(file=io.StringIO(), width=200)
    for table in (comparison_table(compared), *stage_tables(compared)):
        console.print(table)
    lines = [*compared.compute_lines(), *compared.uncounted()]
    return lines, values(compared, checks(groups))


Read = tuple[str, str, Callable[[Path], Any], bool]
COMPARED: tuple[Read, ...] = (
    ("lifecycle", f"life/{LIFECYCLE_FILE}", lambda root: read_course(root / "life"), False),
    ("comparison of a summary", f"{LAST}/summary.json", _compare, True),
    ("comparison of samples", f"{LAST}/metrics/{HELD_OUT}", _compare, True),
    ("comparison of scores", f"{LAST}/{SCORES}", _compare, True),
    ("comparison of mixtures", f"{LAST}/mixtures.jsonl", _compare, True),
)
"""Name, file, what reads it, and whether that takes long."""
