"""Token ids in Megatron-LM's format: a ``.bin`` with the ids, an ``.idx`` with sequences and documents."""

from __future__ import annotations

import os
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from opmix_dist.data.sources.listing import (
    CHUNK_BYTES,
    MEGATRON_DATA,
    MEGATRON_INDEX,
    File,
    one_line,
    reading,
)
from opmix_dist.data.sources.tokens import MAX_DOCUMENT_TOKENS, TokenFormat, TokensChunk
from opmix_dist.errors import UserError

_BATCH_DOCUMENTS = 1 << 12


@dataclass(frozen=True)
class Megatron:
    """A pair of files. The document index decides what a document is; its sequences are joined."""

    data: File
    index: File
    form: TokenFormat

    def chunks(self, number: int) -> Iterator[TokensChunk]:
        name = self.data.name
        eos_id = self.form.eos(name)
        with reading(name), _local_prefix(self.data, self.index) as prefix, _sound(name):
            if not self.data.size:
                raise ValueError("the former is empty")
            dataset = _open(prefix)
            for sequences in _document_groups(dataset):
                parts, ends = _read(dataset, sequences)
                yield TokensChunk(number, name, parts, eos_id, ends)


def _open(prefix: str) -> Any:
    """An IndexedDataset, less its ``__del__``: that complains when the constructor has failed."""
    base = _import_indexed_dataset().IndexedDataset
    return type(base.__name__, (base,), {"__del__": lambda dataset: None})(prefix)


def _document_groups(dataset: Any) -> Iterator[np.ndarray]:
    """Sequence numbers [k + 1] at which k documents begin, and the last one ends; ``CHUNK_BYTES`` at most,
    or one document.
    """
    bounds, lengths = dataset.document_indices, dataset.sequence_lengths
    first = 0
    while first < len(bounds) - 1:
        near = bounds[first : first + 1 + _BATCH_DOCUMENTS]
        if near[0] < 0 or near[-1] > len(lengths) or np.any(np.diff(near) < 0):
            raise ValueError(f"its documents near number {first} are not in order")
        sizes = lengths[near[0] : near[-1]].astype(np.int64)
        if np.any(sizes < 0):
            raise ValueError(f"a sequence near document {first} has a negative length")
        ends = np.append(0, np.cumsum(sizes))[near[1:] - near[0]]  # tokens [k] up to each document's end
        tokens = CHUNK_BYTES // np.dtype(dataset.index.dtype).itemsize
        count = max(1, int(np.searchsorted(ends, tokens, side="right")))
        if ends[0] > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"document {first} has {ends[0]} tokens, more than {MAX_DOCUMENT_TOKENS}")
        yield near[: count + 1]
        first += count


def _read(dataset: Any, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] of the documents that begin at ``sequences`` [k + 1], and their ends, int64 [k]."""
    numbers = range(int(sequences[0]), int(sequences[-1]))
    parts = [np.array(dataset[i]) for i in numbers]  # copies: the file's memory map does not outlive the file
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    ends = np.append(0, np.cumsum(sizes))[sequences[1:] - sequences[0]]
    return np.concatenate([np.empty(0, dataset.index.dtype), *parts]), ends


@contextmanager
def _sound(name: str) -> Iterator[None]:
    """Turn what a damaged index makes megatron raise into a UserError."""
    try:
        yield
    except (AssertionError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise UserError(
            f"{name} and its {MEGATRON_INDEX} do not fit: {one_line(error)}; copy them again"
        ) from error


@contextmanager
def _local_prefix(data: File, index: File) -> Iterator[str]:
    """What to open: the pair where it is, or a temporary copy, as megatron maps files into memory."""
    if isinstance(data.fs, LocalFileSystem):
        yield data.path.removesuffix(MEGATRON_DATA)
        return
    with tempfile.TemporaryDirectory(prefix="opmix.") as folder:
        prefix = os.path.join(folder, "pair")
        data.fs.get_file(data.path, prefix + MEGATRON_DATA)
        index.fs.get_file(index.path, prefix + MEGATRON_INDEX)
        yield prefix


def _import_indexed_dataset() -> ModuleType:
    """The module, without the warnings that kernels which nothing here uses are missing. Takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Transformer Engine")
        try:
            from megatron.core.datasets import indexed_dataset
        except ImportError as error:
            raise UserError(
                f"{MEGATRON_INDEX} files need the package megatron-core: install it ({error})"
            ) from error
    return indexed_dataset
