"""Prepared domains of given documents, sound in every count and hash, for tests that then damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opmix_dist.data.catalogue import (
    DIGESTS_FILE,
    DOMAIN_FILE,
    FORMAT_VERSION,
    SOURCES_FILE,
    SPLITS,
    TOKENIZER,
    DomainInfo,
    SourceInfo,
    Split,
    SplitInfo,
)
from opmix_dist.data.packing import BestFitPacker, ConcatPacker, Documents, Packer, Rows
from opmix_dist.data.samples import INDEX_FILE, Compression, Sample, write_index, write_shard
from opmix_dist.data.survey import document_digest
from opmix_dist.data.tokenizer import MIN_VOCAB_SIZE, TokenizerFiles, load_tokenizer, train_tokenizer

T = 16


def write_tokenizer(root: Path) -> TokenizerFiles:
    """A byte a token, and EOS."""
    tokenizer = train_tokenizer(["a b c"], MIN_VOCAB_SIZE)
    tokenizer.save_pretrained(root / TOKENIZER)
    return TokenizerFiles.of(root / TOKENIZER, tokenizer)


def tokenizer_of(root: Path) -> TokenizerFiles:
    return TokenizerFiles.of(root / TOKENIZER, load_tokenizer(str(root / TOKENIZER)))


def encode(files: TokenizerFiles, text: str, *, eos: bool = True) -> np.ndarray:
    """Ids uint16 [n]."""
    ids = files.backend().encode(text, add_special_tokens=False).ids
    return np.array([*ids, files.eos_id] if eos else ids, np.uint16)


def write_texts_domain(
    root: Path, name: str, train: Sequence[str], held_out: Sequence[str], **options: Any
) -> DomainInfo:
    """Texts end to end, cut every T tokens."""
    files = tokenizer_of(root)
    documents: dict[Split, Documents] = {
        split: Documents.of([encode(files, text) for text in texts], None, "uint16")
        for split, texts in (("train", train), ("eval", held_out))
    }
    rows = {split: pack(ConcatPacker(T, "uint16"), found) for split, found in documents.items()}
    return write_domain(root, name, rows, [*train, *held_out], packing="concat", **options)


def write_chats_domain(root: Path, name: str, chats: Sequence[tuple[str, str]], **options: Any) -> DomainInfo:
    """Questions that are read and answers that are learnt; the last chat is held out."""
    files = tokenizer_of(root)
    pairs = [(encode(files, question, eos=False), encode(files, answer)) for question, answer in chats]

    def documents(some: Sequence[tuple[np.ndarray, np.ndarray]]) -> Documents:
        spans = [np.array([[len(q), len(q) + len(a)]], np.uint32) for q, a in some]
        return Documents.of([np.concatenate(pair) for pair in some], spans, "uint16")

    rows: dict[Split, Rows] = {
        "train": pack(BestFitPacker(T, "uint16"), documents(pairs[:-1])),
        "eval": pack(BestFitPacker(T, "uint16"), documents(pairs[-1:])),
    }
    texts = [question + answer for question, answer in chats]
    return write_domain(root, name, rows, texts, packing="best_fit", **options)


def pack(packer: Packer, documents: Documents) -> Rows:
    return Rows.join([packer.add(documents), packer.flush()])


def write_domain(
    root: Path, name: str, rows: dict[Split, Rows], texts: Sequence[str], *, packing: Any, **options: Any
) -> DomainInfo:
    """All files of a domain.

    Args:
        rows: samples of each split.
        texts: the documents of both, in any order.
        options: as of :func:`write_samples`.
    """
    folder = root / name
    for split in SPLITS:
        write_samples(folder / split, list(rows[split].samples()), **options)
    digests = [document_digest(text) for text in texts]
    source = SourceInfo(
        name="test", bytes=1, documents=len(texts), sha256=hashlib.sha256(b"".join(digests)).hexdigest()
    )
    (folder / SOURCES_FILE).write_text(source.model_dump_json() + "\n")
    (folder / DIGESTS_FILE).write_bytes(b"".join(digests))
    files = tokenizer_of(root)
    info = DomainInfo(
        format_version=FORMAT_VERSION,
        name=name,
        tokenizer_fingerprint=files.fingerprint,
        vocab_size=files.vocab_size,
        sequence_length=T,
        packing=packing,
        dtype="uint16",
        compression=options.get("compression", "none"),
        splits={
            split: SplitInfo(
                samples=len(found), tokens=len(found.tokens.values), documents=len(found.ends.values)
            )
            for split, found in rows.items()
        },
        documents_duplicate=0,
        documents_empty=0,
        tokens_dropped=0,
        sources=["test"],
        sources_sha256=sha256(folder / SOURCES_FILE),
        digests_sha256=sha256(folder / DIGESTS_FILE),
        content_sha256=content_sha256(folder),
        seed=0,
        settings={},
    )
    (folder / DOMAIN_FILE).write_text(info.model_dump_json())
    return info


def write_samples(
    folder: Path, samples: Sequence[Sample], *, per_shard: int = 3, compression: Compression = "none"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spans = samples[0].spans is not None
    entries = [
        write_shard(
            folder, number, samples[first : first + per_shard], dtype="uint16", spans=spans,
            compression=compression,
        )
        for number, first in enumerate(range(0, len(samples), per_shard))
    ]  # fmt: skip
    write_index(folder, entries)


def change_domain(root: Path, name: str, **fields: Any) -> None:
    """Change ``domain.json``, and what it says of the indexes to what they are."""
    file = root / name / DOMAIN_FILE
    plain = {**json.loads(file.read_text()), "content_sha256": content_sha256(root / name), **fields}
    file.write_text(json.dumps(plain))


def content_sha256(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / s / INDEX_FILE).read_bytes() for s in SPLITS)).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
