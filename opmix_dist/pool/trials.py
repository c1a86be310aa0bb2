"""Short runs of the very model that is to be searched: how much memory a pass takes, and how long."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from opmix_dist.data.loader import EvalSet
from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.candidates import Method, simulate_sums, simulate_with_gradients
from opmix_dist.pool.errors import SearchError

log = logging.getLogger(__name__)
MARGIN = 0.9
"""Share of the free memory that a pass may take: allocators lose some to pieces that do not fit together."""
REPEATS = 3


class Trials:
    """Runs on the first held-out samples, with all adapters in equal parts.

    on_run: called before each, a sign of life: together they may take minutes.
    tokens, flops: what the trials computed so far, for the ledger.
    """

    def __init__(
        self,
        adapters: JointAdapters,
        heldout: EvalSet,
        flops: FlopCounts,
        on_run: Callable[[], None] = lambda: None,
    ) -> None:
        self.adapters, self.heldout, self._flops, self.on_run = adapters, heldout, flops, on_run
        self.device = adapters.parameters()[0].device
        self.tokens, self.flops = 0, 0.0

    @property
    def num_adapters(self) -> int:
        return len(self.adapters.names)

    def run(self, method: Method, joint: int, batch_size: int) -> None:
        """One pass over ``joint`` candidates of ``batch_size`` samples each; the device is done after it."""
        self.on_run()
        samples = self.heldout.batch[:batch_size]
        U = np.full((joint, self.num_adapters), 1 / self.num_adapters)
        simulate_sums(self.adapters, U, samples, method=method, batch_size=batch_size, joint=joint)
        self._count(joint * samples.tokens.numel(), self._flops.lowrank_candidate(self.num_adapters))

    def run_with_gradients(self, batch_size: int) -> None:
        """One pass over a candidate of ``batch_size`` samples and back."""
        self.on_run()
        samples, ids = self.heldout.batch[:batch_size], self.heldout.domain_ids[:batch_size]
        U, domains = np.full((1, self.num_adapters), 1 / self.num_adapters), int(ids.max()) + 1
        simulate_with_gradients(self.adapters, U, samples, ids, domains, batch_size=batch_size)
        self._count(samples.tokens.numel(), self._flops.candidate_gradients(self.num_adapters))

    def merge(self) -> None:
        """All deltas into all weights, once."""
        self.on_run()
        u = torch.full((self.num_adapters,), 1 / self.num_adapters, dtype=torch.float64)
        with self.adapters.merged(u):
            self._wait()
        self.flops += self.num_adapters * self._flops.merge_per_adapter

    def _count(self, tokens: int, flops_per_token: float) -> None:
        self.tokens += tokens
        self.flops += tokens * flops_per_token

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], None]) -> int:
        """Most bytes that are allocated on the GPU while ``work`` runs, with what lies there already."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device)

    def memory(self) -> int:
        """Bytes of the GPU that this process has or can have."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def seconds(self, work: Callable[[], None]) -> float:
        """Of ``work``, the median of some runs after one that compiles and allocates."""
        times = []
        for _ in range(1 + REPEATS):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def largest_fit(peak: Callable[[int], int], memory: int, most: int) -> int:
    """How many samples, 1 to ``most``, a pass can have.

    The peaks of one and of two samples tell what each more takes; a pass of the size that follows is then
    tried, and half of it where memory runs out.

    Args:
        peak: bytes of a pass of so many samples; raises ``torch.OutOfMemoryError``.
        memory: bytes that there are.

    Raises:
        SearchError: not even one sample fits.
    """
    try:
        peak(1)  # makes what stays: copies of weights, compiled kernels
        one = peak(1)
    except torch.OutOfMemoryError:
        raise SearchError(
            "out of memory with one held-out sample in a pass: search with smaller samples, on a larger GPU, "
            "or with search.candidates.dtype bfloat16"
        ) from None
    try:
        each = max(1, peak(2) - one) if most > 1 else 1
    except torch.OutOfMemoryError:
        return 1
    samples = max(1, min(most, 1 + int(MARGIN * memory - one) // each))
    while samples > 1:
        try:
            peak(samples)
            break
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d samples in a pass: trying %d", samples, samples // 2)
            samples //= 2
    return samples
