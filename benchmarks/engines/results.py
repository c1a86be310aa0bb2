"""Rows with what became of them, the table, and merging what several commands have measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.cases import FSDP_COMPILED, SINGLE_COMPILED, Case, EngineCase, JobCase, cases
from benchmarks.kernels.table import DRY, FAILED, MEASURED, NOT_YET, WRONG
from benchmarks.machine import table

NAME = "gpu_engines"


class WrongError(Exception):
    """A loop did not train the same model on the same data."""


@dataclass(frozen=True)
class Spread:
    """Of rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Of an engine row."""

    tokens_per_second: Spread
    by_hand: Spread
    """Tokens per second of the loop by hand, in turns with it."""
    ratio: Spread
    """Its speed over that of the loop by hand, round by round."""
    mfu: float | None
    mfu_by_hand: float | None
    peak_bytes: int | None
    """Beyond what the other loop holds."""
    waits_per_step: float | None
    """Operations that make the host wait for the GPU."""
    error: float
    """Difference of the losses after the first steps, over what these steps lowered it by."""
    micro: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Overhead:
    """Of a job row: seconds from the first finished step to the last one, with the search and without."""

    seconds: float
    seconds_without: float
    training_seconds: float
    """What the steps themselves took, with the search."""
    search_seconds: float
    """What the search's own phases took."""

    @property
    def share(self) -> float:
        return self.seconds / self.seconds_without - 1.0


@dataclass
class Row:
    """What became of a case."""

    kind: str
    group: str
    path: str
    ours: bool
    compiled: bool
    status: str = NOT_YET
    note: str = ""
    timings: Timings | None = None
    overhead: Overhead | None = None
    run: int | None = None
    """Which command measured it, an index of the report's runs."""

    @classmethod
    def of(cls, case: Case) -> Row:
        return cls(case.kind, case.group, case.path, case.ours, case.compiled)

    @property
    def key(self) -> str:
        return f"{self.group} | {self.path}"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        values = dict(record)
        if values["timings"] is not None:
            timings = values["timings"]
            spreads = {name: Spread(**timings[name]) for name in ("tokens_per_second", "by_hand", "ratio")}
            values["timings"] = Timings(**{**timings, **spreads})
        if values["overhead"] is not None:
            values["overhead"] = Overhead(**values["overhead"])
        return cls(**values)


@dataclass
class Report:
    """All rows, in order, and the commands that measured them."""

    rows: list[Row]
    runs: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, str]] = field(default_factory=list)
    dry: bool = False

    @classmethod
    def of(cls, cases: Sequence[Case], *, dry: bool) -> Report:
        return cls([Row.of(case) for case in cases], dry=dry)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Of gpu_engines.json."""
        found = json.loads((folder / f"{NAME}.json").read_text())
        rows = [Row.from_record(record) for record in found["rows"]]
        return cls(rows, found["runs"], found["targets"], found["dry"])

    def merge(self, folder: Path) -> None:
        """Take over rows that an earlier command measured; what is no case any more is left out.

        Raises:
            ValueError: a dry run's numbers and measured ones would be in one table.
        """
        file = folder / f"{NAME}.json"
        if not file.exists():
            return
        found = Report.read(folder)
        if found.dry != self.dry and found.runs:
            raise ValueError(
                f"{file} holds {'a dry run' if found.dry else 'measurements'}: give another --out"
            )
        earlier = {row.key: row for row in found.rows}
        self.rows = [earlier.get(row.key, row) for row in self.rows]
        self.runs = found.runs

    @property
    def failed(self) -> bool:
        """Whether a loop computes something else, or one of ours did not run."""
        return any(row.status == WRONG or (row.status == FAILED and row.ours) for row in self.rows)

    def write(self, folder: Path) -> None:
        """gpu_engines.json and gpu_engines.md."""
        self.targets = targets(self.rows, dry=self.dry)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        (folder / f"{NAME}.md").write_text(self.markdown() + "\n")

    def markdown(self) -> str:
        lines = ["# Engines on a GPU", "", "`python benchmarks/gpu_engines.py`", "", *self._where(), ""]
        lines += [*(f"{remark}\n" for remark in REMARKS), "## Targets", ""]
        head = ["target", "wanted", "found", "met"]
        lines += [
            table(head, [[t[name] for name in ("name", "wanted", "found", "met")] for t in self.targets])
        ]
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group]
            cells = _job_cells if rows[0].kind == JobCase.kind else _engine_cells
            lines += ["", f"## {group}", "", table(cells(None), [cells(row) for row in rows])]
        return "\n".join(lines)

    def _where(self) -> list[str]:
        if not self.runs:
            return [NO_GPU]
        lines = [NO_MEASUREMENT, ""] if self.dry else []
        for index, run in enumerate(self.runs):
            lines.append(f"Run {index}: {', '.join(str(value) for value in run.values())}  ")
        return lines


NO_GPU = (
    "**No GPU was at hand when this was written: every cell is not yet measured, and no number is a guess at "
    "one.** The command above fills the table on a CUDA machine."
)
NO_MEASUREMENT = "**A dry run on the CPU with a tiny model: no number here is a measurement.**"
REMARKS = (
    "Ours are in bold. Each row was measured in a process of its own, in turns with the loop that is written "
    "by hand on the same model, batches and arithmetic (bfloat16 by autocast, float32 parameters, fused "
    "AdamW), compiled as a whole where the row is compiled. `of the loop by hand` is the ratio of speeds, "
    "round by round; spreads are the least and the largest round. MFU takes model FLOPs "
    "(opmix_dist/models/flops.py) over the data sheet's dense bfloat16 peak (opmix_dist/models/devices.py). "
    "Waits are operations that make the host wait for the GPU, per step, as torch counts them; ours reads "
    "each step's losses and gradient norm once more, behind an event.",
    "Before it is timed, a row's loss after the first steps is compared with that of the loop by hand; the "
    "error is the difference over what these steps lowered the loss by.",
    "Of whole jobs, the overhead is what the search adds to the time from the first finished step to the "
    "last one, in per cent of that time without a search, both measured one after the other.",
)


def _engine_cells(row: Row | None) -> list[str]:
    if row is None:
        head = ["path", "tokens/s", "low to high", "MFU", "of the loop by hand", "low to high"]
        return [
            *head,
            "loop by hand, tokens/s",
            "its MFU",
            "micro-batch",
            "peak GB",
            "waits",
            "error",
            "run",
            "note",
        ]
    t = row.timings
    if t is None:
        return [_name(row), *_empty(row, 11), "", _note(row)]
    return [
        _name(row),
        f"{t.tokens_per_second.median:,.0f}",
        f"{t.tokens_per_second.low:,.0f} to {t.tokens_per_second.high:,.0f}",
        _share(t.mfu),
        f"{t.ratio.median:.3f}",
        f"{t.ratio.low:.3f} to {t.ratio.high:.3f}",
        f"{t.by_hand.median:,.0f}",
        _share(t.mfu_by_hand),
        str(t.micro),
        "" if t.peak_bytes is None else f"{t.peak_bytes / 1e9:.1f}",
        "" if t.waits_per_step is None else f"{t.waits_per_step:.1f}",
        f"{t.error:.1e}",
        str(row.run),
        _note(row),
    ]


def _job_cells(row: Row | None) -> list[str]:
    if row is None:
        return [
            "search",
            "overhead",
            "seconds",
            "seconds without",
            "steps alone",
            "search alone",
            "run",
            "note",
        ]
    o = row.overhead
    if o is None:
        return [_name(row), *_empty(row, 5), "", _note(row)]
    numbers = (o.seconds, o.seconds_without, o.training_seconds, o.search_seconds)
    return [
        _name(row),
        f"{100 * o.share:+.1f} %",
        *(f"{seconds:.1f}" for seconds in numbers),
        str(row.run),
        _note(row),
    ]


def _name(row: Row) -> str:
    return f"**{row.path}**" if row.ours else row.path


def _empty(row: Row, count: int) -> list[str]:
    return [NOT_YET if row.status == NOT_YET else ""] * count


def _note(row: Row) -> str:
    if row.status == MEASURED:
        return row.note
    status = f"{row.status}, not a measurement" if row.status == DRY else row.status
    return f"{status}: {row.note}" if row.note else status


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def targets(rows: Sequence[Row], *, dry: bool) -> list[dict[str, str]]:
    """What the issue asks for on one H200."""
    wanted = [case for case in cases() if isinstance(case, EngineCase) and case.length == 2048]
    found = {row.key: row.timings for row in rows if row.status == MEASURED}
    lines = []
    for case in wanted:
        timings = found.get(case.key)
        if case.path in (SINGLE_COMPILED, FSDP_COMPILED):
            value = None if timings is None else timings.ratio.median
            lines.append(
                _target(f"{case.model.name}, {case.path}: speed of the loop by hand", 0.97, value, dry)
            )
        if case.path == SINGLE_COMPILED and case.model.name == "1B":
            lines.append(_target(f"{case.model.name}, {case.path}: MFU", 0.40, timings and timings.mfu, dry))
    return lines


def _target(name: str, limit: float, value: float | None, dry: bool) -> dict[str, str]:
    line = {"name": name, "wanted": f"at least {limit:g}", "found": NOT_YET, "met": NOT_YET}
    if value is None or dry:
        return line
    return {**line, "found": f"{value:.3f}", "met": "yes" if value >= limit else "no"}
