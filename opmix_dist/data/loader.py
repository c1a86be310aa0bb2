"""Batches for one data-parallel rank, and the fixed held-out samples of a search.

The sampler plans global batches; this rank reads its rows of each, in this process or in workers. Workers
run ahead of the training, so every planned batch keeps the sampler's position on both sides of it: the state
is that of the last batch handed out, and new weights act on the next one.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opmix_dist.data.batch import Rows, TokenBatch, stack
from opmix_dist.data.catalogue import Catalogue, Split
from opmix_dist.data.fetcher import Fetcher
from opmix_dist.data.lookahead import Lookahead
from opmix_dist.data.remote import open_catalogue
from opmix_dist.data.replay import ReplaySplit
from opmix_dist.data.sampler import SHUFFLE_BLOCK, MixtureSampler, Position
from opmix_dist.data.samples import Sample
from opmix_dist.data.shards import ShardedSplit, import_reader
from opmix_dist.data.store import one_line
from opmix_dist.errors import UserError
from opmix_dist.process import leave_stopping_to_parent
from opmix_dist.seeds import derive_seed

log = logging.getLogger(__name__)

# DataLoader's iterator raises a RuntimeError in these words
_WORKER_DIED = re.compile(r"^DataLoader worker \(pid")


@dataclass(frozen=True)
class LoadedBatch:
    """One rank's rows of a global batch: B/W samples of T tokens."""

    batch: TokenBatch  # [B/W, T]
    domain_ids: Tensor  # int64 [B/W], into the loader's names
    number: int  # of the global batch, from 0 at the start of the run


@dataclass(frozen=True)
class EvalSet:
    """Held-out samples, ordered by domain."""

    batch: TokenBatch  # [N, T]
    domain_ids: Tensor  # int64 [N], into the catalogue's names


@dataclass(frozen=True)
class ReadOptions:
    """How samples are read; changes neither which nor in what order."""

    mask_documents: bool = False
    """Positions restart at document boundaries and attention stays within documents."""
    verify: bool = False
    """Compare every shard with its hash when a process first reads it."""
    fetch_threads: int = 8
    """Shards of a store that are fetched at the same time, by each rank."""
    fetch_ahead: int = 16
    """Shards of a store to fetch before they are needed, by each rank; 0 fetches when they are read."""


class MixtureLoader:
    """Endless iterator over one rank's batches; every rank of the role makes one with the same arguments.

    Needs no collective: each rank plans the same global batches and reads its own rows of them.

    Args:
        catalogue: the domains.
        weights: name to weight, sums to 1; what is not named weighs 0.
        split: ``train`` or ``eval``.
        global_batch_size: samples per batch over all ranks, B.
        rank, world_size: of the data-parallel group; rank r gets rows [r B/W, (r+1) B/W). Tensor- and
            pipeline-parallel ranks of one replica pass the replica's rank, and read the same rows.
        seed: of the order, the same on all ranks.
        num_workers: reader processes; 0 reads in this one.
        prefetch_batches: batches that each worker keeps ready.
        max_epochs: name to the epochs after which a domain may not be drawn from.
        on_exhausted: what happens then: ``stop`` raises, ``renormalize`` goes on without the domain.
        shuffle_block: samples of a domain that are shuffled together, at least.
        reading: how samples are read.

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
        on_exhausted: Literal["stop", "renormalize"] = "stop",
        shuffle_block: int = SHUFFLE_BLOCK,
        reading: ReadOptions = ReadOptions(),
    ) -> None:
        if global_batch_size % world_size:
            raise UserError(
                f"global batch of {global_batch_size} samples does not divide over {world_size} ranks: make "
                f"it a multiple"
            )
        self.catalogue, self._split, self._options = catalogue, split, reading
        self._reader = _SampleReader(catalogue, split, reading)
        self._sampler = MixtureSampler(
            self._reader.shard_sizes(catalogue.names),
            weights,
            global_batch_size=global_batch_size,
            seed=seed,
            max_epochs=max_epochs,
            on_exhausted=on_exhausted,
            shuffle_block=shuffle_block,
        )
        per_rank = global_batch_size // world_size
        self._rows = slice(rank * per_rank, (rank + 1) * per_rank)
        self._num_workers, self._prefetch_batches = num_workers, prefetch_batches
        self._workers: DataLoader[Any] | None = None
        self._fetcher = self._start_fetcher()
        self._position: Position  # behind the last batch handed out
        self._warn_of_a_small_cache(shuffle_block)
        self._rewind(self._sampler.position)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains that ``domain_ids`` number: the catalogue's, and behind them those that joined."""
        return self.catalogue.names

    def __iter__(self) -> MixtureLoader:
        return self

    def __next__(self) -> LoadedBatch:
        """The next batch.

        Raises:
            UserError: a sample cannot be read, a reader process has died, or a domain is used up. After this
                or any other exception the loader stands before this batch, which can be asked for again.
        """
        try:
            batch = self._receive()
        except BaseException:  # what arrives next would be taken for the batch that did not
            self._rewind(self._position)
            raise
        planned = self._planned.popleft()
        self._position = planned.after
        return LoadedBatch(batch, planned.domain_ids, planned.after.batches - 1)

    def set_weights(
        self, weights: Mapping[str, float], max_epochs: Mapping[str, float] | None = None
    ) -> None:
        """Hand out the very next batch, and those after it, in these proportions; on every rank alike.

        A name that is new joins, when the catalogue's root has that domain by now: it begins at its first
        sample, or where a state that was loaded left it. A name that is not given any more weighs 0, and its
        place in its order is kept.

        Args:
            max_epochs: caps of domains that join.

        Raises:
            UserError: weights that are no mixture of domains that can be found; nothing changes then.
        """
        known = set(self.names)
        if joining := [name for name in weights if name not in known]:
            self._join(joining, weights, max_epochs)
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
        """End the workers and the fetching. A later batch starts them again."""
        self._rewind(self._position)
        self._workers = None
        if self._fetcher is not None:
            self._fetcher.close()

    def _join(
        self, joining: Sequence[str], weights: Mapping[str, float], max_epochs: Mapping[str, float] | None
    ) -> None:
        """Open more domains; the old ones keep their numbers."""
        store = self.catalogue.store
        root = store.remote if store else str(self.catalogue.root)
        catalogue = replace(
            open_catalogue(root, [*self.names, *joining], store),
            kept=self.catalogue.kept,
            kept_seed=self.catalogue.kept_seed,
        )
        reader = _SampleReader(catalogue, self._split, self._options)
        trial = self._sampler.copy()
        trial.add_domains(reader.shard_sizes(joining), max_epochs)
        trial.set_weights(weights)  # what it refuses changes nothing
        self.close()
        self._sampler.add_domains(reader.shard_sizes(joining), max_epochs)
        self._position = self._sampler.position
        self.catalogue, self._reader = catalogue, reader
        self._fetcher = self._start_fetcher()

    def _start_fetcher(self) -> Fetcher | None:
        if self.catalogue.store is None or not self._options.fetch_ahead:
            return None
        return Fetcher(self._reader.splits, threads=min(self._options.fetch_threads, self._fetch_ahead))

    @property
    def _fetch_ahead(self) -> int:
        """Shards to fetch ahead: no more than a quarter of the cache, the rest of which is in use."""
        store = self.catalogue.store
        if store is None or store.limit_bytes is None:
            return self._options.fetch_ahead
        largest = max(file.raw_bytes for split in self._reader.splits for file in split.files)
        return max(1, min(self._options.fetch_ahead, store.limit_bytes // (4 * largest)))

    def _look_ahead(self) -> Lookahead | None:
        if self._fetcher is None:
            return None
        return Lookahead(
            self._sampler.copy(),
            self._reader.splits,
            self._rows,
            ahead=self._fetch_ahead,
            tell=self._fetcher.want,
        )

    def _warn_of_a_small_cache(self, shuffle_block: int) -> None:
        """Domains are read in blocks of shards; a cache that does not hold them fetches shards repeatedly."""
        store = self.catalogue.store
        if store is None or store.limit_bytes is None:
            return
        used = [
            split for split, weight in zip(self._reader.splits, self._sampler.weights, strict=True) if weight
        ]
        blocks = sum(split.bytes_of_block(shuffle_block) for split in used)
        if blocks > store.limit_bytes:
            log.warning(
                "data.cache_limit of %d bytes holds less than the %d that are shuffled together: shards "
                "will be fetched several times; raise it or lower data.shuffle_block",
                store.limit_bytes,
                blocks,
            )

    def _rewind(self, position: Position) -> None:
        """Stand behind the batch at ``position``; what was planned beyond it is planned again."""
        self._sampler.position = position
        self._position = position
        self._planned: deque[_Planned] = deque()
        self._stop: UserError | None = None
        self._arriving: Iterator[Any] | None = None
        self._lookahead: Lookahead | None = None

    def _receive(self) -> TokenBatch:
        """The oldest planned batch [B/W, T], or what stopped its reading or the plan, raised."""
        try:
            if self._arriving is None:
                self._arriving = self._start()
            received = next(self._arriving)
        except StopIteration:
            received = self._stop
        except RuntimeError as error:
            if not _WORKER_DIED.search(str(error)):
                raise
            self._workers = None  # a later batch starts others
            raise UserError(
                f"{one_line(error)}: it reads samples, and something ended it, such as a lack of memory; see "
                f"the kernel's log, or lower data.num_workers"
            ) from None
        if isinstance(received, UserError):
            raise received
        return TokenBatch.of_rows(received, mask_documents=self._options.mask_documents)

    def _start(self) -> Iterator[Any]:
        """Iterate over the plan anew; live workers stay, and what they read of an older plan is dropped."""
        if self._workers is None:
            if self._num_workers:
                import_reader()
            self._workers = DataLoader(
                self._reader,
                batch_sampler=_Plan(self._plan),
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_batches if self._num_workers else None,
                persistent_workers=self._num_workers > 0,
                collate_fn=_as_read,
                worker_init_fn=leave_stopping_to_parent,
                # a generator of its own: by default each start draws from torch's global one, and dropout
                # after a resume or a change of weights would differ
                generator=torch.Generator(),
            )
        with _own_child_signals():
            return iter(self._workers)

    def _plan(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's (domain, sample id) of each batch, as far ahead as the workers ask for."""
        self._lookahead = self._look_ahead()
        while True:
            if self._lookahead is not None:
                self._lookahead.step(self._sampler.position.batches)
            try:
                domains, samples = self._sampler.draw()
            except UserError as error:
                self._stop = error  # raised when the batches planned before it were handed out
                return
            domains, samples = domains[self._rows], samples[self._rows]
            self._planned.append(_Planned(self._sampler.position, torch.from_numpy(domains)))
            yield list(zip(domains.tolist(), samples.tolist(), strict=True))


def eval_batches(
    catalogue: Catalogue,
    *,
    samples_per_domain: int,
    seed: int,
    skip: int = 0,
    split: Split = "eval",
    reading: ReadOptions = ReadOptions(),
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
    reader = _SampleReader(catalogue, split, reading)
    chosen: list[tuple[int, int]] = []
    for domain, name in enumerate(catalogue.names):
        order = np.random.default_rng(derive_seed(seed, "eval", name)).permutation(len(reader.splits[domain]))
        if len(order) <= skip:
            raise UserError(
                f"domain {name} has {len(order)} held-out samples and {skip} are set aside for searches (in "
                "runs without one too, so that all report the same losses): lower "
                "search.candidates.samples_per_domain, or prepare it with a larger --eval-fraction"
            )
        chosen += [(domain, sample) for sample in order[skip : skip + samples_per_domain].tolist()]
    rows = reader.__getitems__(chosen)
    if isinstance(rows, UserError):
        raise rows
    batch = TokenBatch.of_rows(rows, mask_documents=reading.mask_documents)
    return EvalSet(batch, torch.tensor([domain for domain, _ in chosen]))


class _SampleReader(Dataset[Sample]):
    """Reads samples of the catalogue's domains; what workers hold a copy of."""

    def __init__(self, catalogue: Catalogue, split: Split, options: ReadOptions) -> None:
        self.names, self.vocab_size = catalogue.names, catalogue.vocab_size
        self.length = catalogue.sequence_length
        self.splits = [_open_split(catalogue, name, split, options) for name in catalogue.names]
        for name, shards in zip(self.names, self.splits, strict=True):
            samples = catalogue.domains[name].splits[split].samples
            if shards.stored_samples != samples:
                raise UserError(
                    f"domain {name}: {shards.local} has {shards.stored_samples} samples, its domain.json "
                    f"says {samples}; prepare it again"
                )

    def shard_sizes(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Samples per shard, by domain."""
        split_of = dict(zip(self.names, self.splits, strict=True))
        return {name: split_of[name].shard_sizes for name in names}

    def read(self, domain: int, sample: int) -> Sample:
        """One sample; UserError when it cannot be read or is none of this catalogue's."""
        found = self.splits[domain].read(sample)
        if fault := self._fault(found):
            raise UserError(
                f"domain {self.names[domain]}: sample {sample} in {self.splits[domain].local} {fault}; "
                f"prepare it again"
            )
        return found

    def _fault(self, sample: Sample) -> str | None:
        if len(sample.tokens) > self.length:
            return f"has {len(sample.tokens)} tokens, more than {self.length}"
        if sample.tokens.max() >= self.vocab_size:  # on a GPU an embedding's assertion would name nothing
            return f"has token {sample.tokens.max()}, beyond the vocabulary of {self.vocab_size}"
        return None

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> Rows | UserError:
        """The samples [rows, T] of (domain, sample id)s, in the compact form that workers send.

        An error is returned, to be raised by the receiver: DataLoader would wrap it in a worker's traceback.
        """
        try:
            return stack([self.read(domain, sample) for domain, sample in rows], self.length)
        except UserError as error:
            return error


def _open_split(catalogue: Catalogue, name: str, split: Split, options: ReadOptions) -> ShardedSplit:
    """Of one domain, what of it is used."""
    local, store = catalogue.split_dir(name, split), catalogue.store
    if split == "train" and name in catalogue.kept:
        seed = derive_seed(catalogue.kept_seed, name)
        return ReplaySplit(local, store, verify=options.verify, samples=catalogue.kept[name], seed=seed)
    return ShardedSplit(local, store, verify=options.verify)


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


@contextmanager
def _own_child_signals() -> Iterator[None]:
    """Without the handler that DataLoader sets for a worker's death: it would raise anywhere in this process,
    in the middle of a training step. The iterator finds a dead worker too, within seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _as_read(batch: Any) -> Any:
    """In place of DataLoader's collation: the reader has stacked the samples."""
    return batch
