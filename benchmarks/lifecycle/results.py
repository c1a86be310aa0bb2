"""The table of a comparison of methods, from what their lifecycles left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.lifecycle.lives import Life
from benchmarks.machine import describe, table
from opmix_dist.report.comparable import checks
from opmix_dist.report.compare_tables import cells, notes, stage_rows, values
from opmix_dist.report.compared import AVERAGE, ERRORS, FORGETTING, LOSSES, STAGES, TOTAL, Compared
from opmix_dist.report.compute import UNITS, less_compute, mean_amounts
from opmix_dist.report.courses import read_course
from opmix_dist.report.groups import group_as_named

CONFIDENCE = 0.95
COLUMNS = (
    (LOSSES, AVERAGE, "average loss"),
    (LOSSES, "average of old domains", "old domains"),
    (LOSSES, "average of new domains", "new domains"),
    (STAGES, FORGETTING, "forgetting"),
    (ERRORS, AVERAGE, "task errors"),
    *((name, TOTAL, name) for name in UNITS.values()),
)
"""Section and label of a quantity, and what its column is called."""


def compare(lives: Sequence[Life]) -> Compared:
    """Of lifecycles that have ended; those of the first one's method are the baseline."""
    by_method: dict[str, list[Life]] = {}
    for life in lives:
        by_method.setdefault(life.name, []).append(life)
    named = [(name, [read_course(life.folder) for life in found]) for name, found in by_method.items()]
    return Compared.of(group_as_named(named), CONFIDENCE)


def as_json(compared: Compared) -> dict[str, Any]:
    return {"machine": describe("torch", "transformers")} | values(compared, checks(compared.groups))


def markdown(compared: Compared, lives: Sequence[Life], command: str) -> str:
    """The whole page; ``command`` made it, of ``lives``."""
    return "\n\n".join(_parts(compared, lives, command)) + "\n"


def _parts(compared: Compared, lives: Sequence[Life], command: str) -> Iterator[str]:
    whats = {life.name: life.method.what for life in lives}
    baseline = compared.groups[0].name
    yield "# A lifecycle by several methods"
    yield (
        f"`{command}`; {describe('torch', 'transformers')}. Stages that are the same in several methods were "
        "run once, and are counted in each."
    )
    yield "\n".join(f"- {group.name}: {whats[group.name]}" for group in compared.groups)
    shown = [(row, title) for section, label, title in COLUMNS if (row := compared.row(section, label))]
    seeds = [str(len(group.courses)) for group in compared.groups]
    spreads = [
        [group.name, seeds[i], *(cells(row)[i] for row, _ in shown)]
        for i, group in enumerate(compared.groups)
    ]
    yield table(["", "seeds", *(title for _, title in shown)], spreads)
    yield " ".join(notes(compared))
    if len(compared.groups) > 1:
        yield f"## Differences from {baseline}"
        count = len(compared.groups)
        rows = [
            [group.name, *(cells(row)[count + i] for row, _ in shown)]
            for i, group in enumerate(compared.groups[1:])
        ]
        yield table(["", *(title for _, title in shown)], rows)
    yield "## Compute"
    lines = [*compared.compute_lines(), *with_teachers(lives), *compared.uncounted()]
    yield "\n".join(f"- {line}" for line in lines)
    yield "## Is it comparable?"
    answers = {True: "yes", False: "no", None: "not known"}
    yield "\n".join(f"- {one.what}: {answers[one.same]}; {one.text}" for one in checks(compared.groups))
    yield "## Loss after each stage"
    for group in compared.groups:
        domains = group.losses.one.domains
        rows = [[stage, *losses] for stage, losses in stage_rows(group)]
        yield f"{group.name}:\n\n{table(['', *domains], rows)}"


def with_teachers(lives: Sequence[Life]) -> Iterator[str]:
    """How methods with a teacher stand to the first one, where the teacher's training is counted too: its
    last stage, since those before it are the student's own as well."""
    names = list(dict.fromkeys(life.name for life in lives))
    courses = {name: [read_course(life.folder) for life in lives if life.name == name] for name in names}
    for name, teacher in dict.fromkeys((life.name, life.method.teacher) for life in lives):
        if teacher is None or name == names[0]:
            continue
        for unit in UNITS:
            parts = mean_amounts([course.costs for course in courses[name]], unit)
            trained = mean_amounts([course.last.summary.costs for course in courses[teacher]], unit)
            parts[f"last stage of {teacher}, its teacher,"] = sum(trained.values())
            whole = mean_amounts([course.costs for course in courses[names[0]]], unit)
            yield less_compute(f"{name} with its teacher", parts, names[0], whole, unit)
