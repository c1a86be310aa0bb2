"""Which shards the coming batches need, in the order in which they need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError

HORIZON_SAMPLES = 65_536
BATCHES_PER_STEP = 8


class Lookahead:
    """A copy of the sampler that runs in front of the loader's.

    It stops where ``ahead`` shards that are not on this machine lie before the loader, or at a horizon of
    samples. Each step looks a few batches further only, so that no step takes long.

    Args:
        sampler: a copy of its own, at the loader's position.
        splits: by domain index.
        rows: of each global batch that this rank reads.
        ahead: missing shards to know of in advance.
        tell: is called with the (domain, shard) pairs from the next batch on, ordered by first need, when
            they have changed.
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
        self._last_need: dict[
            int, int
        ] = {}  # shard to the last batch known to need it; ordered by first need
        self._missing: set[int] = set()
        self._ended = False

    def step(self, next_batch: int) -> None:
        """Forget what only batches before ``next_batch`` need, and look further ahead."""
        gone = [shard for shard, last in self._last_need.items() if last < next_batch]
        for shard in gone:
            del self._last_need[shard]
            self._missing.discard(shard)
        self._missing = {shard for shard in self._missing if not self._is_here(shard)}
        found = False
        for _ in range(BATCHES_PER_STEP):
            enough = len(self._missing) >= self._ahead
            if enough or self._ended or self._sampler.position.batches >= next_batch + self._horizon:
                break
            found |= self._look()
        if gone or found:
            self._tell([self._pair(shard) for shard in self._last_need])

    def _look(self) -> bool:
        """One batch further; whether it needs a shard that no batch before it does."""
        number = self._sampler.position.batches
        try:
            domains, samples = self._sampler.draw()
        except UserError:  # a domain is used up: the loader tells when it gets there
            self._ended = True
            return False
        domains, samples = domains[self._rows], samples[self._rows]
        needed = np.searchsorted(self._ends, self._first_sample[domains] + samples, side="right")
        known = len(self._last_need)
        for shard in dict.fromkeys(needed.tolist()):
            if shard not in self._last_need and not self._is_here(shard):
                self._missing.add(shard)
            self._last_need[shard] = number
        return len(self._last_need) > known

    def _pair(self, shard: int) -> tuple[int, int]:
        domain = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return domain, shard - int(self._first_shard[domain])

    def _is_here(self, shard: int) -> bool:
        domain, number = self._pair(shard)
        return self._splits[domain].is_here(number)
