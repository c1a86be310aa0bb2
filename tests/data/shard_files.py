"""Writes small MDS splits and catalogues whose tokens tell which domain and sample they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from opmix_dist.data.catalogue import (
    FORMAT_VERSION,
    TOKENIZER,
    Catalogue,
    DomainInfo,
    SplitInfo,
    tokenizer_fingerprint,
)
from opmix_dist.data.samples import Compression, DType, Sample, write_index, write_shard
from opmix_dist.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

T = 8
VOCAB = 50_000


def uint16(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def uint32(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


def sample_tokens(domain: int, sample: int, dtype: str = "uint16") -> np.ndarray:
    """[T]: domain, sample, then a running number."""
    return np.array([domain, sample, *range(T - 2)], dtype=dtype)


def sample(domain: int, number: int, dtype: str = "uint16") -> Sample:
    """One document ends in its middle."""
    return Sample(sample_tokens(domain, number, dtype), np.array([T // 2], dtype=np.uint32))


def write_split(
    folder: Path,
    domain: int,
    samples: int,
    *,
    per_shard: int = 7,
    dtype: DType = "uint16",
    compression: Compression = "none",
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, first in enumerate(range(0, samples, per_shard)):
        rows = [sample(domain, i, dtype) for i in range(first, min(first + per_shard, samples))]
        entries.append(write_shard(folder, number, rows, dtype=dtype, spans=False, compression=compression))
    write_index(folder, entries)


def write_domain(
    root: Path, name: str, domain: int, samples: int, *, held_out: int = 9, **options: Any
) -> None:
    """A whole prepared domain, whose tokenizer is the one that :func:`write_tokenizer` writes."""
    write_split(root / name / "train", domain, samples, **options)
    write_split(root / name / "eval", domain, held_out, **options)
    info = domain_info(name, tokenizer_fingerprint(root / TOKENIZER), samples, held_out)
    (root / name / "domain.json").write_text(info.model_dump_json())


def write_catalogue(
    root: Path, sizes: dict[str, int], *, eval_samples: int = 9, first_domain: int = 0, **options: Any
) -> Catalogue:
    write_tokenizer(root)
    for domain, (name, samples) in enumerate(sizes.items(), first_domain):
        write_domain(root, name, domain, samples, held_out=eval_samples, **options)
    return Catalogue.open(root, list(sizes))


def write_tokenizer(root: Path) -> None:
    train_tokenizer(["a b c"], MIN_VOCAB_SIZE).save_pretrained(root / TOKENIZER)


def domain_info(name: str, fingerprint: str, train: int, held_out: int, *, length: int = T) -> DomainInfo:
    return DomainInfo(
        format_version=FORMAT_VERSION,
        name=name,
        tokenizer_fingerprint=fingerprint,
        vocab_size=VOCAB,
        sequence_length=length,
        dtype="uint16",
        splits={
            "train": SplitInfo(samples=train, tokens=train * length, documents=train),
            "eval": SplitInfo(samples=held_out, tokens=held_out * length, documents=held_out),
        },
        documents_duplicate=0,
        documents_empty=0,
        tokens_dropped=0,
        sources=["test"],
        content_sha256="0" * 64,
        seed=0,
        settings={},
    )


def flip_a_byte(path: Path) -> None:
    """The last one; in a shard, of the last sample's last token."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def cache_bytes(cache: Path) -> int:
    """Bytes of a cache's shards at one moment: nothing is added or removed while they are counted."""
    with FileLock(cache / ".locks/room.lock"):
        return sum(path.stat().st_size for path in cache.glob("*/*/shard.*"))
