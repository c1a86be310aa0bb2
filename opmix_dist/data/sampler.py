"""Which sample comes next: a mixture drawn to within one sample, in an order that nothing else decides.

Two independent decisions per global batch:

- how many samples of each domain: :func:`allocate`, earliest deadline first;
- which ones: per domain a cursor into :class:`_Order`, a seeded permutation without replacement.

D domains, B samples in a global batch. Only IEEE-exact operations touch the allocation (no ``np.sum``, whose
order of additions depends on the processor), so ranks on different machines agree to the last bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed

log = logging.getLogger(__name__)

STATE_VERSION = 1
SHUFFLE_BLOCK = 65_536
MAX_UNPACKED_BYTES = 64 << 20
# Rounding in lags and targets; far below one sample, far above the error of a step of 1e6 samples.
TOLERANCE = 1e-9
# What a state keeps of a domain.
_ROW = np.dtype([("drawn", "<i8"), ("lag", "<f8"), ("settled", "<f8"), ("fingerprint", "<u4")])


@dataclass(frozen=True)
class Position:
    """Where a sampler stands. Its arrays are replaced, never written to, so that keeping one is free."""

    batches: int
    drawn: np.ndarray  # int64 [D], samples drawn so far; also the cursor into the domain's order
    lag: np.ndarray  # float64 [D], target + settled - drawn, in [-1, 1]
    settled: np.ndarray  # float64 [D], samples of target moved between domains; sums to 0


def allocate(lag: np.ndarray, weights: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a batch over domains so that every domain stays within one sample of its cumulative target.

    Earliest deadline first for the chairman assignment problem (Tijdeman 1980); a unit's window is that of
    Pfair scheduling (Baruah et al. 1996): it may be drawn once the target passes the unit before it, and
    must be by the batch in which the target completes it. With constant weights, from lag 0, |lag| < 1 for
    any weights. When weights change, the mandatory units can exceed the batch, and then no rule that does
    not know the future keeps the bound (Ajtai et al. 1998, Fairness in scheduling): units with the smallest
    fraction are deferred and the rest is settled, see :func:`settle`.

    Args:
        lag: target less drawn before the batch, [D], in [-1, 1].
        weights: [D], sums to 1.
        batch_size: B.

    Returns:
        Samples per domain, int64 [D], summing to B; and target less drawn after them, [D], in (-1, 1) unless
        units were deferred, then in (-1, 2).
    """
    # a sum of 1e-16, not exactly 0, would build up over a long run: the batch's target takes it back
    owed = lag + (batch_size - math.fsum(lag)) * weights
    counts = np.maximum(0, np.floor(owed + TOLERANCE)).astype(np.int64)
    fraction = owed - counts
    optional = batch_size - int(counts.sum())
    if optional > 0:
        counts[_earliest_deadlines(fraction, weights, optional)] += 1
    elif optional < 0:
        # lag <= 1 makes at least as many domains with a mandatory unit as there are units too many
        mandatory = np.flatnonzero(counts > 0)
        counts[mandatory[np.argsort(fraction[mandatory], kind="stable")[:-optional]]] -= 1
    return counts, owed - counts


def _earliest_deadlines(fraction: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` domains whose begun unit is completed by the target soonest; ties by domain order."""
    begun = np.flatnonzero(fraction > TOLERANCE)
    with np.errstate(divide="ignore", over="ignore"):  # weight 0: never completed, last
        deadline = (1 - fraction[begun]) / weights[begun]
    return begun[np.argsort(deadline, kind="stable")[:count]]


def settle(lag: np.ndarray) -> np.ndarray:
    """The lags [D] at most 1 and summing to 0 that are nearest to ``lag`` in total change.

    What is cut off above 1, or is missing from the sum, is taken from the other side in proportion.
    """
    settled = np.minimum(lag, 1.0)
    excess = math.fsum(settled)
    side = settled > 0 if excess > 0 else settled < 0
    if side.any():
        settled[side] *= 1 - excess / math.fsum(settled[side])
    return settled


class _Order:
    """A domain's endless order: each epoch a permutation that reads few shards at a time.

    An epoch shuffles the shards, groups consecutive ones into blocks of at least ``block_size`` samples,
    and shuffles the samples of a block. Only the current block's permutation is held, so memory and
    start-up grow with the number of shards. Depends on nothing but the seed, the name and the shard sizes.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int], *, seed: int, block_size: int) -> None:
        self.sizes = np.array(shard_sizes, dtype=np.int64)
        if self.sizes.ndim != 1 or (self.sizes < 0).any() or self.sizes.sum() == 0:
            raise UserError(f"domain {name} has no samples: prepare it again or leave it out")
        self.total = int(self.sizes.sum())
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.fingerprint = int.from_bytes(hashlib.sha256(self.sizes.astype("<i8").tobytes()).digest()[:4])
        self.seed = derive_seed(seed, "samples", name)
        self.block_size = block_size
        self._epoch = self._block = -1

    def take(self, cursor: int, count: int) -> np.ndarray:
        """Sample ids [count] at positions ``cursor`` and following, over blocks and epochs."""
        parts = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, offset = divmod(cursor, self.total)
            part = self._rest_of_block(epoch, offset)[:count]
            parts.append(self._sample_ids(part))
            cursor, count = cursor + len(part), count - len(part)
        return np.concatenate(parts)

    def _rest_of_block(self, epoch: int, offset: int) -> np.ndarray:
        """From ``offset`` in the epoch to the end of its block: positions in the order of shuffled shards."""
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        block = int(np.searchsorted(self._block_ends, offset, side="right"))
        first = int(self._block_ends[block - 1]) if block else 0
        if block != self._block:
            size = int(self._block_ends[block]) - first
            rng = np.random.default_rng([self.seed, epoch, 1 + block])
            self._permutation = rng.permutation(size).astype(np.min_scalar_type(size - 1))
            self._block = block
        return first + self._permutation[offset - first :].astype(np.int64)

    def _begin_epoch(self, epoch: int) -> None:
        self._shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        self._shard_ends = np.cumsum(self.sizes[self._shards])
        self._block_ends = _block_ends(self._shard_ends, self.block_size)
        self._epoch, self._block = epoch, -1

    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self._shard_ends, positions, side="right")
        shard = self._shards[place]
        return self.starts[shard] + positions - (self._shard_ends[place] - self.sizes[shard])


def _block_ends(shard_ends: np.ndarray, block_size: int) -> np.ndarray:
    """Cumulative ends of blocks, each the fewest consecutive shards with ``block_size`` samples or more."""
    ends: list[int] = [0]
    while ends[-1] < shard_ends[-1]:
        last = np.searchsorted(shard_ends, ends[-1] + block_size, side="left")
        ends.append(int(shard_ends[min(int(last), len(shard_ends) - 1)]))
    return np.array(ends[1:], dtype=np.int64)


class MixtureSampler:
    """Draws global batches from domains in given proportions; see the module's text.

    Args:
        domains: name to samples per shard, in the order that domain indices follow.
        weights: name to weight; what is not named weighs 0.
        global_batch_size: B.
        seed: not negative.
        max_epochs: name to the epochs after which drawing from the domain is an error.
        shuffle_block: samples that are shuffled together, at least.

    Raises:
        UserError: a domain without samples, an unknown domain, or weights that are no mixture.
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[int] | np.ndarray],
        weights: Mapping[str, float],
        *,
        global_batch_size: int,
        seed: int,
        max_epochs: Mapping[str, float] | None = None,
        shuffle_block: int = SHUFFLE_BLOCK,
    ) -> None:
        if global_batch_size < 1 or seed < 0:
            raise UserError(f"global_batch_size is {global_batch_size} and seed {seed}: give >= 1 and >= 0")
        self.names = tuple(domains)
        self.global_batch_size, self.seed = global_batch_size, seed
        self._orders = [
            _Order(name, list(sizes), seed=seed, block_size=shuffle_block) for name, sizes in domains.items()
        ]
        self._totals = np.array([order.total for order in self._orders], dtype=np.int64)
        self._caps = self._sample_caps(max_epochs or {})
        self._absent: dict[str, np.ndarray] = {}  # rows of a loaded state's other domains: they may come back
        self._told: set[str] = set()
        zeros = np.zeros(len(self.names))
        self.position = Position(0, zeros.astype(np.int64), zeros, zeros)
        self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw the next batch, and those after it, in these proportions.

        Raises:
            UserError: an unknown domain, a weight that is negative or not finite, or a sum that is not 1
                within 1e-6. The weights stay as they were.
        """
        self._require_known("weights", weights)
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"weights: {name} weighs {weight}: give a finite number >= 0")
        total = math.fsum(weights.values())
        if abs(total - 1) > 1e-6:
            raise UserError(f"weights sum to {total:.9g}, not 1: divide each by the sum")
        self.weights = np.array([weights.get(name, 0.0) / total for name in self.names], dtype=np.float64)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain index [B] and sample id [B], int64, of the next global batch, in its order.

        Raises:
            UserError: a domain would pass its ``max_epochs``; the position stays before this batch.
        """
        counts = self._advance()
        cursors = self.position.drawn - counts
        drawn = np.flatnonzero(counts)
        ids = [self._orders[i].take(int(cursors[i]), int(counts[i])) for i in drawn]
        rng = np.random.default_rng([derive_seed(self.seed, "batch"), self.position.batches - 1])
        order = rng.permutation(self.global_batch_size)
        return np.repeat(np.arange(len(counts)), counts)[order], np.concatenate(ids)[order]

    def epochs(self, position: Position | None = None) -> np.ndarray:
        """How often each domain was gone through at ``position`` (default: now), float64 [D]."""
        return (position or self.position).drawn / self._totals

    def state_dict(self, position: Position | None = None) -> dict[str, Any]:
        """JSON-able state at ``position`` (default: now), all that a resume needs but the weights.

        Weights are left to the caller, whose mixture schedule has them. Columns are packed, see
        :func:`_pack`: about 25 bytes a domain.
        """
        position = position or self.position
        rows = self._fresh_rows()
        for column in ("drawn", "lag", "settled"):
            rows[column] = getattr(position, column)
        rows = np.append(rows, np.array([*self._absent.values()], dtype=_ROW))
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "batches": position.batches,
            "names": _pack(json.dumps([*self.names, *self._absent]).encode()),
            **{column: _pack(rows[column].tobytes()) for column in _ROW.names or ()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; any world size, any order of domains.

        A domain that the state does not know starts at its first sample. One that only the state knows is
        kept in later states with its cursor; what it was still owed, or had too much, is settled.

        Raises:
            UserError: another version or seed, a damaged state, or a domain whose shards have changed.
        """
        table = _read_table(state, self.seed)
        rows = self._fresh_rows()
        for i, name in enumerate(self.names):
            row = table.pop(name, rows[i])
            if row["fingerprint"] != rows[i]["fingerprint"]:
                raise UserError(
                    f"domain {name} has other shards than when the sampler's state was saved: restore them, "
                    f"or prepare the new data under another name"
                )
            rows[i] = row
        lag = rows["lag"].copy()
        kept = settle(lag) if any(row["lag"] for row in table.values()) else lag
        for row in table.values():
            row["lag"] = 0
        self._absent = table
        self.position = Position(state["batches"], rows["drawn"].copy(), kept, rows["settled"] + (kept - lag))

    def _fresh_rows(self) -> np.ndarray:
        rows = np.zeros(len(self.names), dtype=_ROW)
        rows["fingerprint"] = [order.fingerprint for order in self._orders]
        return rows

    def _advance(self) -> np.ndarray:
        """Samples per domain [D] of the next batch; moves the position behind it."""
        before = self.position
        counts, lag = allocate(before.lag, self.weights, self.global_batch_size)
        drawn = before.drawn + counts
        self._require_within_caps(drawn)
        kept = settle(lag) if (lag > 1).any() else lag
        self._tell_repeats(drawn)
        self.position = Position(before.batches + 1, drawn, kept, before.settled + (kept - lag))
        return counts

    def _sample_caps(self, max_epochs: Mapping[str, float]) -> np.ndarray:
        self._require_known("max_epochs", max_epochs)
        epochs = np.array([max_epochs.get(name, math.inf) for name in self.names], dtype=np.float64)
        for name, value in zip(self.names, epochs, strict=True):
            if not value > 0:
                raise UserError(f"max_epochs: {name} is {value}: give a number > 0, or weight 0")
        return np.floor(epochs * self._totals + TOLERANCE)

    def _require_known(self, key: str, given: Mapping[str, float]) -> None:
        known = set(self.names)
        for name in given:
            if name not in known:
                raise UserError(f"{key}: {name!r} is none of the {len(known)} domains: mend it or prepare it")

    def _require_within_caps(self, drawn: np.ndarray) -> None:
        over = np.flatnonzero(drawn > self._caps)
        if len(over):
            name, cap = self.names[over[0]], int(self._caps[over[0]])
            raise UserError(
                f"domain {name} is used up: max_epochs allows {cap} samples of its {self._totals[over[0]]}; "
                f"lower its weight or raise its max_epochs"
            )

    def _tell_repeats(self, drawn: np.ndarray) -> None:
        """Once per domain, in the batch that begins its second epoch."""
        begins = (drawn > self._totals) & (self.position.drawn <= self._totals)
        for name in (self.names[i] for i in np.flatnonzero(begins)):
            if name not in self._told:
                self._told.add(name)
                log.warning("domain %s begins to repeat: all its samples were drawn once", name)


def _read_table(state: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Name to row (of dtype ``_ROW``) of a checked state."""
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"sampler state has version {state.get('version')}; this version reads {STATE_VERSION}"
        )
    if state.get("seed") != seed:
        raise UserError(
            f"sampler state was made with seed {state.get('seed')}, this run has {seed}: use that"
        )
    try:
        names = json.loads(_unpack(state["names"]))
        rows = np.zeros(len(names), dtype=_ROW)
        for column in _ROW.names or ():
            rows[column] = np.frombuffer(_unpack(state[column]), dtype=_ROW[column])
        sound = (rows["drawn"] >= 0).all() and (np.abs(rows["lag"]) <= 1 + TOLERANCE).all()
        sound &= np.isfinite(rows["settled"]).all() and isinstance(state["batches"], int)
        if not sound or state["batches"] < 0 or len({*names}) < len(names):
            raise ValueError
    except (KeyError, TypeError, ValueError, zlib.error):
        raise UserError("sampler state is damaged: resume from another checkpoint") from None
    return {name: rows[i : i + 1].copy()[0] for i, name in enumerate(names)}


def _pack(data: bytes) -> str:
    """Text that JSON can hold; columns compress well, and lags keep all 53 bits in 11 characters."""
    return base64.b64encode(zlib.compress(data)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
