"""Rows of the benchmark: declared before anything runs, filled one after another, written after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels.measure import Bench, Timing
from benchmarks.machine import table
from opmix_kernels.cost import Ceilings, Work, total

NOT_YET = "not yet measured"
MEASURED = "measured"
DRY = "dry run"
"""Ran to the end on the CPU with tiny shapes: its numbers are no measurement."""
SKIPPED, FAILED, WRONG = "skipped", "failed", "wrong"


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs allocated.

    Args:
        run: what is timed.
        error: relative error of a run's result against a reference in float64, or None where there is none.
        tolerance: largest error with which a case is timed at all.
        warm: see :meth:`Bench.time`.
        times: what ``run`` does is this part of the whole: its seconds are multiplied by it.
        close: gives back what is held besides tensors.
    """

    run: Callable[[], Any]
    error: Callable[[Any], float] | None = None
    tolerance: float = 1e-2
    warm: Callable[[], Any] | None = None
    times: float = 1.0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        operation, shape, path: name it; ``path`` is ours or a baseline.
        ours: whether it is this project's: if it fails, so does the benchmark.
        work: its kernels' FLOPs and bytes by arithmetic.
        needs: packages beyond torch and triton.
        note: what a reader must know of it.
    """

    operation: str
    shape: str
    path: str
    ours: bool
    work: Sequence[Work]
    prepare: Callable[[Bench], Prepared]
    needs: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Row:
    """What became of a case."""

    operation: str
    shape: str
    path: str
    ours: bool
    flops: float
    bytes: float
    floor_seconds: float | None = None
    """Of its work under the ceilings of this run."""
    status: str = NOT_YET
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    peak_bytes: int | None = None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    @classmethod
    def of(cls, case: Case) -> Row:
        work = total(case.work)
        return cls(case.operation, case.shape, case.path, case.ours, work.flops, work.bytes, note=case.note)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operation, self.shape, self.path

    def say(self, what: str) -> None:
        self.note = f"{self.note}; {what}" if self.note else what

    def fill(self, timing: Timing, times: float, status: str) -> None:
        self.status, self.runs, self.peak_bytes = status, timing.runs, timing.peak_bytes
        self.seconds, self.low, self.high = (
            times * value for value in (timing.median, timing.low, timing.high)
        )


@dataclass
class Report:
    """All rows and what they were measured on; ``write`` may be called at any moment."""

    machine: dict[str, Any]
    rows: list[Row]
    ceilings: Ceilings | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)
    noise: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def failed(self) -> bool:
        """Whether any path computes something else than its reference, or one of ours did not run."""
        rows = any(row.status == WRONG or (row.status == FAILED and row.ours) for row in self.rows)
        return rows or any(n["status"].startswith(FAILED) for n in self.noise)

    def write(self, folder: Path) -> None:
        """gpu_kernels.json and gpu_kernels.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu_kernels.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "gpu_kernels.md").write_text(self.markdown() + "\n")

    def markdown(self) -> str:
        lines = ["# Kernels on a GPU", "", "`python benchmarks/gpu_kernels.py`", ""]
        lines += [f"{name}: {value}  " for name, value in self.machine.items()]
        lines += ["", *(f"{remark}\n" for remark in self.remarks)]
        if not self.complete:
            lines += ["Rows without a number were not measured.", ""]
        if self.ceilings is not None:
            lines += [
                f"Ceilings of this run: {self.ceilings.flops / 1e12:,.0f} TFLOP/s (bfloat16 library GEMM), "
                f"{self.ceilings.bytes / 1e9:,.0f} GB/s (copy, read and written), "
                f"{self.ceilings.launch * 1e6:.1f} us a launch.",
                "",
            ]
        lines += ["## Targets", "", self._targets(), "", "## Loss noise", "", self._noise(), ""]
        for operation in dict.fromkeys(row.operation for row in self.rows):
            lines += [f"## {operation}", "", self._operation(operation), ""]
        return "\n".join(lines).rstrip()

    def _targets(self) -> str:
        head = ["target", "wanted", "found", "met"]
        rows = [[t["name"], t["wanted"], t["found"], t["met"]] for t in self.targets]
        return table(head, rows)

    def _noise(self) -> str:
        head = ["path", "error of losses, nats (RMS)", "error of paired differences, nats (RMS)", "status"]
        return (
            "Against float64, as means over the tokens of a candidate; differences are to the first "
            "candidate.\n\n"
            + table(
                head,
                [[n["path"], _small(n["losses"]), _small(n["differences"]), n["status"]] for n in self.noise],
            )
        )

    def _operation(self, operation: str) -> str:
        head = ["shape", "path", "median ms", "low to high (runs)", "TFLOP/s", "GB/s", "share of its floor"]
        head += ["peak MB", "error", "note"]
        return table(head, [self._cells(row) for row in self.rows if row.operation == operation])

    def _cells(self, row: Row) -> list[str]:
        name = f"**{row.path}**" if row.ours else row.path
        if row.seconds is None:
            note = f"{row.status}: {row.note}" if row.note else row.status
            return [row.shape, name, *["" if row.status != NOT_YET else NOT_YET] * 6, _small(row.error), note]
        share = "" if row.floor_seconds is None else f"{row.floor_seconds / row.seconds:.2f}"
        note = row.note if row.status == MEASURED else f"{row.status}, not a measurement; {row.note}"
        return [
            row.shape,
            name,
            f"{1e3 * row.seconds:.3f}",
            f"{1e3 * (row.low or 0):.3f} to {1e3 * (row.high or 0):.3f} ({row.runs})",
            f"{row.flops / row.seconds / 1e12:,.1f}",
            f"{row.bytes / row.seconds / 1e9:,.0f}",
            share,
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
            _small(row.error),
            note.rstrip("; "),
        ]


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
