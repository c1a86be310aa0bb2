"""The compute ledger: what each phase of a run cost, in seconds, device-seconds, FLOPs and tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opmix_dist.exchange.schemas import PhaseCost


class Ledger:
    """Adds up costs by phase. ``num_ranks`` devices are busy, or waiting, while a phase is timed."""

    def __init__(self, num_ranks: int, costs: Mapping[str, PhaseCost] | None = None) -> None:
        self.num_ranks = num_ranks
        self.costs = {name: cost.model_copy() for name, cost in (costs or {}).items()}

    def add(self, phase: str, *, seconds: float = 0.0, flops: float = 0.0, tokens: int = 0) -> None:
        """FLOPs and tokens are those of all ranks together; seconds are wall time."""
        cost = self.costs.setdefault(phase, PhaseCost())
        cost.seconds += seconds
        cost.device_seconds += seconds * self.num_ranks
        cost.flops += flops
        cost.tokens += tokens

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, seconds=time.perf_counter() - start)
