"""What the kernels are to reach on an H200, as rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels import operations, sweeps
from benchmarks.kernels.table import DRY, MEASURED, NOT_YET, Row

SCRATCH_BYTES = 1e9


@dataclass(frozen=True)
class Target:
    """``value`` of measured rows must be at least (or at most) ``limit``; None: a row it needs is missing."""

    name: str
    limit: float
    value: float | None
    at_most: bool = False
    unit: str = ""

    def row(self, status: str) -> dict[str, Any]:
        """As a line of the table; nothing is met or missed in a dry run."""
        sign = "at most" if self.at_most else "at least"
        wanted = f"{sign} {self.limit:g}{self.unit}"
        if self.value is None:
            return {"name": self.name, "wanted": wanted, "found": NOT_YET, "met": NOT_YET}
        if status == DRY:
            return {"name": self.name, "wanted": wanted, "found": DRY, "met": NOT_YET}
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        found = f"{self.value:.3g}{self.unit}"
        return {"name": self.name, "wanted": wanted, "found": found, "met": "yes" if met else "no"}


class Found:
    """Measured rows by their names."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row.key: row for row in rows if row.status in (MEASURED, DRY)}

    def seconds(self, operation: str, shape: str, *paths: str) -> float | None:
        """The least of these paths'; None where none of them was measured."""
        found = [self.rows.get((operation, shape, path)) for path in paths]
        measured = [row.seconds for row in found if row is not None and row.seconds is not None]
        return min(measured, default=None)

    def floor(self, operation: str, shape: str, *paths: str) -> float | None:
        found = [self.rows.get((operation, shape, path)) for path in paths]
        return next((row.floor_seconds for row in found if row is not None), None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def targets(rows: Sequence[Row], sizes: operations.Sizes, plan: sweeps.Plan) -> list[dict[str, Any]]:
    """Every target; the table says of which there is no measurement."""
    status = DRY if any(row.status == DRY for row in rows) else MEASURED
    found = Found(rows)
    parts = (_layer(found, rows), _losses(found, sizes), *(_sweep(found, s) for s in plan.sweeps))
    return [target.row(status) for part in parts for target in part]


def _layer(found: Found, rows: Sequence[Row]) -> Iterator[Target]:
    """The first shape: d 2,048, C 7, r 16, 64 x 1,024 tokens."""
    shape = next(row.shape for row in rows if row.operation == operations.NORMED)
    for operation, path, what in (
        (operations.NORMED, operations.OURS_WIDE, "behind a norm (the norm in both)"),
        (operations.BARE, operations.OURS_LAYER, "without a norm (0.81 by arithmetic on an H200)"),
    ):
        dense = found.seconds(operation, shape, operations.DENSE)
        speed = ratio(dense, found.seconds(operation, shape, path))
        yield Target(f"low-rank layer, {shape}, {what}: speed over the dense GEMM", 0.9, speed)


def _losses(found: Found, sizes: operations.Sizes) -> Iterator[Target]:
    for rows, width, vocab in sizes.vocabularies:
        if (width, vocab) != (2048, 128_256) and len(sizes.vocabularies) > 1:
            continue
        shape = operations.losses_shape(rows, width, vocab)
        named = (operations.LOSSES, shape, operations.OURS_LOSSES)
        ours, row = found.seconds(*named), found.rows.get(named)
        peak = None if row is None or row.peak_bytes is None else row.peak_bytes / 1e6
        chunked = found.seconds(operations.LOSSES, shape, operations.CHUNKED)
        what = f"linear_cross_entropy, {shape}"
        yield Target(f"{what}: GEMM floor over time", 0.8, ratio(found.floor(*named), ours))
        yield Target(f"{what}: scratch", SCRATCH_BYTES / 1e6, peak, at_most=True, unit=" MB")
        yield Target(f"{what}: speed over chunked library logits", 1.0, ratio(chunked, ours))


def _sweep(found: Found, sweep: sweeps.Sweep) -> Iterator[Target]:
    """``auto`` takes the faster of both paths."""
    shape = sweeps.title(sweep)
    ours = found.seconds(sweeps.SWEEP, shape, *sweeps.PATHS)
    best = found.seconds(sweeps.SWEEP, shape, *sweeps.BASELINES)
    disk = found.seconds(sweeps.SWEEP, shape, sweeps.DISK)
    floor = found.floor(sweeps.SWEEP, shape, *sweeps.PATHS)
    yield Target(f"sweep {shape}, auto: floor over time", 0.8, ratio(floor, ours))
    yield Target(f"sweep {shape}, auto: speed over the best baseline", 1.0, ratio(best, ours))
    yield Target(f"sweep {shape}, auto: speed over merged models on disk", 20.0, ratio(disk, ours))
