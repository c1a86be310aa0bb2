"""Measuring a loop in turns with the loop by hand, in one process, on one GPU."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.engines.cases import EngineCase
from benchmarks.engines.loops import ByHand, Task, TrainingLoop, built, llama_config
from benchmarks.engines.results import Spread, Timings, WrongError
from opmix_dist.models.devices import peak_flops
from opmix_dist.models.flops import flop_counts

TOLERANCE = 0.15
"""Of what the first steps lower the loss by: a loop that computes something else is not timed."""


def measure(case: EngineCase, micro: int, *, dry: bool) -> Timings:
    """Build both loops, compare them after the first steps, then time them in turns.

    Raises:
        WrongError: they differ by more than rounding.
        torch.OutOfMemoryError: the passes are too large for this GPU.
    """
    device = torch.device("cpu" if dry else "cuda")
    torch.set_float32_matmul_precision("high")  # of what is left in float32, for all alike
    task = Task(case, micro, device)
    torch.compile = partial(torch.compile, backend=task.backend)  # type: ignore[assignment]
    hand = ByHand(task)
    before = hand.loss()
    hand.run(case.steps)
    held = _allocated(device)
    loop = built(task)
    turns = Turns(loop, hand, case, device, before)
    try:
        loop.drive(case.steps, turns.mark)
    finally:
        loop.close()
    return _summary(case, micro, turns, held, device)


class Turns:
    """What happens between a loop's rounds of steps. Both loops have done as many steps when they are
    compared; the loop by hand takes its turn while the other stands still."""

    def __init__(
        self, loop: TrainingLoop, hand: ByHand, case: EngineCase, device: torch.device, before: float
    ) -> None:
        self.loop, self.hand, self.case, self.device, self.before = loop, hand, case, device, before
        self.error = float("nan")
        self.waits = 0.0
        self.peak = 0
        self.seconds: list[float] = []
        self.seconds_by_hand: list[float] = []
        self._calls = 0
        self._begun = 0.0
        self._caught: Any = None

    def mark(self) -> bool:
        """One more round is over, of: the first steps, steps whose waits are counted, timed rounds."""
        self._settle()
        now = time.perf_counter()
        done, self._calls = self._calls, self._calls + 1
        if done == 1:
            self._compare()
            self._count_waits()
        elif done == 2:
            self._waits_are_counted()
        elif done > 2:
            self.seconds.append(now - self._begun)
            self.peak = max(self.peak, _peak(self.device))
        if done >= 2 and len(self.seconds) < self.case.rounds:
            self._by_hand()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._begun = time.perf_counter()
        return len(self.seconds) < self.case.rounds

    def _compare(self) -> None:
        found, expected = self.loop.loss(), self.hand.loss()
        self.error = abs(found - expected) / abs(expected - self.before)
        if not self.error <= TOLERANCE:
            raise WrongError(
                f"mean loss {found:.4f} after {self.case.steps} steps, {expected:.4f} by hand, from "
                f"{self.before:.4f}"
            )

    def _by_hand(self) -> None:
        begun = time.perf_counter()
        self.hand.run(self.case.steps)
        self._settle()
        self.seconds_by_hand.append(time.perf_counter() - begun)

    def _count_waits(self) -> None:
        """Torch warns where an operation makes the host wait for the GPU; waits for events are not among
        them."""
        if self.device.type == "cuda":
            self._caught = warnings.catch_warnings(record=True)
            self._warned = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _waits_are_counted(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            found = [w for w in self._warned if "synchronizing CUDA operation" in str(w.message)]
            self.waits = len(found) / self.case.steps

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _summary(case: EngineCase, micro: int, turns: Turns, held: int, device: torch.device) -> Timings:
    tokens = case.steps * case.tokens_per_step
    ratios = [hand / own for hand, own in zip(turns.seconds_by_hand, turns.seconds, strict=True)]
    per_token = flop_counts(llama_config(case.model, case.length), case.length).train()
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if device.type == "cuda" else None
    speed = _spread([tokens / seconds for seconds in turns.seconds])
    by_hand = _spread([tokens / seconds for seconds in turns.seconds_by_hand])
    return Timings(
        tokens_per_second=speed,
        by_hand=by_hand,
        ratio=_spread(ratios),
        mfu=None if peak is None else speed.median * per_token / peak,
        mfu_by_hand=None if peak is None else by_hand.median * per_token / peak,
        peak_bytes=turns.peak - held if device.type == "cuda" else None,
        waits_per_step=turns.waits if device.type == "cuda" else None,
        error=turns.error,
        micro=micro,
        rounds=case.rounds,
        steps=case.steps,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
