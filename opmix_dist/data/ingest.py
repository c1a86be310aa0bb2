"""``opmix prepare``: documents in, tokenised MDS shards out (the layout is described in ``catalogue.py``).

1. Survey: workers digest every document once.
2. Settle: duplicates are dropped over all domains, and each document's split is decided from its content.
3. Tokenizer: train one on the train documents, or load one, unless the folder already has its own.
4. Write: workers tokenise what is kept; one process packs it into samples, and workers write the shards.

One process cuts the sources into chunks and puts results together in their order, so that the bytes do not
depend on the number of workers. What is done is noted on the way, beside the domain's place: a run that was
killed is gone on with, to the same bytes. Memory depends neither on the corpus nor on the number of domains.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from opmix_dist.data.builtin_chat import TEMPLATE
from opmix_dist.data.catalogue import (
    SPLITS,
    TASKS_FILE,
    TOKENIZER,
    Catalogue,
    DomainInfo,
    Packing,
    find_domains,
    tokenizer_fingerprint,
)
from opmix_dist.data.chat import require_syntax
from opmix_dist.data.decontaminate import Grams
from opmix_dist.data.dedupe import Digests, SurveyedDigests, drop_duplicates, published_digests
from opmix_dist.data.encode import SOURCE_CHANGED, Encoded, Encoder
from opmix_dist.data.plan import Job, Plan, all_settings, make_plan
from opmix_dist.data.prepare_config import TRAIN_TOKENIZER, PrepareConfig
from opmix_dist.data.progress import Advance, Report
from opmix_dist.data.source import Chunk, Place, Source, SourceFile
from opmix_dist.data.sources import FileSource
from opmix_dist.data.staging import Staging, exclusive, published, writing
from opmix_dist.data.survey import Mark, Survey, Surveyed, Surveyor, document_text, hold_out, set_up_worker
from opmix_dist.data.task_lines import write_tasks
from opmix_dist.data.tokenizer import TokenizerFiles, load_tokenizer, save_tokenizer, train_tokenizer
from opmix_dist.data.workers import Pool, Task
from opmix_dist.data.writing import DomainWriter, Form
from opmix_dist.data.written import read_record
from opmix_dist.errors import UserError
from opmix_dist.faults.points import point
from opmix_dist.terminal import Terminal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig, console: Console | None = None) -> Catalogue:
    """Write the domains of ``config`` and return their catalogue.

    Finished domains with the same settings are kept, and with them the folder's tokenizer; unfinished ones
    are gone on with. A script calls it under ``if __name__ == "__main__"``: it starts processes, which import
    the script.

    Args:
        config: what to prepare.
        console: where progress goes; standard error by default. Bars on a terminal only.

    Raises:
        UserError: a source that cannot be read, a finished domain with other settings, a domain too small for
            its splits, or a failed write; nothing half-written gets a domain's name.
    """
    root = Path(config.out).absolute()  # workers may be elsewhere
    with exclusive(root), Report(console or Terminal(stderr=True)) as report:
        grams = _read_grams(config, report)
        template = _read_template(config)
        files = {name: list(source.files()) for name, source in config.sources(None).items()}
        settings = dict(all_settings(config, files, grams.fingerprint() if grams else None, template))
        plan = make_plan(root, settings, overwrite=config.overwrite)
        for name in plan.kept:
            report.say(f"{name}: already prepared")
        jobs = _open_jobs(root, config, plan, files)
        if jobs:
            with Pool(config.workers, set_up_worker, grams) as pool:
                _Ingest(config, jobs, template, pool, report).run()
    return Catalogue.open(config.out, list(settings))


def _read_grams(config: PrepareConfig, report: Report) -> Grams | None:
    """Of the texts that no document may share words with; None when there are none."""
    if not config.decontaminate:
        return None
    source = FileSource(tuple(config.decontaminate), text_field=config.text_field)
    with report.stage("decontaminate: read") as advance:
        texts: list[str] = []
        for _, chunk in source.chunks():
            more = [document_text(document, None) for _, document in chunk.documents()]
            texts += more
            advance(len(more), 0)
        return Grams.of(texts, config.decontaminate_ngram)


def _read_template(config: PrepareConfig) -> str | None:
    """Text of --chat-template, or of the built-in chats' own where a tokenizer is trained; what is no Jinja
    is told before hours of reading, not after them."""
    if config.chat_template is None:
        trains = config.tokenizer == TRAIN_TOKENIZER
        return TEMPLATE if config.builtin_chat and trains else None
    try:
        template = config.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {config.chat_template} cannot be read: {error}") from None
    require_syntax(template, f"--chat-template {config.chat_template}")
    return template


def _open_jobs(
    root: Path, config: PrepareConfig, plan: Plan, files: Mapping[str, Sequence[SourceFile]]
) -> list[Job]:
    """The domains that are still to be made; those of which only the last move was missing are moved."""
    jobs = []
    for name in plan.todo:
        staging = Staging(root / name, plan.settings[name])
        if staging.complete:
            staging.publish()
        else:
            survey = Survey(staging.work / "survey")
            jobs.append(Job(name, name in config.chats, plan.settings[name], files[name], staging, survey))
    return jobs


class _Ingest:
    """The stages, one after the other, over the domains that are to be made."""

    def __init__(
        self, config: PrepareConfig, jobs: Sequence[Job], template: str | None, pool: Pool, report: Report
    ) -> None:
        self._config, self._jobs, self._template = config, jobs, template
        self._pool, self._report = pool, report
        self._root = Path(config.out).absolute()

    def run(self) -> None:
        tokenizer = self._known_tokenizer()
        self._sources = self._open_sources(tokenizer)
        self._survey(tokenizer)
        self._settle()
        self._write(tokenizer or self._save(self._train_tokenizer()))

    # --- the tokenizer

    def _known_tokenizer(self) -> TokenizerFiles | None:
        """The folder's own when domains were made or begun with it, else the one to load; None: train one."""
        folder, names = self._root / TOKENIZER, {job.name for job in self._jobs}
        finished = [name for name in find_domains(self._root) if name not in names]
        if finished:
            tokenizer = Catalogue.open(self._root, finished).load_tokenizer()
        elif self._begun_with(folder):
            tokenizer = load_tokenizer(str(folder))
        elif self._config.tokenizer != TRAIN_TOKENIZER:
            return self._save(load_tokenizer(self._config.tokenizer))
        else:
            return None
        if self._template is not None and tokenizer.chat_template != self._template:
            return self._save(tokenizer)
        return TokenizerFiles.of(folder, tokenizer)

    def _begun_with(self, folder: Path) -> bool:
        records = [record for job in self._jobs if (record := read_record(job.staging.work)) is not None]
        if not records or not folder.exists():
            return False
        return tokenizer_fingerprint(folder) in {record.state.tokenizer for record in records}

    def _train_tokenizer(self) -> PreTrainedTokenizerFast:
        with self._report.stage("tokenizer: train") as advance:
            return train_tokenizer(self._train_texts(advance), self._config.vocab_size)

    def _train_texts(self, advance: Advance) -> Iterator[str]:
        for job in self._jobs:
            for marks, chunk in self._known_chunks(job, 0):
                documents = (document for _, document in chunk.documents())
                for document, mark in zip(documents, marks.tolist(), strict=False):
                    if mark == Mark.TRAIN:
                        advance(1, 0)
                        yield document_text(document, None)

    def _save(self, tokenizer: PreTrainedTokenizerFast) -> TokenizerFiles:
        """Into the folder, with the chat template that was given."""
        if self._template is not None:
            tokenizer.chat_template = self._template
        with published(self._root / TOKENIZER) as temporary:
            save_tokenizer(tokenizer, temporary)
        return TokenizerFiles.of(self._root / TOKENIZER, tokenizer)

    # --- the sources

    def _open_sources(self, tokenizer: TokenizerFiles | None) -> Mapping[str, Source]:
        """With the EOS of documents of token ids, when the tokenizer may be the one that made them."""
        given = tokenizer is not None and self._config.tokenizer != TRAIN_TOKENIZER
        sources = self._config.sources(tokenizer.eos_id if tokenizer and given else None)
        for job in self._jobs:
            if list(sources[job.name].files()) != list(job.files):
                raise UserError(SOURCE_CHANGED)
        return sources

    def _known_chunks(self, job: Job, done: int) -> Iterator[tuple[np.ndarray, Chunk]]:
        """The chunks of a survey after the first ``done``, each with its documents' marks, uint8 [n].

        Raises:
            UserError: the source is not cut as it was when it was surveyed.
        """
        known, marks = job.survey.column("chunks"), job.survey.column("marks")
        if done == len(known):
            return
        at = int(known[:done, 2].sum())
        chunks = self._sources[job.name].chunks(Place(*known[done, :2].tolist()))
        for row, found in zip_longest(known[done:].tolist(), chunks):
            if row is None or found is None or found[0] != tuple(row[:2]):
                raise UserError(SOURCE_CHANGED)
            yield np.array(marks[at : at + row[2]]), found[1]
            at += row[2]

    # --- survey

    def _survey(self, tokenizer: TokenizerFiles | None) -> None:
        jobs = [job for job in self._jobs if not job.survey.complete]
        surveyor = Surveyor(self._config.seed, tokenizer)
        groups = [self._survey_tasks(job, surveyor) for job in jobs]
        for job, results in zip(jobs, self._pool.stream(groups), strict=True):
            self._say_if_begun(job, job.survey.documents)
            with (
                self._report.stage(f"{job.name}: read") as advance,
                job.naming_files(),
                writing(job.staging.target),
            ):
                saved = time.monotonic()
                for place, found in results:
                    point("ingest.read")
                    job.survey.append(place, found)
                    advance(len(found.ranks), 0)
                    if time.monotonic() - saved >= self._config.record_seconds:
                        job.survey.save()
                        saved = time.monotonic()
                job.survey.save(complete=True)

    def _survey_tasks(self, job: Job, surveyor: Surveyor) -> Iterator[Task[Place, Surveyed]]:
        start, known = job.survey.next_place
        chunks = self._sources[job.name].chunks(start)
        return (Task(place, surveyor, (chunk,)) for place, chunk in islice(chunks, known, None))

    def _say_if_begun(self, job: Job, documents: int) -> None:
        if documents:
            self._report.say(f"{job.name}: goes on after {documents:,} documents")

    # --- settle

    def _settle(self) -> None:
        """Make the surveys' marks final."""
        unsettled = [job for job in self._jobs if not job.survey.settled]
        if not unsettled:
            return
        with self._report.stage("drop duplicates") as advance, writing(self._root):
            drop_duplicates(list(self._digests()), self._root / ".digests.tmp")
            advance(sum(job.survey.documents for job in unsettled), 0)
            for job in unsettled:
                hold_out(job.survey, self._config.holdout.rank_below(job.survey, job.name))
                _require_documents(job)
                job.survey.save(settled=True)

    def _digests(self) -> Iterator[Digests]:
        """Of all domains of the command, in its order."""
        jobs = {job.name: job for job in self._jobs}
        for name in self._sources:
            yield SurveyedDigests(jobs[name].survey) if name in jobs else published_digests(self._root, name)

    # --- write

    def _write(self, tokenizer: TokenizerFiles) -> None:
        groups = [self._write_tasks(job, tokenizer) for job in self._jobs]
        closing: deque[tuple[Job, DomainWriter]] = deque()  # their last shards are being written
        for job, results in zip(self._jobs, self._pool.stream(groups), strict=True):
            writer = self._writer(job, tokenizer)
            self._write_one(job, writer, results)
            closing.append((job, writer))
            while closing and closing[0][1].closed:
                self._publish(*closing.popleft())
        for left in closing:
            self._publish(*left)

    def _write_tasks(self, job: Job, tokenizer: TokenizerFiles) -> Iterator[Task[int, Encoded]]:
        encoder = Encoder(tokenizer, self._config.sequence_length, job.chat)
        for marks, chunk in self._known_chunks(job, self._writer(job, tokenizer).chunks):
            yield Task(int((marks <= Mark.EVAL).sum()), encoder, (chunk, marks))

    def _writer(self, job: Job, tokenizer: TokenizerFiles) -> DomainWriter:
        """The job's, opened when the second pass comes to it."""
        if job.writer is None:
            config = self._config
            packing: Packing = "best_fit" if job.chat else "concat"
            form = Form(tokenizer, config.sequence_length, packing, config.compression, config.shard_bytes)
            job.writer = DomainWriter(
                job.name, job.staging, job.survey, form, self._pool, config.record_seconds
            )
        return job.writer

    def _write_one(self, job: Job, writer: DomainWriter, results: Iterator[tuple[int, Encoded]]) -> None:
        self._say_if_begun(job, writer.documents)
        total = job.survey.count(Mark.TRAIN) + job.survey.count(Mark.EVAL) - writer.documents
        with self._report.stage(f"{job.name}: write", total) as advance:
            with job.naming_files(), writing(job.staging.target):
                for documents, encoded in results:
                    point("ingest.write")
                    writer.add(encoded)
                    advance(documents, encoded.tokens)
                writer.close()

    def _publish(self, job: Job, writer: DomainWriter) -> None:
        sources = self._sources[job.name].names
        if job.name in self._config.builtin_chat:
            with writing(job.staging.target):
                write_tasks(job.staging.folder / TASKS_FILE, self._known_chunks(job, 0))
        point("ingest.publish")
        info = writer.publish(job.settings, self._config.seed, sources, job.files)
        job.writer = None  # and what it holds
        self._report.say(f"{job.name}: {_summary(info)}")


def _require_documents(job: Job) -> None:
    train, held_out = (job.survey.count(mark) for mark in (Mark.TRAIN, Mark.EVAL))
    if not train or not held_out:
        raise UserError(
            f"empty domain: {job.name} has {train:,} documents to train on and {held_out:,} held out: add "
            f"documents, or change --eval-fraction or --eval-documents"
        )


def _summary(info: DomainInfo) -> str:
    samples = ", ".join(f"{info.splits[split].samples:,} {split} samples" for split in SPLITS)
    dropped = {
        "duplicate documents dropped": info.documents_duplicate,
        "documents with words of the evaluation texts dropped": info.documents_contaminated,
        "conversations without learnt tokens dropped": info.documents_unlearnt,
        "tokens cut off long conversations": info.tokens_dropped,
    }
    always = "duplicate documents dropped"
    return "; ".join([samples, *(f"{n:,} {what}" for what, n in dropped.items() if n or what == always)])
