"""``opmix prepare``: text in, tokenised MDS shards out (the layout is described in ``catalogue.py``).

1. Survey: read every source once, drop duplicates, and decide each document's split from its content.
2. Tokenizer: train one on the train documents, or load one, unless the folder already has its own.
3. Write: tokenise in worker processes, one domain after the other, one writer each. Documents end in EOS,
   are joined and cut into samples of T tokens.

A domain is written beside its place and moved there when it is complete, so a run that was killed leaves
nothing to repair: the next one keeps the finished domains and writes the others again, to the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import JsonValue
from rich.console import Console

from opmix_dist.data.builtin import DEFAULT_MAX_BYTES, builtin_domains
from opmix_dist.data.catalogue import (
    DOMAIN_FILE,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER,
    Catalogue,
    DomainInfo,
    SplitInfo,
    check_domain_name,
    find_domains,
    read_domain,
    tokenizer_fingerprint,
)
from opmix_dist.data.progress import Advance, Report
from opmix_dist.data.sources import FileSource, Source
from opmix_dist.data.survey import Survey, survey
from opmix_dist.data.tokenizer import (
    MIN_VOCAB_SIZE,
    Encoder,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocab_size,
)
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Settings = dict[str, JsonValue]
TRAIN_TOKENIZER = "train"
BATCH_DOCUMENTS = 64
BATCH_CHARS = 1 << 18
ONE_PER_FOLDER = ("tokenizer", "vocab_size", "sequence_length")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and where to; UserError at construction names the setting that is out of range."""

    out: Path
    """Folder to make or to add domains to."""
    domains: Mapping[str, list[str]] = field(default_factory=dict)
    """Files, folders and globs of each domain; a document in several domains stays in the first."""
    builtin: bool = False
    """Prepare the built-in domains in place of ``domains``."""
    builtin_max_bytes: int = DEFAULT_MAX_BYTES
    """Bytes of text in each built-in domain."""
    tokenizer: str = TRAIN_TOKENIZER
    """``train``, or a folder or hub id of a Hugging Face tokenizer."""
    vocab_size: int = 4096
    """Tokens of the tokenizer to train; without effect on a loaded one."""
    sequence_length: int = 256
    """Tokens per sample, T."""
    eval_fraction: float = 0.05
    """Share of the documents that are held out."""
    max_eval_documents: int | None = None
    """Bound on a domain's held-out documents; None: no bound."""
    text_field: str = "text"
    """Field of JSON lines, or column of Parquet files, that holds the text."""
    seed: int = 0
    """Decides which documents are held out, and which files the built-in domains take."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Tokenising processes; the result does not depend on it."""
    overwrite: bool = False
    """Replace finished domains whose settings differ."""

    def __post_init__(self) -> None:
        if bool(self.domains) == self.builtin:
            raise UserError("give either --domain NAME=PATH (at least one) or --builtin")
        for name in self.domains:
            check_domain_name(name)
        if not 0.0 < self.eval_fraction < 1.0:
            raise UserError(f"--eval-fraction {self.eval_fraction} must lie between 0 and 1")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed {self.seed} must not be negative, and less than 2**63")
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--{key.replace('_', '-')} {value} must be at least {least}")

    def sources(self) -> Mapping[str, Source]:
        """The source of each domain, in order."""
        if self.builtin:
            return builtin_domains(self.builtin_max_bytes, self.seed)
        return {name: FileSource(tuple(paths), self.text_field) for name, paths in self.domains.items()}


_LEAST = {"builtin_max_bytes": 1, "vocab_size": MIN_VOCAB_SIZE, "sequence_length": 2, "max_eval_documents": 1,
          "workers": 1}  # fmt: skip


def prepare(config: PrepareConfig, console: Console | None = None) -> Catalogue:
    """Write the domains of ``config`` and return their catalogue.

    Finished domains with the same settings are kept, and with them the folder's tokenizer. A script calls
    it under ``if __name__ == "__main__"``: it spawns processes, which import the script.

    Args:
        config: what to prepare.
        console: where progress goes; standard error by default. Bars on a terminal only.

    Raises:
        UserError: a source that cannot be read, a finished domain with other settings, a domain too small
            for one sample, or a failed write; no half-written domain is left.
    """
    root, sources = Path(config.out), config.sources()
    with Report(console or Console(stderr=True)) as report:
        settings = dict(_settings(config, sources))
        todo, kept = _plan(root, settings, config.overwrite)
        for name in kept:
            report.say(f"{name}: already prepared")
        if todo:
            surveys = _survey_all(config, sources, report)
            tokenizer = _settle_tokenizer(config, sources, surveys, report, kept)
            jobs = [_Job(name, sources[name], surveys[name], settings[name]) for name in todo]
            _write_all(config, jobs, tokenizer, report)
    return Catalogue.open(root, list(sources))


# --- what has to be done -----------------------------------------------------------------------------------


def _settings(config: PrepareConfig, sources: Mapping[str, Source]) -> Iterator[tuple[str, Settings]]:
    """All that decides each domain's content, in the words of PrepareConfig; a rerun compares it."""
    shared: Settings = {
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == TRAIN_TOKENIZER else None,
        "sequence_length": config.sequence_length,
        "eval_fraction": config.eval_fraction,
        "max_eval_documents": config.max_eval_documents,
        "text_field": config.text_field,
        "seed": config.seed,
        "builtin_max_bytes": config.builtin_max_bytes if config.builtin else None,
    }
    earlier = ""  # a chained digest: what an earlier domain holds is dropped from the later ones
    for name, source in sources.items():
        files = source.fingerprint()
        yield name, {**shared, "sources": list(source.names), "files": files, "earlier_domains": earlier}
        earlier = hashlib.sha256(f"{earlier} {name} {files}".encode()).hexdigest()


def _plan(root: Path, settings: Mapping[str, Settings], overwrite: bool) -> tuple[list[str], list[str]]:
    """Names of the domains to write, and of the finished ones in ``root`` that stay."""
    finished = find_domains(root) if root.exists() else []
    todo: list[str] = []
    for name, wanted in settings.items():
        if name not in finished:
            if (root / name).exists():
                raise UserError(f"{root / name} is in the way and not from `opmix prepare`: move it")
            todo.append(name)
        elif differing := _difference(root, name, wanted, wanted):
            if not overwrite:
                raise UserError(
                    f"domain {name} in {root} was prepared with another `{differing}`: pass --overwrite to "
                    f"replace it, or another --out"
                )
            todo.append(name)
    shared = next(iter(settings.values()))
    for name in sorted(set(finished) - set(settings)):
        if differing := _difference(root, name, shared, ONE_PER_FOLDER):
            raise UserError(f"{root} holds domain {name} with another `{differing}`: pass another --out")
    return todo, [name for name in finished if name not in todo]


def _difference(root: Path, name: str, wanted: Settings, keys: Iterable[str]) -> str | None:
    """The first of ``keys`` on which the recorded settings are not the wanted ones."""
    recorded = read_domain(root, name).settings
    return next((key for key in keys if recorded.get(key) != wanted[key]), None)


# --- survey and tokenizer ----------------------------------------------------------------------------------


def _survey_all(config: PrepareConfig, sources: Mapping[str, Source], report: Report) -> dict[str, Survey]:
    seen: set[bytes] = set()
    surveys = {}
    for name, source in sources.items():
        with report.stage(f"{name}: read") as advance:
            surveys[name] = survey(
                _counted(source.documents(), advance),
                seen,
                seed=config.seed,
                eval_fraction=config.eval_fraction,
                max_eval=config.max_eval_documents,
            )
    return surveys


def _settle_tokenizer(
    config: PrepareConfig,
    sources: Mapping[str, Source],
    surveys: Mapping[str, Survey],
    report: Report,
    kept: Sequence[str],
) -> PreTrainedTokenizerFast:
    """Train or load a tokenizer into the folder, unless domains are ``kept`` that were made with its own."""
    if kept:
        return Catalogue.open(config.out, kept).load_tokenizer()
    if config.tokenizer == TRAIN_TOKENIZER:
        texts = (text for name, source in sources.items() for text in surveys[name].train(source.documents()))
        with report.stage("tokenizer: train") as advance:
            tokenizer = train_tokenizer(_counted(texts, advance), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    with published(Path(config.out) / TOKENIZER) as temporary:
        save_tokenizer(tokenizer, temporary)
    return tokenizer


def _counted(documents: Iterable[str], advance: Advance) -> Iterator[str]:
    for text in documents:
        advance(1, 0)
        yield text


# --- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """What all domains of a folder share."""

    tokenizer_fingerprint: str
    vocab_size: int
    sequence_length: int
    seed: int

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """The smallest that holds the vocabulary."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class _Job:
    """A domain to write."""

    name: str
    source: Source
    survey: Survey
    settings: Settings


def _write_all(
    config: PrepareConfig, jobs: Sequence[_Job], tokenizer: PreTrainedTokenizerFast, report: Report
) -> None:
    root = Path(config.out)
    form = _Format(
        tokenizer_fingerprint(root / TOKENIZER), vocab_size(tokenizer), config.sequence_length, config.seed
    )
    with Encoder(root / TOKENIZER, tokenizer.eos_token_id, form.dtype, config.workers) as encoder:
        for job in jobs:
            with report.stage(f"{job.name}: write", job.survey.documents) as advance:
                info = _write_domain(root, job, form, encoder, advance)
            samples = ", ".join(f"{info.splits[split].samples:,} {split} samples" for split in SPLITS)
            report.say(f"{job.name}: {samples}; {info.documents_duplicate:,} duplicate documents dropped")


def _write_domain(root: Path, job: _Job, form: _Format, encoder: Encoder, advance: Advance) -> DomainInfo:
    with published(root / job.name) as temporary:
        writers = {split: _SplitWriter(temporary / split, form) for split in SPLITS}
        splits = job.survey.splits()
        for batch in encoder.encode(_batches(job.survey.kept(job.source.documents()))):
            for tokens, split in zip(batch, splits, strict=False):  # `splits` goes on in the next batch
                writers[split].add(tokens)
            advance(len(batch), sum(map(len, batch)))
        info = DomainInfo(
            format_version=FORMAT_VERSION,
            name=job.name,
            tokenizer_fingerprint=form.tokenizer_fingerprint,
            vocab_size=form.vocab_size,
            sequence_length=form.sequence_length,
            dtype=form.dtype,
            splits={split: writer.finish(job.name) for split, writer in writers.items()},
            documents_duplicate=job.survey.duplicates,
            documents_empty=job.survey.empty,
            tokens_dropped=sum(writer.held for writer in writers.values()),
            sources=list(job.source.names),
            content_sha256=job.survey.content_sha256,
            seed=form.seed,
            settings=job.settings,
        )
        (temporary / DOMAIN_FILE).write_text(info.model_dump_json(indent=1))
    return info


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Joins token arrays and writes every T of them as a sample; ``held`` tokens do not fill one yet."""

    def __init__(self, folder: Path, form: _Format) -> None:
        from opmix_dist.data.mds import import_streaming

        self._split = folder.name
        self._length = form.sequence_length
        encoding = f"ndarray:{form.dtype}:{form.sequence_length}"
        self._writer = import_streaming().MDSWriter(columns={"tokens": encoding}, out=str(folder))
        self._parts: list[np.ndarray] = []
        self._documents = self._samples = self.held = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document's tokens [n]."""
        self._documents += 1
        self._parts.append(tokens)
        self.held += len(tokens)
        if self.held < self._length:
            return
        joined = np.concatenate(self._parts)
        rows, self.held = divmod(len(joined), self._length)
        self._parts = [joined[rows * self._length :]]
        self._samples += rows
        for row in joined[: rows * self._length].reshape(rows, self._length):
            self._writer.write({"tokens": row})

    def finish(self, domain: str) -> SplitInfo:
        """Write the last shard and the index; UserError when there is no sample."""
        if not self._samples:
            raise UserError(
                f"empty domain: {domain} has {self._documents} {self._split} documents of {self.held} tokens "
                f"in all, less than one sample of {self._length}: add documents or change --eval-fraction"
            )
        self._writer.finish()
        tokens = self._samples * self._length
        return SplitInfo(samples=self._samples, tokens=tokens, documents=self._documents)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of ``folder`` at the end, or vanishes on an error.

    Raises:
        UserError: the files cannot be written, for example because the disk is full.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    try:
        for left_by_a_kill in (temporary, old):
            if left_by_a_kill.exists():
                shutil.rmtree(left_by_a_kill)
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {folder}: {error.strerror or error}; mend that and run again"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """fsync the folder's files and the folders themselves, so that a rename never outruns the content."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
