"""Timing on a GPU by events, or of a dry run on the CPU; memory; and the ceilings of this very machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opmix_kernels.cost import Ceilings

FLUSH_BYTES = 256 << 20
"""More than any second-level cache holds, so that no operand is there before a run."""
FLUSHES = 16
"""Before a run: about a millisecond, in which the host's launches queue up as they do in a long evaluation.
Without it, the time of a single kernel would be that of Python before it."""


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs, and the memory that a run takes beyond what was there before it."""

    median: float
    low: float
    high: float
    runs: int
    peak_bytes: int


@dataclass(frozen=True)
class Bench:
    """Where and how things are measured.

    Args:
        dry: tiny shapes on the CPU, kernels in Triton's interpreter: every number is meaningless.
        repeats: timed runs at most.
        seconds: after which no further run of a case begins.
    """

    device: torch.device
    dry: bool
    repeats: int = 20
    seconds: float = 0.5

    def randn(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        """Normal numbers in bfloat16, drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).bfloat16()

    def coefficients(self, candidates: int, adapters: int) -> Tensor:
        """Float32 points of the simplex, [M, C]."""
        generator = torch.Generator(self.device).manual_seed(7)
        drawn = torch.rand(candidates, adapters, generator=generator, device=self.device)
        return torch.softmax(4 * drawn, dim=1)

    def time(self, run: Callable[[], Any], *, warm: Callable[[], Any] | None = None) -> Timing:
        """Median of runs, each with a cold second-level cache and some launches ahead of the GPU.

        Args:
            warm: done before in place of ``run``, where a run is long: what compiles and allocates.
        """
        if self.dry:
            begun = time.perf_counter()
            run()
            seconds = time.perf_counter() - begun
            return Timing(seconds, seconds, seconds, 1, 0)
        (warm or run)()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if warm is None:
            run()  # autotuners of libraries have settled, and memory of a second run is its own
            torch.cuda.synchronize()
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        found: list[float] = []
        peak = 0
        begun = time.perf_counter()
        while len(found) < self.repeats and (not found or time.perf_counter() - begun < self.seconds):
            torch.cuda.reset_peak_memory_stats()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                flush.zero_()
            first.record()
            run()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
            peak = max(peak, torch.cuda.max_memory_allocated() - before - FLUSH_BYTES)
        return Timing(statistics.median(found), min(found), max(found), len(found), peak)

    def ceilings(self) -> Ceilings:
        """What this machine reaches: a large library GEMM in bfloat16, a large copy, many tiny launches."""
        size, elements, launches = (32, 1 << 10, 4) if self.dry else (8192, 1 << 30, 20_000)
        a, b = self.randn(size, size), self.randn(size, size, seed=1)
        product = torch.empty_like(a)
        gemm = self.time(lambda: torch.mm(a, b, out=product))
        source = torch.zeros(elements, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        one = torch.zeros(1, device=self.device)

        def tiny() -> None:
            for _ in range(launches):
                one.add_(1.0)

        return Ceilings(
            flops=2.0 * size**3 / gemm.median,
            bytes=2.0 * source.nbytes / copy.median,
            launch=self.time(tiny).median / launches,
        )


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """A run captured as a CUDA graph; replaying it gives the same tensors, written anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces outside of the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
