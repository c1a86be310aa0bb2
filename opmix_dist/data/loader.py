"""Batches of tokens for one data-parallel rank, and the fixed held-out samples of a search.

The sampler plans global batches; this rank reads its rows of each, in this process or in workers. Workers
run ahead of the training, so every planned batch keeps the sampler's position on both sides of it: the state
is that of the last batch handed out, and new weights act on the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opmix_dist.data.catalogue import Catalogue, Split
from opmix_dist.data.sampler import MixtureSampler, Position
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed


@dataclass(frozen=True)
class LoadedBatch:
    """One rank's rows of a global batch: B/W samples of T tokens."""

    tokens: Tensor  # int64 [B/W, T]
    domain_ids: Tensor  # int64 [B/W], into the catalogue's names
    number: int  # of the global batch, from 0 at the start of the run


@dataclass(frozen=True)
class EvalSet:
    """Held-out samples, ordered by domain."""

    tokens: Tensor  # int64 [N, T]
    domain_ids: Tensor  # int64 [N], into the catalogue's names


class MixtureLoader:
    """Endless iterator over one rank's batches; every rank of the role makes one with the same arguments.

    Needs no collective: each rank plans the same global batches and reads its own rows of them.

    Args:
        catalogue: the domains.
        weights: name to weight, sums to 1; what is not named weighs 0.
        split: ``train`` or ``eval``.
        global_batch_size: samples per batch over all ranks, B.
        rank, world_size: of the data-parallel group; rank r gets rows [r B/W, (r+1) B/W).
        seed: of the order, the same on all ranks.
        num_workers: reader processes; 0 reads in this one.
        prefetch_batches: batches that each worker keeps ready.
        max_epochs: name to the epochs after which a domain may not be drawn from.

    Raises:
        UserError: B not divisible by W, shards that contradict the catalogue, or what
            :class:`~opmix_dist.data.sampler.MixtureSampler` refuses.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        weights: Mapping[str, float],
        *,
        split: Split = "train",
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        max_epochs: Mapping[str, float] | None = None,
    ) -> None:
        if global_batch_size % world_size:
            raise UserError(
                f"global batch of {global_batch_size} samples does not divide over {world_size} ranks: make "
                f"it a multiple"
            )
        self._reader = _SampleReader(catalogue, split)
        sizes = {n: s.shard_sizes for n, s in zip(catalogue.names, self._reader.splits, strict=True)}
        self._sampler = MixtureSampler(
            sizes, weights, global_batch_size=global_batch_size, seed=seed, max_epochs=max_epochs
        )
        per_rank = global_batch_size // world_size
        self._rows = slice(rank * per_rank, (rank + 1) * per_rank)
        self._num_workers, self._prefetch_batches = num_workers, prefetch_batches
        self._workers: DataLoader[Any] | None = None
        self._rewind(self._sampler.position)

    def __iter__(self) -> MixtureLoader:
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch.

        Raises:
            UserError: a sample cannot be read, or a domain is used up. The loader then stands before this
                batch, which can be asked for again.
        """
        tokens = self._receive()
        planned = self._planned.popleft()
        self._position = planned.after
        return LoadedBatch(tokens, planned.domain_ids, planned.after.batches - 1)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Hand out the very next batch, and those after it, in these proportions; on every rank alike.

        Raises:
            UserError: weights that are no mixture of the known domains; nothing changes then.
        """
        self._sampler.set_weights(weights)
        self._rewind(self._position)

    def counts(self) -> np.ndarray:
        """Samples handed out per domain, over all ranks, int64 [D]."""
        return self._position.drawn.copy()

    def epochs(self) -> np.ndarray:
        """How often each domain was gone through, over all ranks, float64 [D]."""
        return self._sampler.epochs(self._position)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the last batch handed out; the same on every rank, without weights."""
        return self._sampler.state_dict(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which ``state`` was taken; UserError when it does not fit this data."""
        self._sampler.load_state_dict(state)
        self._rewind(self._sampler.position)

    def close(self) -> None:
        """End the workers. A later batch starts them again."""
        self._rewind(self._position)
        self._workers = None

    def _rewind(self, position: Position) -> None:
        """Stand behind the batch at ``position``; what was planned beyond it is planned again."""
        self._sampler.position = self._position = position
        self._planned: deque[_Planned] = deque()
        self._stop: UserError | None = None
        self._arriving: Iterator[Any] | None = None

    def _receive(self) -> Tensor:
        """Tokens [B/W, T] of the oldest planned batch, or what stopped its reading or the plan, raised."""
        if self._arriving is None:
            self._arriving = self._start()
        try:
            received = next(self._arriving)
        except StopIteration:
            received = self._stop
        if isinstance(received, UserError):
            self._rewind(self._position)
            raise received
        return torch.from_numpy(received.astype(np.int64))

    def _start(self) -> Iterator[Any]:
        """Iterate over the plan anew; live workers stay, and what they read of an older plan is dropped."""
        if self._workers is None:
            self._workers = DataLoader(
                self._reader,
                batch_sampler=_Plan(self._plan),
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_batches if self._num_workers else None,
                persistent_workers=self._num_workers > 0,
                collate_fn=_as_read,
                # a generator of its own: by default each start draws from torch's global one, and dropout
                # after a resume or a change of weights would differ
                generator=torch.Generator(),
            )
        return iter(self._workers)

    def _plan(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's (domain, sample id) of each batch, as far ahead as the workers ask for."""
        while True:
            try:
                domains, samples = self._sampler.draw()
            except UserError as error:
                self._stop = error  # raised when the batches planned before it were handed out
                return
            domains, samples = domains[self._rows], samples[self._rows]
            self._planned.append(_Planned(self._sampler.position, torch.from_numpy(domains)))
            yield list(zip(domains.tolist(), samples.tolist(), strict=True))


def eval_batches(
    catalogue: Catalogue, *, samples_per_domain: int, seed: int, skip: int = 0, split: Split = "eval"
) -> EvalSet:
    """Fixed held-out samples: the first of a seeded permutation of each domain, fewer if it has fewer.

    The same for every caller with the same arguments. A domain's samples depend on no other domain, and
    those for a smaller ``samples_per_domain`` are among those for a larger one.

    Args:
        samples_per_domain: at most this many of each.
        skip: leave out this many at the start of each permutation, which another caller takes.

    Raises:
        UserError: ``samples_per_domain`` below 1, a domain with no sample beyond ``skip``, or shards that
            are missing or damaged.
    """
    if samples_per_domain < 1:
        raise UserError(f"samples_per_domain is {samples_per_domain}: give at least 1")
    reader = _SampleReader(catalogue, split)
    chosen: list[tuple[int, int]] = []
    for domain, name in enumerate(catalogue.names):
        order = np.random.default_rng(derive_seed(seed, "eval", name)).permutation(len(reader.splits[domain]))
        if len(order) <= skip:
            raise UserError(
                f"domain {name} has {len(order)} held-out samples and the search takes {skip}: lower "
                "search.candidates.samples_per_domain, or prepare it with a larger --eval-fraction"
            )
        chosen += [(domain, sample) for sample in order[skip : skip + samples_per_domain].tolist()]
    tokens = np.stack([reader.read(domain, sample) for domain, sample in chosen]).astype(np.int64)
    return EvalSet(torch.from_numpy(tokens), torch.tensor([domain for domain, _ in chosen]))


class _SampleReader(Dataset[np.ndarray]):
    """Reads samples of the catalogue's domains; what workers hold a copy of."""

    def __init__(self, catalogue: Catalogue, split: Split) -> None:
        self.names, self.vocab_size = catalogue.names, catalogue.vocab_size
        self.splits = [ShardedSplit(catalogue.split_dir(name, split)) for name in catalogue.names]
        for name, shards, samples in zip(self.names, self.splits, catalogue.samples(split), strict=True):
            if (len(shards), shards.sequence_length) != (samples, catalogue.sequence_length):
                raise UserError(
                    f"domain {name}: {shards.local} has {len(shards)} samples of {shards.sequence_length} "
                    f"tokens, its domain.json says {samples} of {catalogue.sequence_length}; prepare it again"
                )

    def read(self, domain: int, sample: int) -> np.ndarray:
        """Token ids [T]; UserError when they cannot be read or are none of the vocabulary's."""
        tokens = self.splits[domain].read(sample)
        if tokens.max() >= self.vocab_size:  # on a GPU an embedding ends in an assertion that names nothing
            raise UserError(
                f"domain {self.names[domain]}: sample {sample} in {self.splits[domain].local} has token "
                f"{tokens.max()}, beyond the vocabulary of {self.vocab_size}; prepare it again"
            )
        return tokens

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> np.ndarray | UserError:
        """Token ids [rows, T] of (domain, sample id)s.

        An error is returned, to be raised by the receiver: DataLoader would wrap it in a worker's traceback.
        """
        try:
            return np.stack([self.read(domain, sample) for domain, sample in rows])
        except UserError as error:
            return error


@dataclass(frozen=True)
class _Planned:
    """A batch that was planned and not handed out yet."""

    after: Position  # the sampler's, behind this batch
    domain_ids: Tensor  # int64 [B/W]


class _Plan:
    """The plan as DataLoader wants it: something to iterate over anew at each start."""

    def __init__(self, plan: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._plan()


def _as_read(batch: Any) -> Any:
    """In place of DataLoader's collation: the reader has stacked the samples."""
    return batch
