"""In which order each domain's samples are drawn: endless, shuffled, shard by shard, for all domains at once.

Each epoch of a domain goes over all its samples once: the shards are shuffled, consecutive ones grouped into
blocks of at least ``shuffle_block`` samples, and the samples of a block shuffled: few shards are needed at a
time. A domain's order depends on nothing but the seed, its name, its shard sizes and ``shuffle_block``.

No permutation of samples is stored: :func:`permuted` says where one place of a block goes. What is stored are
the current epoch's shards and blocks of every domain, one after the other in flat arrays, so that all rows of
a batch are found by the same few array operations, whatever the number of domains. Memory and start-up grow
with shards, not with samples. Integers modulo 2^64 are the same on every machine, and nothing else is used.

D domains, S shards that are not empty, P pairs of a domain and an epoch with S' shards in all, N rows.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed

ShardSizes = Sequence[int] | np.ndarray

# The golden ratio's odd 64-bit fraction: multiples of it are spread evenly, as SplitMix64 uses them.
_STEP = 0x9E37_79B9_7F4A_7C15
# Chi-square over 1,000,000 keys of where three of 17 or 25 places go: biased with 8 rounds, not with 10.
_ROUNDS = 12
_STEPS = np.array([(number + 1) * _STEP % 2**64 for number in range(_ROUNDS)], dtype=np.uint64)
# Up to this many places are sorted by hashes instead: a Feistel network of 3 x 3 is biased after 20 rounds.
_FEW = 16


class DomainOrders:
    """The orders of D domains; see the module's text.

    Holds, between calls, where each domain's epoch last asked for has its shards: another epoch of a domain
    is computed anew, in time that grows with the domain's shards.

    Args:
        domains: name to samples per shard, in the order that domain indices follow.
        seed: not negative.
        shuffle_block: samples that are shuffled together, at least.

    Raises:
        UserError: a domain without samples, or with a shard of less than none.
    """

    def __init__(self, domains: Mapping[str, ShardSizes], *, seed: int, shuffle_block: int) -> None:
        if not domains:
            raise UserError("there is no domain to draw from: prepare one")
        self.shard_sizes = {name: _checked_sizes(name, sizes) for name, sizes in domains.items()}
        self.shuffle_block = shuffle_block
        self.totals = _ints(sizes.sum() for sizes in self.shard_sizes.values())  # [D], samples
        self.fingerprints = _ints(map(_fingerprint, self.shard_sizes.values())).astype(np.uint32)  # [D]
        filled = [sizes[sizes > 0] for sizes in self.shard_sizes.values()]
        self._keys = _ints(derive_seed(seed, "samples", name) for name in domains).astype(np.uint64)  # [D]
        self._first_slots = _offsets(_ints(map(len, filled)))  # [D + 1]
        self._sizes = np.concatenate(filled)  # [S]
        ends = np.cumsum(self._sizes)
        self._starts = ends - self._sizes - np.repeat(_offsets(self.totals)[:-1], np.diff(self._first_slots))
        self._epochs = np.full(len(self.totals), -1, dtype=np.int64)  # [D], that is held; -1 for none
        self._held = _Epochs.unknown(self._first_slots, ends)

    def sample_ids(self, domains: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Sample ids, int64 [N], at ``positions`` of the endless orders of ``domains``.

        Args:
            domains: indices, int64 [N], ascending.
            positions: int64 [N], ascending within a domain; any number of epochs.
        """
        epochs, offsets = np.divmod(positions, self.totals[domains])
        held = epochs == self._epochs[domains]
        if held.all():
            return self._held.find(domains, offsets)
        ids = np.empty_like(positions)
        ids[held] = self._held.find(domains[held], offsets[held])
        ids[~held] = self._begin(domains[~held], epochs[~held], offsets[~held])
        return ids

    def copy(self) -> DomainOrders:
        """Orders that go their own way from here."""
        other = copy.copy(self)
        other._epochs, other._held = self._epochs.copy(), self._held.copy()
        return other

    def _begin(self, domains: np.ndarray, epochs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Sample ids [N] in epochs that are not held; of each domain, the last of them is held then."""
        is_first = (np.diff(domains, prepend=-1) != 0) | (np.diff(epochs, prepend=-1) != 0)
        pair_domains, pair_epochs = domains[is_first], epochs[is_first]
        begun = self._shuffled(pair_domains, pair_epochs)
        last = np.flatnonzero(np.append(np.diff(pair_domains) != 0, True))
        self._held.take_over(pair_domains[last], begun, last)
        self._epochs[pair_domains[last]] = pair_epochs[last]
        return begun.find(np.cumsum(is_first) - 1, offsets)

    def _shuffled(self, domains: np.ndarray, epochs: np.ndarray) -> _Epochs:
        """The shards and blocks of P epochs: domain indices [P] and numbers [P]."""
        first_slots = _offsets(np.diff(self._first_slots)[domains])
        pairs = np.repeat(np.arange(len(domains)), np.diff(first_slots))  # [S'], of each slot
        shards = np.arange(len(pairs)) - first_slots[pairs]  # number within the domain
        keys = _mixed(self._keys[domains] + _stream(epochs))
        # sorting by a hash shuffles any number of epochs at once; equal hashes would keep their order
        order = np.lexsort((_mixed(keys[pairs] + _stream(shards)), pairs))
        shards = self._first_slots[domains][pairs] + shards[order]
        ends = np.cumsum(self._sizes[shards])
        firsts, sizes = _blocks(ends - self._sizes[shards], ends, first_slots[pairs + 1], self.shuffle_block)
        bases = _offsets(self.totals[domains])[:-1]
        return _Epochs(
            first_slots=first_slots,
            bases=bases,
            ends=ends,
            shifts=self._starts[shards] - (ends - self._sizes[shards]),
            block_firsts=firsts,
            block_sizes=sizes,
            # the complement's stream is another one than that of the shards
            block_keys=_mixed(~keys[pairs] + _stream(firsts - bases[pairs])),
        )


@dataclass(frozen=True)
class _Epochs:
    """One epoch each of P domains. Places count on from one pair to the next; a slot is a shuffled shard."""

    first_slots: np.ndarray  # int64 [P + 1]
    bases: np.ndarray  # int64 [P], places before each pair
    ends: np.ndarray  # int64 [S'], place behind each slot, ascending
    shifts: np.ndarray  # int64 [S'], sample id less place
    block_firsts: np.ndarray  # int64 [S'], first place of the slot's block
    block_sizes: np.ndarray  # int64 [S'], samples of the slot's block
    block_keys: np.ndarray  # uint64 [S'], of the slot's block

    @classmethod
    def unknown(cls, first_slots: np.ndarray, ends: np.ndarray) -> _Epochs:
        """Room for an epoch of each domain; ``ends`` [S] of shards in their own order, to search among."""
        return cls(
            first_slots=first_slots,
            bases=np.append(0, ends)[first_slots[:-1]],
            ends=ends,
            shifts=np.zeros_like(ends),
            block_firsts=np.zeros_like(ends),
            block_sizes=np.zeros_like(ends),
            block_keys=np.zeros(len(ends), dtype=np.uint64),
        )

    def copy(self) -> _Epochs:
        return replace(self, **{field.name: getattr(self, field.name).copy() for field in fields(self)})

    def find(self, pairs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Sample ids [N] at offsets [N] into the epochs of ``pairs`` [N]."""
        places = self.bases[pairs] + offsets
        slots = np.searchsorted(self.ends, places, side="right")
        firsts = self.block_firsts[slots]
        places = firsts + permuted(places - firsts, self.block_sizes[slots], self.block_keys[slots])
        return places + self.shifts[np.searchsorted(self.ends, places, side="right")]

    def take_over(self, pairs: np.ndarray, other: _Epochs, others: np.ndarray) -> None:
        """Take over ``other``'s pairs ``others`` as this one's ``pairs``, [P'] each."""
        lengths = np.diff(self.first_slots)[pairs]
        within = np.arange(lengths.sum()) - np.repeat(_offsets(lengths)[:-1], lengths)
        to = np.repeat(self.first_slots[pairs], lengths) + within
        source = np.repeat(other.first_slots[others], lengths) + within
        moved = np.repeat(self.bases[pairs] - other.bases[others], lengths)
        self.ends[to] = other.ends[source] + moved
        self.shifts[to] = other.shifts[source] - moved
        self.block_firsts[to] = other.block_firsts[source] + moved
        self.block_sizes[to] = other.block_sizes[source]
        self.block_keys[to] = other.block_keys[source]


def permuted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of [0, size) chosen by the key sends a place, row by row; int64 [N].

    Args:
        places: int64 [N], in [0, size).
        sizes: int64 [N], at least 1.
        keys: uint64 [N].
    """
    few = sizes <= _FEW
    if not few.any():
        return _walked(places, sizes, keys)
    sent = np.empty_like(places)
    sent[few] = _sorted(places[few], sizes[few], keys[few])
    sent[~few] = _walked(places[~few], sizes[~few], keys[~few])
    return sent


def _sorted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """:func:`permuted` for at most ``_FEW`` places: the order of as many hashes."""
    numbers = np.arange(_FEW)
    hashes = _mixed(keys[:, None] + _stream(numbers))  # [N, _FEW]
    hashes[numbers >= sizes[:, None]] = np.uint64(2**64 - 1)  # and a stable sort leaves them last
    return np.argsort(hashes, axis=1, kind="stable")[np.arange(len(places)), places]


def _walked(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """:func:`permuted` for any number of places.

    A Feistel network that adds instead of xor (Black and Rogaway 2002, Ciphers with arbitrary finite
    domains): a place is a pair in Z_a x Z_b with a b just >= size, and the few places that leave [0, size)
    walk on along their cycle until they are back.
    """
    size = sizes.astype(np.uint64)
    # any a would do: the root's rounding cannot make a b < size
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    b = (size + a - np.uint64(1)) // a
    place = _feistel(places.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(place >= size)
    while len(outside):
        place[outside] = _feistel(place[outside], a[outside], b[outside], keys[outside])
        outside = outside[place[outside] >= size[outside]]
    return place.astype(np.int64)


def _feistel(place: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass over Z_a x Z_b; all uint64 [N]."""
    left, right = place // b, place % b
    for number in range(0, _ROUNDS, 2):
        left = _added(left, right, a, keys + _STEPS[number])
        right = _added(right, left, b, keys + _STEPS[number + 1])
    return left * b + right


def _added(to: np.ndarray, value: np.ndarray, modulus: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``to`` plus a hash of ``value``, modulo ``modulus`` < 2^32; all uint64 [N]."""
    hashed = _mixed(keys ^ value) >> np.uint64(32)
    total = to + (hashed * modulus >> np.uint64(32))
    return total - modulus * (total >= modulus)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): each output bit hangs on every input bit. [N]"""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ values >> np.uint64(31)


def _stream(numbers: np.ndarray) -> np.ndarray:
    """What is added to a key before mixing, for the elements with these numbers >= 0, uint64 [N]."""
    return (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP)


def _blocks(
    starts: np.ndarray, ends: np.ndarray, limits: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """First place and samples, [S'] each, of the block that each slot is in.

    A block is the fewest consecutive slots with ``block_size`` samples or more, or all that are left before
    the slot ``limits`` [S'] at which the epoch's slots end.
    """
    block_size = min(block_size, int(ends[-1]))  # starts + block_size cannot overflow then
    following = np.minimum(np.searchsorted(ends, starts + block_size, side="left") + 1, limits)
    heads, after, slot = [], following.tolist(), 0
    while slot < len(after):
        heads.append(slot)
        slot = after[slot]
    slots = np.diff([*heads, len(after)])
    firsts = starts[heads]
    return np.repeat(firsts, slots), np.repeat(ends[following[heads] - 1] - firsts, slots)


def _checked_sizes(name: str, sizes: ShardSizes) -> np.ndarray:
    found = np.array(sizes, dtype=np.int64)
    if found.ndim != 1 or (found < 0).any() or found.sum() == 0:
        raise UserError(f"domain {name} has no samples: prepare it again or leave it out")
    return found


def _fingerprint(sizes: np.ndarray) -> int:
    """32 bits that tell other shards."""
    return int.from_bytes(hashlib.sha256(sizes.astype("<i8").tobytes()).digest()[:4])


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """Where each of the pieces with these lengths [P] begins, and where the last ends, int64 [P + 1]."""
    return np.append(0, np.cumsum(counts))
