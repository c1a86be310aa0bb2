"""A replay store: the part of a domain's training samples that a later stage still reads.

The part is chosen by a seed and spread over all shards in proportion to their sizes, so that it stands for
the whole domain. To whoever draws samples it is a domain of its own size: orders, epochs and caps count over
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opmix_dist.data.order import permuted
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore


class ReplaySplit(ShardedSplit):
    """``samples`` of a split's samples, numbered from 0 in the order of the shards.

    Args:
        samples: at least 1; at most as many as there are.
        seed: of this domain's choice.
    """

    def __init__(
        self, local: Path, store: ShardStore | None = None, *, verify: bool = False, samples: int, seed: int
    ) -> None:
        super().__init__(local, store, verify=verify)
        self.samples, self.seed = min(samples, self.stored_samples), seed
        rng = np.random.default_rng(seed)
        start = int(rng.integers(self.stored_samples))
        self._keys = rng.integers(2**64, size=len(self.files), dtype=np.uint64)
        self._all_sizes = self.shard_sizes
        self.shard_sizes = kept_of_shards(self._all_sizes, self.samples, start)
        self._ends = np.cumsum(self.shard_sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.local, self.store, self.verify, self.samples, self.seed)

    def _find(self, sample_id: int) -> tuple[int, int]:
        """Of a shard's samples, the first places of a permutation of them are kept."""
        shard, place = super()._find(sample_id)
        rows = permuted(np.array([place]), self._all_sizes[[shard]], self._keys[[shard]])
        return shard, int(rows[0])


def kept_of_shards(sizes: np.ndarray, samples: int, start: int) -> np.ndarray:
    """How many samples are kept of each shard, int64 [S]: its share of ``samples``, rounded up or down.

    Systematic sampling: every (N / samples)th of all N samples counts, from a random one on, so that each
    shard gets its share on average, also where there are fewer samples than shards.

    Args:
        sizes: samples of each shard, int64 [S], N in all.
        samples: at most N.
        start: drawn from [0, N).
    """
    total = int(sizes.sum())
    marks = [start // total]  # Python's integers: N times samples may need more than 64 bits
    marks += [(int(end) * samples + start) // total for end in np.cumsum(sizes)]
    return np.diff(np.array(marks, dtype=np.int64))


def _reopened(local: Path, store: ShardStore | None, verify: bool, samples: int, seed: int) -> ReplaySplit:
    return ReplaySplit(local, store, verify=verify, samples=samples, seed=seed)
