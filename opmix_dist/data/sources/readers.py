"""Which reader each file gets: by its name, and by the files beside it that describe it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

from fsspec import AbstractFileSystem

from opmix_dist.data.source import Chunk
from opmix_dist.data.sources import mds
from opmix_dist.data.sources.columns import Arrow, Parquet
from opmix_dist.data.sources.listing import MEGATRON_DATA, MEGATRON_INDEX, File, reading
from opmix_dist.data.sources.mds import MdsShard
from opmix_dist.data.sources.megatron import Megatron
from opmix_dist.data.sources.rows import Fields
from opmix_dist.data.sources.text import JsonLines
from opmix_dist.data.sources.tokens import TokenArray, TokenFormat
from opmix_dist.errors import UserError

LINES_SUFFIXES = (".jsonl", ".ndjson")
PACKED_LINES_SUFFIXES = tuple(
    f"{kind}{how}" for kind in (*LINES_SUFFIXES, ".json") for how in (".gz", ".zst")
)
ARRAY_SUFFIXES = (".npy", ".bin", ".raw")
DATASET_STATE = "state.json"
_DATASET_FILES = (DATASET_STATE, "dataset_info.json")
_DATASET_SPLITS = "dataset_dict.json"
_SHARD = ".mds"


class Reader(Protocol):
    """How the chunks of one file are made."""

    def chunks(self, number: int) -> Iterator[Chunk]:
        """All chunks of the file, whose number in its source is ``number``; the same ones every time."""


class Nothing:
    """Reads a file that only describes others: it has no documents, but counts when files are compared."""

    def chunks(self, number: int) -> Iterator[Chunk]:
        return iter(())


WHOLE = None
"""In place of a reader: the file is one document of text, and may share a chunk with those beside it."""
Entry: TypeAlias = tuple[File, Reader | None]
Listed: TypeAlias = dict[tuple[AbstractFileSystem, str], File]


def choose_readers(files: Sequence[File], fields: Fields, form: TokenFormat) -> Iterator[Entry]:
    """Each file with its reader. Files that belong together are found first, by what describes them."""
    listed = {(file.fs, file.path): file for file in files}
    for take in (_take_shards, _take_pairs, _take_datasets):
        yield from take(listed, fields, form)
    for file in listed.values():
        yield file, _reader(file, fields, form)


def _reader(file: File, fields: Fields, form: TokenFormat) -> Reader | None:
    name = file.base
    if name.endswith(LINES_SUFFIXES + PACKED_LINES_SUFFIXES):
        return JsonLines(file, fields)
    if name.endswith(".parquet"):
        return Parquet(file, fields)
    if name.endswith(".arrow"):
        return Arrow(file, fields)
    if name.endswith(ARRAY_SUFFIXES):
        return TokenArray(file, form)
    if name.endswith(_SHARD) or f"{_SHARD}." in name:
        raise UserError(f"{file.name} is a shard that no {mds.INDEX} names: name the folder with its index")
    return WHOLE


def _take_shards(listed: Listed, fields: Fields, form: TokenFormat) -> Iterator[Entry]:
    """Take the indices of MDS shards, and the shards that they name, out of ``listed``."""
    taken: set[str] = set()  # folders may have an index each, and one over all of them
    for key, index in list(listed.items()):
        shards = mds.read_index(index) if index.base == mds.INDEX else None
        if shards is None:
            continue
        found = [(_take_shard(listed, index, shard), shard) for shard in shards]
        found = [(file, shard) for file, shard in found if file.name not in taken]
        taken.update(file.name for file, _ in found)
        yield listed.pop(key), Nothing()
        for position, (file, _) in enumerate(found):
            yield file, MdsShard(found, position, fields, form)


def _take_shard(listed: Listed, index: File, shard: mds.Shard) -> File:
    """The shard's file: decompressed where that is there. It must be, for a document may begin in it."""
    names = [part.basename for part in (shard.raw_data, shard.zip_data) if part]
    there = [listed.pop(index.beside(name), None) or index.sibling(name) for name in names]
    for file in there:
        if file is not None:
            return file
    raise UserError(f"{index.name} names the shard {names[0]}, which is not there: copy it again")


def _take_pairs(listed: Listed, fields: Fields, form: TokenFormat) -> Iterator[Entry]:
    """Take pairs of Megatron's files out of ``listed``, also where only one of them was named."""
    for key, file in list(listed.items()):
        if key not in listed or not file.base.endswith((MEGATRON_DATA, MEGATRON_INDEX)):
            continue
        stem = file.base.rpartition(".")[0]
        index = _beside(listed, file, stem + MEGATRON_INDEX)
        if index is None:
            continue  # an array without a header
        data = _beside(listed, file, stem + MEGATRON_DATA)
        if data is None:
            raise UserError(f"{file.name} describes a {MEGATRON_DATA} that is not there: copy the pair again")
        for one in (data, index):
            listed.pop((one.fs, one.path), None)
        yield data, Megatron(data, index, form)
        yield index, Nothing()


def _beside(listed: Listed, file: File, relative: str) -> File | None:
    return listed.get(file.beside(relative)) or file.sibling(relative)


def _take_datasets(listed: Listed, fields: Fields, form: TokenFormat) -> Iterator[Entry]:
    """Take what ``save_to_disk`` wrote out of ``listed``; other Arrow files beside it are caches."""
    folders = []
    for state in [file for file in listed.values() if file.base == DATASET_STATE]:
        names = _data_files(state)
        if names is None:
            continue
        folders.append(state.path.removesuffix(DATASET_STATE))
        for name in names:
            file = listed.pop(state.beside(name), None) or state.sibling(name)
            if file is None:
                raise UserError(f"{state.name} names {name}, which is not there: save the dataset again")
            yield file, Arrow(file, fields)
    for key, file in list(listed.items()):
        folder = file.path.removesuffix(file.base)
        described = folder in folders and (file.base in _DATASET_FILES or file.base.endswith(".arrow"))
        if described or (file.base == _DATASET_SPLITS and any(one.startswith(folder) for one in folders)):
            del listed[key]


def _data_files(state: File) -> list[str] | None:
    """Names of the Arrow files of a saved dataset, or None when the file is some other JSON.

    Raises:
        UserError: a name that leaves the folder.
    """
    with reading(state.name), state.open() as stream:
        data = stream.read()
    try:
        names = [entry["filename"] for entry in json.loads(data)["_data_files"]]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.arrow", name):
            raise UserError(f"{state.name} names the file {str(name)[:80]!r}, which is none of a dataset's")
    return names
