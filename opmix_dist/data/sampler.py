"""Which sample comes next: a mixture drawn to within one sample, in an order that nothing else decides.

Two independent decisions per global batch:

- how many samples of each domain: :mod:`opmix_dist.data.allocation`, within :mod:`opmix_dist.data.caps`;
- which ones: per domain a cursor into its endless order, see :mod:`opmix_dist.data.order`.

D domains, B samples in a global batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opmix_dist.data.allocation import allocate, exact_sum, settle
from opmix_dist.data.caps import EpochCaps, OnExhausted, require_known
from opmix_dist.data.order import DomainOrders, ShardSizes
from opmix_dist.data.sampler_state import ROW, name_hashes, read_state, write_state
from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed

__all__ = ["SHUFFLE_BLOCK", "MixtureSampler", "OnExhausted", "Position", "allocate", "settle"]

SHUFFLE_BLOCK = 65_536


@dataclass(frozen=True)
class Position:
    """Where a sampler stands. Its arrays are replaced, never written to, so that keeping one is free."""

    batches: int
    drawn: np.ndarray  # int64 [D], samples drawn so far; also the cursor into the domain's order
    lag: np.ndarray  # float64 [D], target + settled - drawn, in [-1, 1]
    # float64 [D], samples of target moved between domains since construction or the last load; sums to 0
    settled: np.ndarray


class MixtureSampler:
    """Draws global batches from domains in given proportions; see the module's text.

    Args:
        domains: name to samples per shard, in the order that domain indices follow; nothing else depends on
            that order.
        weights: name to weight; what is not named weighs 0.
        global_batch_size: B. May differ from that of a state that is loaded.
        seed: not negative.
        max_epochs: name to the epochs after which a domain is exhausted.
        shuffle_block: samples that are shuffled together, at least.
        on_exhausted: what a batch does that would take more of a domain than ``max_epochs`` allows: ``stop``
            raises; ``renormalize`` leaves the domain out and draws the others in proportion to their weights.

    Raises:
        UserError: a domain without samples, an unknown domain, or weights that are no mixture.
    """

    def __init__(
        self,
        domains: Mapping[str, ShardSizes],
        weights: Mapping[str, float],
        *,
        global_batch_size: int,
        seed: int,
        max_epochs: Mapping[str, float] | None = None,
        shuffle_block: int = SHUFFLE_BLOCK,
        on_exhausted: OnExhausted = "stop",
    ) -> None:
        if global_batch_size < 1 or seed < 0 or shuffle_block < 1:
            raise UserError(
                f"global_batch_size is {global_batch_size}, seed {seed} and data.shuffle_block "
                f"{shuffle_block}: give >= 1, >= 0 and >= 1"
            )
        self.global_batch_size, self.seed = global_batch_size, seed
        self._batch_seed = derive_seed(seed, "batch")
        orders = DomainOrders(domains, seed=seed, shuffle_block=shuffle_block)
        self._use(orders, _fresh_rows(orders))
        self._caps = EpochCaps(self.names, orders.totals, max_epochs or {}, on_exhausted=on_exhausted)
        self._absent = np.empty(0, dtype=ROW)  # rows of a loaded state's other domains: they may come back
        zeros = np.zeros(len(self.names))
        self.position = Position(0, zeros.astype(np.int64), zeros, zeros)
        self.set_weights(weights)
        self._effective = self.weights

    @property
    def position(self) -> Position:
        """Where the next batch is drawn; may be set back to what it was, while the domains are the same."""
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        self._position = self._own(position)

    @property
    def effective_weights(self) -> np.ndarray:
        """The weights of the last batch drawn, float64 [D]: without the domains that it had to leave out."""
        return self._effective

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw the next batch, and those after it, in these proportions.

        Raises:
            UserError: an unknown domain, a weight that is negative or not finite, or a sum that is not 1
                within 1e-6. The weights stay as they were.
        """
        require_known("weights", weights, self.names)
        given = np.array([weights.get(name, 0.0) for name in self.names], dtype=np.float64)
        for i in np.flatnonzero(~(np.isfinite(given) & (given >= 0)))[:1]:
            raise UserError(f"weights: {self.names[i]} weighs {given[i]}: give a finite number >= 0")
        total = exact_sum(given)
        if abs(total - 1) > 1e-6:
            raise UserError(f"weights sum to {total:.9g}, not 1: divide each by the sum")
        self.weights = given / total

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain index [B] and sample id [B], int64, of the next global batch, in its order.

        Raises:
            UserError: a domain would pass its ``max_epochs``, or all that have a weight would; the position
                stays before this batch.
        """
        counts = self._advance()
        domains = np.repeat(np.arange(len(counts)), counts)
        # row r is the (r - rows of earlier domains)th of its domain in this batch
        cursors = (self.position.drawn - np.cumsum(counts))[domains] + np.arange(self.global_batch_size)
        rng = np.random.default_rng([self._batch_seed, self.position.batches - 1])
        order = np.argsort(self._ranks[domains], kind="stable")[rng.permutation(self.global_batch_size)]
        return domains[order], self._orders.sample_ids(domains, cursors)[order]

    def epochs(self, position: Position | None = None) -> np.ndarray:
        """How often each domain was gone through at ``position`` (default: now), float64 [D]."""
        return self._own(position or self.position).drawn / self._orders.totals

    def add_domains(
        self, domains: Mapping[str, ShardSizes], max_epochs: Mapping[str, float] | None = None
    ) -> None:
        """Append domains, which weigh 0 until :meth:`set_weights` names them; the indices of others stay.

        One that a loaded state knew goes on at its cursor. Positions from before do not fit any more.

        Args:
            domains: name to samples per shard.
            max_epochs: caps of domains that join here.

        Raises:
            UserError: a domain that is there already, has no samples, or has other shards than a loaded state
                knew, or a cap for a domain that does not join. Nothing changes then.
        """
        for name in set(self.names).intersection(domains):
            raise UserError(
                f"domain {name} is there already: give it a weight, or prepare the new data under another "
                "name"
            )
        orders = DomainOrders(
            {**self._orders.shard_sizes, **domains}, seed=self.seed, shuffle_block=self._orders.shuffle_block
        )
        joined = len(self.names)
        caps = self._caps.extended(tuple(domains), orders.totals[joined:], max_epochs or {})
        fresh = _fresh_rows(orders)
        rows, absent = _continued(tuple(orders.shard_sizes), fresh, self._absent)
        self._use(orders, fresh)
        self._absent, self._caps = absent, caps
        zeros = np.zeros(len(domains))
        self.weights, self._effective = np.append(self.weights, zeros), np.append(self._effective, zeros)
        before = self.position
        self.position = Position(
            before.batches,
            np.append(before.drawn, rows["drawn"][joined:]),
            np.append(before.lag, zeros),
            np.append(before.settled, zeros),
        )

    def copy(self) -> MixtureSampler:
        """A sampler that goes its own way from here, and warns of nothing: to look ahead with."""
        other = copy.copy(self)
        other._orders, other._caps = self._orders.copy(), self._caps.quiet()
        return other

    def state_dict(self, position: Position | None = None) -> dict[str, Any]:
        """JSON-able state at ``position`` (default: now), all that a resume needs but the weights.

        Weights are left to the caller, whose mixture schedule has them. At most 30 characters a domain,
        see :mod:`opmix_dist.data.sampler_state`.
        """
        position = self._own(position or self.position)
        rows = self._fresh.copy()
        rows["drawn"], rows["lag"] = position.drawn, position.lag
        return write_state(
            np.append(rows, self._absent),
            seed=self.seed,
            shuffle_block=self._orders.shuffle_block,
            batches=position.batches,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; any world size, batch size and order of domains.

        A domain that the state does not know starts at its first sample. One that only the state knows is
        kept in later states with its cursor; what it was still owed, or had too much, is settled.

        Raises:
            UserError: another version, seed or shuffle_block, a damaged state, or a domain whose shards have
                changed.
        """
        batches, saved = read_state(state, seed=self.seed, shuffle_block=self._orders.shuffle_block)
        rows, self._absent = _continued(self.names, self._fresh, saved)
        lag = rows["lag"].copy()
        kept = settle(lag) if self._absent["lag"].any() else lag
        self._absent["lag"] = 0
        self.position = Position(batches, rows["drawn"].copy(), kept, kept - lag)
        self._effective = self.weights

    def _use(self, orders: DomainOrders, fresh: np.ndarray) -> None:
        self._orders, self.names = orders, tuple(orders.shard_sizes)
        self._by_name = np.argsort(self.names)  # [D]: what depends on an order of domains takes this one
        self._ranks = np.argsort(self._by_name)  # [D], its inverse
        self._fresh = fresh  # a state's rows [D] of domains of which nothing was drawn

    def _own(self, position: Position) -> Position:
        if len(position.drawn) != len(self.names):  # of one domain, it would be broadcast
            raise ValueError(f"position of {len(position.drawn)} domains for a sampler of {len(self.names)}")
        return position

    def _advance(self) -> np.ndarray:
        """Samples per domain [D] of the next batch; moves the position behind it."""
        before = self.position
        left_out, weights, start, counts, lag = self._allocate_within_caps()
        drawn = before.drawn + counts
        kept = settle(lag) if (lag > 1).any() else lag
        self._caps.tell(before.drawn, drawn, left_out & (self.weights > 0))
        self.position = Position(
            before.batches + 1, drawn, kept, before.settled + (start - before.lag) + (kept - lag)
        )
        self._effective = weights
        return counts

    def _allocate_within_caps(self) -> tuple[np.ndarray, ...]:
        """Of the next batch: domains left out (bool), weights, lag before it, samples, lag after; [D] each.

        Decided by nothing but position and weights, so that a resume decides alike. Whoever is left out makes
        the others' counts grow: they are allocated again until all fit.
        """
        drawn = self.position.drawn
        left_out = self._caps.exhausted(drawn)
        while True:
            weights, lag = self._without(left_out)
            counts, after = self._allocate(lag, weights)
            over = self._caps.over(drawn + counts, weights)
            if not over.any():
                return left_out, weights, lag, counts, after
            left_out = left_out | over

    def _allocate(self, lag: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:func:`allocate` with ties broken by name, whatever order the domains were given in."""
        counts, after = allocate(lag[self._by_name], weights[self._by_name], self.global_batch_size)
        return counts[self._ranks], after[self._ranks]

    def _without(self, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and lag, [D], as if the domains ``left_out`` [D] had no part in the mixture."""
        if not left_out.any():
            return self.weights, self.position.lag
        weights = np.where(left_out, 0.0, self.weights)
        total = exact_sum(weights)
        if total == 0:
            raise self._caps.used_up(left_out & (self.weights > 0), ", the last with a weight,")
        return weights / total, settle(np.where(left_out, 0.0, self.position.lag))


def _fresh_rows(orders: DomainOrders) -> np.ndarray:
    rows = np.zeros(len(orders.totals), dtype=ROW)
    rows["name"], rows["shards"] = name_hashes(orders.shard_sizes), orders.fingerprints
    return rows


def _continued(names: Sequence[str], fresh: np.ndarray, saved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``fresh`` [D] with the rows of ``saved`` where it knows the domain; and ``saved``'s rows of others."""
    rows = fresh.copy()
    _, own, theirs = np.intersect1d(rows["name"], saved["name"], assume_unique=True, return_indices=True)
    changed = own[rows["shards"][own] != saved["shards"][theirs]]
    if len(changed):
        raise UserError(
            f"domain {names[changed.min()]} has other shards than when the sampler's state was "
            f"saved: restore them, or prepare the new data under another name"
        )
    rows[own] = saved[theirs]
    return rows, np.delete(saved, theirs)
