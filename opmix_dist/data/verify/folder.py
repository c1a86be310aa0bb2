"""A prepared folder as a whole: every shard goes to the workers, and what they find is put together.

The eval splits come first: their documents are kept in memory as digests, and those of the train splits are
compared with them on the way.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opmix_dist.data.catalogue import TOKENIZER, DomainInfo, Split, read_domain, tokenizer_fingerprint
from opmix_dist.data.printable import first_words
from opmix_dist.data.samples import INDEX_FILE
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore
from opmix_dist.data.tokenizer import load_tokenizer, vocab_size
from opmix_dist.data.verify.domain import check_counts, check_side_files, open_splits
from opmix_dist.data.verify.duplicates import HeldOut, Joiner, TrainDigests, count_repeated
from opmix_dist.data.verify.names import find
from opmix_dist.data.verify.report import DomainReport, VerifyReport
from opmix_dist.data.verify.shard import (
    DocumentDigests,
    ShardFindings,
    SplitPlace,
    check_shard,
    forget_opened,
)
from opmix_dist.data.workers import Pool, Task
from opmix_dist.errors import UserError
from opmix_dist.terminal import Terminal

SHORT_FINGERPRINT = 12


def verify(
    root: str,
    *,
    store: ShardStore | None = None,
    domains: Sequence[str] | None = None,
    workers: int | None = None,
    all_train: bool = False,
    console: Console | None = None,
) -> VerifyReport:
    """Check everything in a prepared folder; what is wrong is reported, and does not stop the rest.

    A script that passes ``workers`` above 1 calls it under ``if __name__ == "__main__"``.

    Args:
        root: the folder, or the store's remote.
        store: of a remote root. Shards that its cache holds are checked there.
        domains: names; None takes all. Only these are searched for duplicates.
        workers: processes; None takes as many as there are cores, or shards if fewer.
        all_train: find documents that train splits have repeatedly by reading them, and not by the digests
            that ``opmix prepare`` left.
        console: where the bar goes, on a terminal.

    Raises:
        UserError: there is no such folder or domain.
    """
    with tempfile.TemporaryDirectory(prefix="opmix-verify-") as scratch:
        run = _Verification(root, store, Path(scratch))
        run.open(domains)
        run.read_shards(workers, all_train, console or Terminal(stderr=True))
        run.check_side_files(all_train)
        return run.report


@dataclass(frozen=True)
class _OpenTokenizer:
    """The folder's, or that it has none which can be used."""

    fingerprint: str | None = None
    eos_id: int | None = None
    vocab_size: int | None = None
    decode: Callable[[list[int]], str] = str

    def words(self, tokens: np.ndarray) -> str:
        return first_words(self.decode(tokens.tolist()))


@dataclass
class _Domain:
    report: DomainReport
    info: DomainInfo
    splits: dict[Split, ShardedSplit]
    comparable: bool
    """Its token ids are those of the folder's tokenizer."""


@dataclass
class _Work:
    """One split's shards, in order."""

    domain: _Domain
    split: Split
    place: SplitPlace
    shards: range
    counts: dict[str, int] = field(default_factory=lambda: {"tokens": 0, "documents": 0})


class _Verification:
    def __init__(self, root: str, store: ShardStore | None, scratch: Path) -> None:
        self._root, self._store, self._scratch = root, store, scratch
        self._local = Path(root) if store is None else store.cache
        self.report = VerifyReport(root)
        self._domains: list[_Domain] = []

    def open(self, domains: Sequence[str] | None) -> None:
        """Read all that is small."""
        found = find(self._root, self._store, domains)
        self.report.left_out = found.left_out
        self._tokenizer = self._open_tokenizer()
        for name, fault in found.names.items():
            self._open_domain(name, fault)
        lengths = {domain.info.sequence_length for domain in self._domains}
        if len(lengths) > 1:
            self.report.shared_faults.append(
                f"{self._root}: its domains have samples of {' and '.join(map(str, sorted(lengths)))} tokens "
                f"and cannot be used together: prepare them again with one --sequence-length"
            )

    def _open_domain(self, name: str, fault: str | None) -> None:
        """``fault``: why its small files could not be fetched."""
        report = DomainReport(name)
        self.report.domains.append(report)
        if fault is not None:
            report.fault(fault)
            return
        try:
            info = read_domain(self._local, name)
        except UserError as error:
            report.fault(str(error))
            return
        splits = open_splits(self._local / name, info, report)
        report.shards = sum(len(split.files) for split in splits.values())
        self._domains.append(_Domain(report, info, splits, self._check_tokenizer(info, report)))

    def _open_tokenizer(self) -> _OpenTokenizer:
        folder = self._local / TOKENIZER
        try:
            fingerprint = tokenizer_fingerprint(folder)
            tokenizer = load_tokenizer(str(folder))
        except UserError as error:
            self.report.shared_faults.append(str(error))
            return _OpenTokenizer()
        decode = functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
        return _OpenTokenizer(fingerprint, tokenizer.eos_token_id, vocab_size(tokenizer), decode)

    def _check_tokenizer(self, info: DomainInfo, report: DomainReport) -> bool:
        ours, file = self._tokenizer, self._local / info.name / "domain.json"
        if ours.fingerprint is None:
            return True  # of the folder, which is a fault already
        if info.tokenizer_fingerprint != ours.fingerprint:
            report.fault(
                f"{file}: was tokenised with another tokenizer "
                f"({info.tokenizer_fingerprint[:SHORT_FINGERPRINT]}) than {self._local / TOKENIZER} "
                f"({ours.fingerprint[:SHORT_FINGERPRINT]}): prepare it again with that one"
            )
            return False
        if info.vocab_size != ours.vocab_size:
            report.fault(
                f"{file}: says a vocabulary of {info.vocab_size}, the tokenizer has {ours.vocab_size}"
            )
        return True

    def read_shards(self, workers: int | None, all_train: bool, console: Console) -> None:
        work = [self._work(domain, "eval") for domain in self._domains if "eval" in domain.splits]
        work += [self._work(domain, "train") for domain in self._domains if "train" in domain.splits]
        total = sum(len(one.shards) for one in work)
        train = TrainDigests(self._scratch / "train") if all_train else None
        search = _Search(HeldOut(self._tokenizer.words), train)
        with _bar(total, console) as advance, _results(work, _processes(workers, total)) as results:
            for one, findings in zip(work, results, strict=True):
                self._take(one, _counted(findings, advance), search)
        if train is not None:
            count_repeated(self.report.domains, train.files(self.report.domains))

    def check_side_files(self, all_train: bool) -> None:
        """Those that only ``opmix prepare`` reads."""
        folder = self._scratch / "digests"
        folder.mkdir()
        files = {}
        for domain in self._domains:
            digests = check_side_files(self._root, domain.info, domain.report, folder)
            if digests is not None:
                files[domain.report.name] = digests
        if not all_train:
            count_repeated(self.report.domains, files)

    def _work(self, domain: _Domain, split: Split) -> _Work:
        opened = domain.splits[split]
        eos_id = self._tokenizer.eos_id if domain.comparable else None
        place = SplitPlace(opened.local, self._store, domain.info, eos_id)
        if self._store is None and any(file.zip_name for file in opened.files):
            place = self._decompressed_elsewhere(place)
        return _Work(domain, split, place, range(len(opened.files)))

    def _decompressed_elsewhere(self, place: SplitPlace) -> SplitPlace:
        """A temporary folder in place of the prepared one, which stays as it is."""
        local = self._scratch / "shards" / place.local.parent.name / place.local.name
        local.mkdir(parents=True)
        shutil.copyfile(place.local / INDEX_FILE, local / INDEX_FILE)
        return replace(place, local=local, original=place.local)

    def _take(self, work: _Work, findings: Iterator[ShardFindings], search: _Search) -> None:
        """Put together what is in one split's shards."""
        report, joiner, all_read = work.domain.report, Joiner(work.place.eos_id), True
        for found in findings:
            for fault in found.faults:
                report.fault(fault, work.split)
            report.samples += found.samples
            work.counts["tokens"] += found.tokens
            work.counts["documents"] += found.documents
            all_read &= found.whole is not None
            for documents in joiner.feed(found):
                search.take(work, documents)
        report.tokens += work.counts["tokens"]
        report.documents += work.counts["documents"]
        folder = self._local / report.name
        if joiner.unended is not None:
            report.fault(
                f"{folder / work.split}: the document that begins in sample {joiner.unended} has no end: the "
                f"last samples are missing; prepare the domain again",
                work.split,
            )
        if all_read:  # else what is missing is told already
            check_counts(folder, work.domain.info, work.split, work.counts, report)


@dataclass(frozen=True)
class _Search:
    """For duplicates, on the way through the shards."""

    held_out: HeldOut
    train: TrainDigests | None

    def take(self, work: _Work, documents: DocumentDigests) -> None:
        report = work.domain.report
        if not work.domain.comparable:
            return
        if work.split == "eval":
            self.held_out.add(report, documents)
            return
        self.held_out.compare(report, documents)
        if self.train is not None:
            self.train.add(report, documents)


def _processes(workers: int | None, shards: int) -> int:
    return max(1, min(workers if workers is not None else os.cpu_count() or 1, shards))


@contextmanager
def _results(work: Sequence[_Work], workers: int) -> Iterator[Iterator[Iterator[ShardFindings]]]:
    """For each split in order, what is found in its shards, in order."""
    if workers == 1:  # starting a process takes seconds
        forget_opened()
        yield (map(functools.partial(check_shard, one.place), one.shards) for one in work)
        return
    groups = [[Task(shard, check_shard, (one.place, shard)) for shard in one.shards] for one in work]
    with Pool(workers) as pool:
        yield ((found for _, found in group) for group in pool.stream(groups))


@contextmanager
def _bar(shards: int, console: Console) -> Iterator[Callable[[], None]]:
    """On a terminal; yields what moves it by one shard."""
    bar = Progress(
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=shards)
        yield lambda: bar.advance(task)


def _counted(findings: Iterator[ShardFindings], advance: Callable[[], None]) -> Iterator[ShardFindings]:
    for found in findings:
        yield found
        advance()
