"""Writes small MDS splits and catalogues whose tokens tell which domain and sample they are."""

from pathlib import Path

import numpy as np

from opmix_dist.data.catalogue import Catalogue, DomainInfo, SplitInfo
from opmix_dist.data.mds import import_streaming

T = 8
VOCAB = 50_000


def sample_tokens(domain: int, sample: int, dtype: str = "uint16") -> np.ndarray:
    """[T]: domain, sample, then a running number."""
    return np.array([domain, sample, *range(T - 2)], dtype=dtype)


def write_split(
    folder: Path, domain: int, samples: int, *, per_shard: int = 7, dtype: str = "uint16", **options: str
) -> None:
    import_streaming()
    from streaming import MDSWriter

    # bytes: about 400 of header, then 4 of offset and the tokens per sample
    size_limit = 400 + per_shard * (4 + T * np.dtype(dtype).itemsize)
    columns = {"tokens": f"ndarray:{dtype}:{T}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=size_limit, **options) as writer:
        for sample in range(samples):
            writer.write({"tokens": sample_tokens(domain, sample, dtype)})


def write_catalogue(root: Path, sizes: dict[str, int], *, eval_samples: int = 9) -> Catalogue:
    for domain, (name, samples) in enumerate(sizes.items()):
        write_split(root / name / "train", domain, samples)
        write_split(root / name / "eval", domain, eval_samples)
    return Catalogue(root, tuple(sizes), {name: _info(name, n, eval_samples) for name, n in sizes.items()})


def _info(name: str, train: int, held_out: int) -> DomainInfo:
    return DomainInfo(
        format_version=1,
        name=name,
        tokenizer_fingerprint="0" * 64,
        vocab_size=VOCAB,
        sequence_length=T,
        dtype="uint16",
        splits={
            "train": SplitInfo(samples=train, tokens=train * T, documents=train),
            "eval": SplitInfo(samples=held_out, tokens=held_out * T, documents=held_out),
        },
        documents_duplicate=0,
        documents_empty=0,
        tokens_dropped=0,
        sources=["test"],
        content_sha256="0" * 64,
        seed=0,
        settings={},
    )
