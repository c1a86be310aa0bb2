"""The compute ledger: what each phase of a run cost, in seconds, device-seconds, FLOPs and tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opmix_dist.exchange.schemas import PhaseCost

LEFT_OUT = "left-out batches"
"""Phase of what was read, and perhaps computed, for batches that the parameters know nothing of."""


class Ledger:
    """Adds up costs by phase. ``num_ranks`` devices are busy, or waiting, while a phase is timed."""

    def __init__(
        self,
        num_ranks: int,
        costs: Mapping[str, PhaseCost] | None = None,
        *,
        peak_flops: float | None = None,
    ) -> None:
        """
        Args:
            costs: of earlier attempts.
            peak_flops: FLOP/s of one device at most; None: not known.
        """
        self.num_ranks, self.peak_flops = num_ranks, peak_flops
        self.elsewhere = 0.0
        """Seconds of all blocks that were timed or set aside."""
        self.costs = {name: cost.model_copy() for name, cost in (costs or {}).items()}

    def go_on(self, costs: Mapping[str, PhaseCost]) -> None:
        """From those of earlier attempts, besides what was added since."""
        since, self.costs = self.costs, {name: cost.model_copy() for name, cost in costs.items()}
        for name, cost in since.items():
            self.add(name, seconds=cost.seconds, flops=cost.flops, tokens=cost.tokens)

    def add(self, phase: str, *, seconds: float = 0.0, flops: float = 0.0, tokens: int = 0) -> None:
        """FLOPs and tokens are those of all ranks together; seconds are wall time."""
        cost = self.costs.setdefault(phase, PhaseCost(possible_flops=0.0))
        cost.seconds += seconds
        cost.device_seconds += seconds * self.num_ranks
        if self.peak_flops is None or cost.possible_flops is None:
            cost.possible_flops = None  # also of a part of it: nobody knows the whole then
        else:
            cost.possible_flops += seconds * self.num_ranks * self.peak_flops
        cost.flops += flops
        cost.tokens += tokens

    def move(self, phase: str, to: str, *, since: PhaseCost | None) -> None:
        """What ``phase`` has cost since its cost was ``since`` (None: nothing) was spent on ``to``."""
        whole, kept = self.costs.get(phase), since or PhaseCost(possible_flops=0.0)
        if whole is None:
            return
        there = self.costs.setdefault(to, PhaseCost(possible_flops=0.0))
        self.costs[phase] = kept.model_copy()
        for name in ("seconds", "device_seconds", "flops", "tokens"):
            setattr(there, name, getattr(there, name) + getattr(whole, name) - getattr(kept, name))
        if whole.possible_flops is None or kept.possible_flops is None or there.possible_flops is None:
            there.possible_flops = None
        else:
            there.possible_flops += whole.possible_flops - kept.possible_flops

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block, also when it raises."""
        start = time.perf_counter()
        try:
            with self.aside():
                yield
        finally:
            self.add(phase, seconds=time.perf_counter() - start)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what another ledger counts: it is no phase of this one, and no part of a step either."""
        start, before = time.perf_counter(), self.elsewhere
        try:
            yield
        finally:
            self.elsewhere = before + time.perf_counter() - start  # blocks within this one count once
