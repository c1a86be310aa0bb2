"""``opmix prepare`` against `tokenizers` alone, on the same texts, cores and number of processes.

    .venv/bin/python -m benchmarks.ingest

The corpus is the built-in text, repeated with other words until it has the size wanted, as JSON lines in
zstd. `tokenizers` alone gets the texts in memory, divided among processes that have loaded the tokenizer
before the clock starts, and drops its results. ``opmix prepare`` reads the file twice, drops duplicates,
packs and writes shards; what it takes for three documents, which is to start Python and to import, is shown
by itself and subtracted. Runs alternate, and of several the fastest counts. CPU seconds and memory
(proportional set size) are those of all processes together, looked at every 0.1 s. Shards are small, so that
either corpus has several.

A second table is of the stage between the two passes, duplicates and the split, which sees all documents at
once: digests are drawn, a tenth of the first million is one document. Memory is what is not backed by files.

Results go to benchmarks/results/ingest.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import psutil
import pyarrow

from benchmarks.machine import describe, table
from opmix_dist.data.builtin import builtin_domains
from opmix_dist.data.dedupe import SurveyedDigests, drop_duplicates
from opmix_dist.data.encode import BATCH_DOCUMENTS
from opmix_dist.data.source import Place
from opmix_dist.data.survey import (
    BLOCK_DOCUMENTS,
    DIGEST_BYTES,
    Holdout,
    Mark,
    Survey,
    Surveyed,
    hold_out,
)
from opmix_dist.data.tokenizer import TokenizerFiles, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "ingest.md"
PACKAGES = ("tokenizers", "numpy", "pyarrow", "mosaicml-streaming")
VOCAB_SIZE = 16_384
SHARD_BYTES = 4 << 20
WORD = re.compile(r"[a-z]{5,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[32, 128], help="sizes of the corpus")
    parser.add_argument("--documents", type=int, nargs="+", default=[3_000_000, 12_000_000])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    workers, repeats = arguments.workers, arguments.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder / "tokenizer")
        begin = Usage.best([start_up(folder, tokenizer, workers) for _ in range(repeats)])
        rows = [measure(folder, size, tokenizer, workers, repeats) for size in arguments.megabytes]
        settled = [settle_apart(folder, documents) for documents in arguments.documents]
    text = report(rows, begin, workers, repeats) + "\n\n" + settle_table(settled)
    print(text)
    RESULT.write_text(text + "\n")


# --- the corpus --------------------------------------------------------------------------------------------


def builtin_texts() -> list[str]:
    chunks = [chunk for source in builtin_domains().values() for _, chunk in source.chunks()]
    return [text for chunk in chunks for _, text in chunk.documents() if isinstance(text, str)]


def make_tokenizer(folder: Path) -> TokenizerFiles:
    train_tokenizer(builtin_texts()[::4], VOCAB_SIZE).save_pretrained(folder)
    return TokenizerFiles.of(folder, load_tokenizer(str(folder)))


def corpus(megabytes: int) -> Iterator[str]:
    """Texts of so many million characters; in each copy of a text another of its longer words is reversed."""
    texts, size = builtin_texts(), 0
    for copy in itertools.count():
        for number, text in enumerate(texts):
            words = WORD.findall(text)
            word = words[copy % len(words)] if words else ""
            changed = f"{copy} {number}\n{text.replace(word, word[::-1]) if copy and word else text}"
            yield changed  # its numbers keep it from being a duplicate
            size += len(changed)
            if size >= megabytes * 1_000_000:
                return


def write_corpus(file: Path, texts: Sequence[str]) -> None:
    file.parent.mkdir(parents=True)
    with pyarrow.output_stream(str(file), compression="zstd") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}).encode() + b"\n")


# --- what is measured --------------------------------------------------------------------------------------


@dataclass
class Usage:
    """Of a run; of several, the least seconds of each kind and the most memory."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0

    @classmethod
    def best(cls, runs: Sequence[Usage]) -> Usage:
        return cls(
            min(run.seconds for run in runs),
            min(run.cpu_seconds for run in runs),
            max(run.peak_bytes for run in runs),
        )


@dataclass
class Row:
    """One corpus."""

    megabytes: int
    documents: int
    tokens: int
    alone: Usage
    prepare: Usage


def measure(folder: Path, megabytes: int, tokenizer: TokenizerFiles, workers: int, repeats: int) -> Row:
    texts = list(corpus(megabytes))
    file = folder / str(megabytes) / "corpus.jsonl.zst"
    write_corpus(file, texts)
    out = file.parent / "out"
    alone, whole = [], []
    for _ in range(repeats):
        alone.append(tokenizers_alone(texts, tokenizer, workers))
        shutil.rmtree(out, ignore_errors=True)
        whole.append(run_prepare(file, out, tokenizer, workers))
    info = json.loads((out / "web" / "domain.json").read_text())
    assert not info["documents_duplicate"], "tokenizers alone would have more to do"
    tokens = sum(split["tokens"] for split in info["splits"].values())
    documents = sum(split["documents"] for split in info["splits"].values())
    return Row(megabytes, documents, tokens, Usage.best(alone), Usage.best(whole))


def tokenizers_alone(texts: Sequence[str], tokenizer: TokenizerFiles, workers: int) -> Usage:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(workers + 1), context.Queue()
    batches = [texts[at : at + BATCH_DOCUMENTS] for at in range(0, len(texts), BATCH_DOCUMENTS)]
    processes = [
        context.Process(target=encode, args=(batches[number::workers], tokenizer, barrier, results))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    began = time.perf_counter()
    cpu = sum(results.get() for _ in processes)
    return Usage(time.perf_counter() - began, cpu)


def encode(
    batches: Sequence[Sequence[str]],
    tokenizer: TokenizerFiles,
    barrier: Barrier,
    results: multiprocessing.Queue[float],
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizer.backend()
    batches = [[text.encode().decode() for text in batch] for batch in batches]  # no page shared any more
    barrier.wait()
    began = time.process_time()
    for batch in batches:
        backend.encode_batch_fast(batch, add_special_tokens=False)
    results.put(time.process_time() - began)


def start_up(folder: Path, tokenizer: TokenizerFiles, workers: int) -> Usage:
    shutil.rmtree(folder / "few", ignore_errors=True)
    file = folder / "few" / "corpus.jsonl.zst"
    write_corpus(file, ["one", "two", "three"])
    return run_prepare(file, folder / "few" / "out", tokenizer, workers)


def run_prepare(file: Path, out: Path, tokenizer: TokenizerFiles, workers: int) -> Usage:
    command = [sys.executable, "-m", "opmix_dist.cli", "prepare", "--domain", f"web={file}"]
    command += ["--out", str(out), "--workers", str(workers), "--eval-documents", "1"]
    command += ["--tokenizer", tokenizer.folder, "--sequence-length", "2048"]
    command += ["--shard-bytes", str(SHARD_BYTES)]
    began = time.perf_counter()
    child = psutil.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    peak, cpu = 0, {}
    while child.poll() is None:
        for process in (child, *child.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                used = process.cpu_times()
                cpu[process.pid] = used.user + used.system
        peak = max(peak, memory(child))
        time.sleep(0.1)
    assert child.returncode == 0, child.stderr.read().decode()
    return Usage(time.perf_counter() - began, sum(cpu.values()), peak)


@dataclass
class Settled:
    """The stage between the passes."""

    documents: int
    duplicates: int
    seconds: float
    peak_bytes: int = 0


def settle_apart(folder: Path, documents: int) -> Settled:
    """In a process of its own, whose memory is looked at."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=settle, args=(folder / "survey", documents, results))
    process.start()
    watched, peak = psutil.Process(process.pid), 0
    while process.is_alive() and results.empty():
        with contextlib.suppress(psutil.Error):
            peak = max(peak, watched.memory_full_info().uss)
        time.sleep(0.02)
    settled = results.get()
    process.join()
    return dataclasses.replace(settled, peak_bytes=peak)


def settle(folder: Path, documents: int, results: multiprocessing.Queue[Settled]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    survey, rng = Survey(folder), np.random.default_rng(documents)
    for number, begin in enumerate(range(0, documents, BLOCK_DOCUMENTS)):
        size = min(BLOCK_DOCUMENTS, documents - begin)
        digests = rng.integers(0, 256, (size, DIGEST_BYTES), dtype=np.uint8)
        if not number:
            digests[: size // 10] = 7
        zeros = np.zeros(size, np.uint8)
        survey.append(Place(0, number), Surveyed(digests, rng.random(size), zeros, zeros.astype(np.uint32)))
    survey.save(complete=True)
    began = time.perf_counter()
    drop_duplicates([SurveyedDigests(survey)], folder / "scratch")
    hold_out(survey, Holdout(0.01, exactly=10_000).rank_below(survey, "drawn"))
    results.put(Settled(documents, survey.count(Mark.DUPLICATE), time.perf_counter() - began))


def settle_table(rows: Sequence[Settled]) -> str:
    cells = [
        [f"{row.documents:,}", f"{row.duplicates:,}", f"{row.seconds:.1f} s", megabytes(row.peak_bytes)]
        for row in rows
    ]
    return table(["documents", "duplicates", "duplicates and split", "peak memory"], cells)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def memory(root: psutil.Process) -> int:
    """Proportional set size, in bytes, of a process and all below it."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def report(rows: Sequence[Row], begin: Usage, workers: int, repeats: int) -> str:
    def cells(row: Row) -> list[str]:
        seconds, cpu = row.prepare.seconds - begin.seconds, row.prepare.cpu_seconds - begin.cpu_seconds
        return [
            f"{row.megabytes} MB",
            f"{row.documents:,}",
            f"{row.tokens:,}",
            f"{row.alone.seconds:.1f} s",
            f"{seconds:.1f} s",
            f"**{seconds / row.alone.seconds:.2f}**",
            f"{row.alone.cpu_seconds:.1f} s",
            f"{cpu:.1f} s",
            f"**{cpu / row.alone.cpu_seconds:.2f}**",
            megabytes(row.prepare.peak_bytes),
        ]

    head = ["corpus", "documents", "tokens", "alone", "prepare", "ratio", "CPU alone", "CPU prepare", "ratio"]
    return "\n".join(
        [
            "# `opmix prepare` against `tokenizers` alone\n",
            f"{describe(*PACKAGES)}; {workers} worker processes, the best of {repeats} runs each.",
            "`python -m benchmarks.ingest`; its docstring says what is measured.\n",
            f"Load average at the end: {os.getloadavg()[2]:.1f} over 15 minutes. Where it is above the "
            "number of workers, other jobs had the cores too: CPU seconds compare then, seconds do not.\n",
            f"Start-up, which is subtracted: {begin.seconds:.1f} s, {begin.cpu_seconds:.1f} CPU seconds.\n",
            table([*head, "peak memory"], [cells(row) for row in rows]),
        ]
    )


if __name__ == "__main__":
    main()
