"""How fast batches come: ours, StreamingDataset, and memory-mapped tokens, side by side in one run.

    python -m benchmarks.loader [--quick] [--out benchmarks/results/loader.md]

1. Local shards: samples per second of each loader over the same shards, at 1 and 2 workers. A flat file of
   tokens under numpy's memory map, in a DataLoader, is the limit of what Python can do.
2. Domains: seconds to plan a batch, to hand one out, and to start, at 8 to 2,000 domains.
3. An object store with latency (a real S3 server on this machine): time to read, with and without fetching
   ahead, with a bounded cache, and by StreamingDataset.

Every measurement is repeated, with the loaders taking turns; a row is a mean with its standard deviation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.machine import describe, mean_and_deviation, table
from opmix_dist.data.catalogue import TOKENIZER, Catalogue, tokenizer_fingerprint
from opmix_dist.data.loader import MixtureLoader, ReadOptions
from opmix_dist.data.mds import import_streaming
from opmix_dist.data.remote import open_catalogue
from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.data.samples import Sample, write_index, write_shard
from opmix_dist.data.store import ShardStore
from tests.data.shard_files import domain_info, write_tokenizer
from tests.s3_server import s3_server

T = 2048
BATCH = 64
MAPPED = "mapped.npy"


# --- data ---


def write_domains(root: Path, domains: int, samples: int, *, per_shard: int) -> Catalogue:
    """Domains of random tokens, of equal size, as `opmix prepare` writes them."""
    root.mkdir(parents=True)
    write_tokenizer(root)
    names = [f"domain-{number:04}" for number in range(domains)]
    rng = np.random.default_rng(0)
    for name in names:
        for split, count in (("train", samples), ("eval", 1)):
            _write_split(root / name / split, rng, count, per_shard)
        info = domain_info(name, tokenizer_fingerprint(root / TOKENIZER), samples, 1, length=T)
        (root / name / "domain.json").write_text(info.model_dump_json())
    return Catalogue.open(root, names)


def _write_split(folder: Path, rng: np.random.Generator, samples: int, per_shard: int) -> None:
    folder.mkdir(parents=True)
    tokens = rng.integers(0, 50_000, (samples, T), dtype=np.uint16)
    ends = np.array([T // 3], dtype=np.uint32)
    entries = []
    for number, first in enumerate(range(0, samples, per_shard)):
        rows = [Sample(row, ends) for row in tokens[first : first + per_shard]]
        entries.append(write_shard(folder, number, rows, dtype="uint16", spans=False, compression="none"))
    write_index(folder, entries)


# --- the loaders; each yields how many samples a batch has ---


def ours(catalogue: Catalogue, workers: int, **options: Any) -> Iterator[int]:
    weights = dict.fromkeys(catalogue.names, 1 / len(catalogue.names))
    loader = MixtureLoader(
        catalogue,
        weights,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=1,
        num_workers=workers,
        **options,
    )
    try:
        for batch in loader:
            yield len(batch.batch)
    finally:
        loader.close()


def streaming_dataset(
    catalogue: Catalogue, workers: int, batching: str, remote: str | None = None, **options: Any
) -> Iterator[int]:
    import_streaming()
    from streaming import Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [
        Stream(
            local=str(catalogue.split_dir(name, "train")),
            remote=f"{remote}/{name}/train" if remote else None,
            proportion=1 / len(catalogue.names),
        )
        for name in catalogue.names
    ]
    dataset = StreamingDataset(
        streams=streams, shuffle=True, batch_size=BATCH, batching_method=batching, **options
    )
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True):
        yield len(batch["tokens"])


class _Mapped(Dataset[np.ndarray]):
    def __init__(self, path: Path) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.asarray(self.tokens[rows])


def mapped(path: Path, workers: int) -> Iterator[int]:
    dataset = _Mapped(path)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 40)  # without end
    for batch in DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=lambda rows: rows
    ):
        yield len(torch.from_numpy(batch.astype(np.int64)))


# --- measuring ---


def rate(make: Callable[[], Iterator[int]], seconds: float) -> tuple[float, float]:
    """Samples per second after the first batch, and seconds until it came; an epoch's end begins another."""
    began = time.perf_counter()
    batches = make()
    next(batches)
    first = time.perf_counter() - began
    began, samples = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = make()
            continue
        samples += batch
    close(batches)
    return samples / passed, first


def close(batches: Iterator[int]) -> None:
    getattr(batches, "close", lambda: None)()


def local(folder: Path, quick: bool) -> str:
    samples, repeats, seconds = (512, 1, 1.0) if quick else (4096, 3, 6.0)
    catalogue = write_domains(folder / "local", 8, samples, per_shard=2048)
    np.save(folder / MAPPED, np.random.default_rng(0).integers(0, 50_000, (8 * samples, T), dtype=np.uint16))
    loaders: dict[str, Callable[[int], Iterator[int]]] = {
        "opmix_dist": lambda workers: ours(catalogue, workers),
        "opmix_dist, document masks": lambda workers: ours(
            catalogue, workers, reading=ReadOptions(mask_documents=True)
        ),
        "StreamingDataset, stratified": lambda workers: streaming_dataset(catalogue, workers, "stratified"),
        "StreamingDataset, random": lambda workers: streaming_dataset(catalogue, workers, "random"),
        "memory-mapped tokens": lambda workers: mapped(folder / MAPPED, workers),
    }
    rows = []
    for workers in (1, 2):
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        starts: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(repeats):
            for name, make in loaders.items():
                one, start = rate(partial(make, workers), seconds)
                rates[name].append(one)
                starts[name].append(start)
        base = np.mean(rates["StreamingDataset, stratified"])
        for name in loaders:
            ratio = np.mean(rates[name]) / base
            first = mean_and_deviation(starts[name], 2)
            rows.append([name, workers, mean_and_deviation(rates[name]), f"{ratio:.1f}", first])
    shutil.rmtree(catalogue.root)
    head = ["loader", "workers", "samples/s", "over StreamingDataset, stratified", "first batch, s"]
    text = (
        f"8 domains of {samples:,} samples of {T:,} tokens, {BATCH} samples a batch; shards of 2,048 samples "
        f"in the page cache; {repeats} repeats of {seconds:.0f} s, loaders taking turns."
    )
    return f"## Local shards\n\n{text}\n\n{table(head, rows)}\n"


def domains(folder: Path, quick: bool) -> str:
    rows = []
    counts = (8, 64) if quick else (8, 64, 512, 2000)
    for count in counts:
        # the shards of a large corpus: planning sees sizes only, so no file of them is needed
        sizes = {f"domain-{i:04}": np.full(16_000 // count + 1, 8192) for i in range(count)}
        weights = np.random.default_rng(count).dirichlet(np.ones(count))
        began = time.perf_counter()
        sampler = MixtureSampler(
            sizes, dict(zip(sizes, weights.tolist(), strict=True)), global_batch_size=512, seed=1
        )
        sampler.draw()
        start = time.perf_counter() - began
        plans = _times(sampler.draw, 50 if quick else 300)
        catalogue = write_domains(folder / f"d{count}", count, max(1, 4000 // count), per_shard=4000)
        cache = Path(shutil.copytree(catalogue.root, folder / f"cache-d{count}"))
        hand_out, opened, memory = _in_child(_hand_out, catalogue.root, 10 if quick else 60)
        from_store, _, _ = _in_child(_hand_out, catalogue.root, 10 if quick else 60, cache)
        shutil.rmtree(catalogue.root)
        shutil.rmtree(cache)
        rows.append(
            [
                f"{count:,}",
                mean_and_deviation([1e3 * t for t in plans], 2),
                f"{start:.2f}",
                mean_and_deviation([1e3 * t for t in hand_out], 1),
                mean_and_deviation([1e3 * t for t in from_store], 1),
                f"{opened:.2f}",
                f"{memory / 1024:.0f}",
            ]
        )
    head = [
        "domains",
        "plan a batch of 512, ms",
        "sampler's start, s",
        f"hand out {BATCH} samples, ms",
        "through a store, all cached, ms",
        "loader's start, s",
        "peak memory, MiB",
    ]
    text = (
        "Planning: 16,000 shards of 8,192 samples in all, weights from a Dirichlet distribution, all that "
        f"a batch of 512 needs but its tokens. Handing out: about 4,000 samples in all, {BATCH} of {T:,} "
        "tokens a batch, no workers; the start opens every domain and reads its index."
    )
    return f"## Number of domains\n\n{text}\n\n{table(head, rows)}\n"


def _times(work: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def _hand_out(root: Path, count: int, cache: Path | None = None) -> tuple[list[float], float, int]:
    """Times of batches, of the start, and the peak memory in KiB."""
    import_streaming()
    began = time.perf_counter()
    catalogue = _open(f"file://{root}", cache) if cache else Catalogue.open(root)
    batches = ours(catalogue, 0)
    next(batches)
    opened = time.perf_counter() - began
    times = _times(lambda: next(batches), count)
    return times, opened, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def remote(folder: Path, quick: bool) -> str:
    samples, repeats, latency = (512, 1, 0.02) if quick else (2048, 3, 0.1)
    catalogue = write_domains(folder / "remote", 8, samples, per_shard=128)
    batches, step_s = 8 * samples // BATCH, 0.02
    rows = []
    with _served(catalogue.root, latency) as url:
        shard = 128 * T * 2

        def theirs(cache: Path, **options: Any) -> Iterator[int]:
            mirror = Catalogue(cache, catalogue.names, catalogue.domains)
            return streaming_dataset(mirror, 1, "stratified", url, **options)

        half = 4 * samples * T * 2
        cases: dict[tuple[str, str], Callable[[Path], Iterator[int]]] = {
            ("opmix_dist", "all"): lambda cache: ours(_open(url, cache), 1),
            ("opmix_dist, fetching when read", "all"): lambda cache: ours(
                _open(url, cache), 1, reading=ReadOptions(fetch_ahead=0)
            ),
            ("StreamingDataset, stratified", "all"): theirs,
            ("opmix_dist", "a shard of each domain"): lambda cache: ours(
                _open(url, cache), 1, shuffle_block=128
            ),
            ("opmix_dist, half of it cached", "a shard of each domain"): lambda cache: ours(
                _open(url, cache, limit_bytes=half), 1, shuffle_block=128
            ),
            ("StreamingDataset, stratified", "blocks of 1,024"): lambda cache: theirs(
                cache, shuffle_block_size=1024
            ),
        }
        for (name, shuffled), make in cases.items():
            times, peaks = [], []
            for repeat in range(repeats):
                cache = folder / f"cache-{len(rows)}-{repeat}"
                seconds, peak = _train(make(cache), batches, step_s, cache)
                times.append(seconds)
                peaks.append(peak)
                shutil.rmtree(cache)
            rows.append([name, shuffled, mean_and_deviation(times, 1), f"{max(peaks) / 2**20:.0f}"])
    total = 8 * samples * T * 2 / 2**20
    text = (
        f"8 domains, {total:.0f} MiB in shards of {shard / 2**20:.1f} MiB, an S3 server in another process "
        f"with {latency * 1e3:.0f} ms added to every request; one epoch of {batches} batches of {BATCH} "
        f"samples, each followed by {step_s * 1e3:.0f} ms of computing ({batches * step_s:.0f} s in all), 1 "
        f"worker, an empty cache; {repeats} repeats. Where all samples are shuffled together, the first "
        "batches need all shards."
    )
    head = ["loader", "samples shuffled together", "seconds", "largest cache, MiB"]
    return f"## An object store\n\n{text}\n\n{table(head, rows)}\n"


@contextmanager
def _served(folder: Path, latency_s: float) -> Iterator[str]:
    """The URL of a copy of ``folder`` that another process serves, found through the environment."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, folder, latency_s))
    process.start()
    url, environment = mine.recv()
    os.environ.update(environment)
    yield url
    mine.send("stop")
    process.join()


def _serve(pipe: Connection, folder: Path, latency_s: float) -> None:
    with s3_server() as server:
        url = server.upload(folder, "data")
        server.latency_s = latency_s
        pipe.send((url, {name: value for name, value in os.environ.items() if name.startswith("AWS_")}))
        pipe.recv()


def _open(url: str, cache: Path, limit_bytes: int | None = None) -> Catalogue:
    return open_catalogue(url, None, ShardStore(url, cache, limit_bytes=limit_bytes))


def _train(batches: Iterator[int], count: int, step_s: float, cache: Path) -> tuple[float, int]:
    """Seconds for ``count`` batches with a pause after each, and the most bytes that the cache held."""
    began, peak = time.perf_counter(), 0
    for number in range(count):
        next(batches)
        time.sleep(step_s)
        if number % 10 == 0:
            peak = max(peak, sum(_size(path) for path in cache.rglob("shard.*")))
    close(batches)
    return time.perf_counter() - began, peak


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="repeatable; default: all")
    arguments = parser.parse_args()
    packages = ("torch", "numpy", "mosaicml-streaming", "s3fs", "moto")
    text = f"# Loader\n\n`python -m benchmarks.loader`: {describe(*packages)}.\n"
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.part or PARTS:
            part = PARTS[name](Path(folder), arguments.quick)
            print(part, flush=True)
            text += f"\n{part}"
    if arguments.out:
        arguments.out.write_text(text)


PARTS: dict[str, Callable[[Path, bool], str]] = {"local": local, "domains": domains, "remote": remote}

if __name__ == "__main__":
    main()
