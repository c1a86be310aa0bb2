"""Which shards the coming batches need, in the order in which they need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError

HORIZON_SAMPLES = 65_536
BATCHES_PER_STEP = 8
# Shards told of even if they are here, so that they stay. 65,536 samples of 2,000 domains lie in 28,000.
NEAR_SHARDS = 512


class Lookahead:
    """A copy of the sampler that runs in front of the loader's.

    It stops where ``ahead`` shards that are not on this machine lie before the loader, or at a horizon of
    samples. Each step looks a few batches further only, so that no step takes long.

    Args:
        sampler: a copy of its own, at the loader's position.
        splits: by domain index.
        rows: of each global batch that this rank reads.
        ahead: missing shards to know of in advance.
        tell: is called with (domain, shard) pairs from the next batch on, ordered by first need, when they
            have changed: the first ``NEAR_SHARDS`` and those behind them that are missing.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        splits: Sequence[ShardedSplit],
        rows: slice,
        *,
        ahead: int,
        tell: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        self._sampler, self._splits, self._rows = sampler, splits, rows
        self._ahead, self._tell = ahead, tell
        self._horizon = max(1, HORIZON_SAMPLES // sampler.global_batch_size)
        sizes = [split.shard_sizes for split in splits]
        self._ends = np.cumsum(np.concatenate(sizes))
        self._first_shard = np.cumsum([0, *map(len, sizes)])
        self._first_sample = np.cumsum([0, *map(int, map(np.sum, sizes))])
        # shard to the last batch known to need it; ordered by first need, as the missing ones are
        self._last_need: dict[int, int] = {}
        self._missing: dict[int, None] = {}
        self._told: list[int] = []
        self._ended = False

    def step(self, next_batch: int) -> None:
        """Forget what only batches before ``next_batch`` need, and look further ahead."""
        gone = [shard for shard, last in self._last_need.items() if last < next_batch]
        for shard in gone:
            del self._last_need[shard]
            self._missing.pop(shard, None)
        self._missing = {shard: None for shard in self._missing if not self._is_here(shard)}
        for _ in range(BATCHES_PER_STEP):
            enough = len(self._missing) >= self._ahead
            if enough or self._ended or self._sampler.position.batches >= next_batch + self._horizon:
                break
            self._look()
        near = dict.fromkeys(islice(self._last_need, NEAR_SHARDS))
        wanted = [*(near | self._missing)]
        if wanted != self._told:
            self._told = wanted
            self._tell([self._pair(shard) for shard in wanted])

    def _look(self) -> None:
        """One batch further."""
        number = self._sampler.position.batches
        try:
            domains, samples = self._sampler.draw()
        except UserError:  # a domain is used up: the loader tells when it gets there
            self._ended = True
            return
        domains, samples = domains[self._rows], samples[self._rows]
        needed = np.searchsorted(self._ends, self._first_sample[domains] + samples, side="right")
        for shard in dict.fromkeys(needed.tolist()):
            if shard not in self._last_need and not self._is_here(shard):
                self._missing[shard] = None
            self._last_need[shard] = number

    def _pair(self, shard: int) -> tuple[int, int]:
        domain = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return domain, shard - int(self._first_shard[domain])

    def _is_here(self, shard: int) -> bool:
        domain, number = self._pair(shard)
        return self._splits[domain].is_here(number)
