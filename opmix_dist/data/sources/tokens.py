"""Token ids that were made elsewhere: arrays on disk, cut into documents where the EOS token stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from tokenize import TokenError
from typing import IO, Literal, get_args

import numpy as np

from opmix_dist.data.source import Document
from opmix_dist.data.sources.listing import CHUNK_BYTES, File, reading
from opmix_dist.errors import UserError

TokenDType = Literal["uint16", "int32", "uint32", "int64"]
MAX_DOCUMENT_TOKENS = 1 << 26
_NUMPY_MAGIC = np.lib.format.MAGIC_PREFIX
WIDTH_IDS = 64
_MAX_ID = (1 << 32) - 1


@dataclass(frozen=True)
class TokenFormat:
    """What the files do not say of themselves."""

    eos_id: int | None = None
    """Of the tokenizer that made them."""
    dtype: TokenDType | None = None
    """Of arrays without a header."""

    def eos(self, name: str) -> int:
        """The EOS; UserError when it is not known."""
        if self.eos_id is None:
            raise UserError(f"{name} holds token ids: name the tokenizer that made them with --tokenizer")
        return self.eos_id

    def array_dtype(self, name: str) -> np.dtype:
        """Little-endian, as all writers of such files make it; UserError when it is not known."""
        if self.dtype is None:
            choices = ", ".join(get_args(TokenDType))
            raise UserError(
                f"{name} does not say how its token ids are stored: give --token-dtype ({choices})"
            )
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class TokensChunk:
    """Whole documents of token ids; they end at ``ends``, or behind each EOS where that is None."""

    number: int
    name: str
    tokens: np.ndarray  # integers [n]
    eos_id: int
    ends: np.ndarray | None = None  # int64 [k], ascending, the last one n

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Ids [length] as uint32; an EOS at a document's end is left out."""
        if len(self.tokens) and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) <= _MAX_ID:
            raise UserError(f"{self.name} holds ids below 0 or above {_MAX_ID}: check --token-dtype")
        tokens = self.tokens.astype(np.uint32)
        for begin, end in pairwise([0, *self._ends(tokens).tolist()]):
            document = tokens[begin:end]
            yield self.number, document[:-1] if len(document) and document[-1] == self.eos_id else document

    def _ends(self, tokens: np.ndarray) -> np.ndarray:
        if self.ends is not None:
            return self.ends
        found = np.flatnonzero(tokens == self.eos_id) + 1
        return found if found.size and found[-1] == len(tokens) else np.append(found, len(tokens))


@dataclass(frozen=True)
class TokenArray:
    """A file with one array of token ids, with numpy's header or without."""

    file: File
    form: TokenFormat

    def chunks(self, number: int) -> Iterator[TokensChunk]:
        eos_id = self.form.eos(self.file.name)
        with reading(self.file.name), self.file.open() as stream:
            pieces = _array_pieces(stream, self.file, self.form)
            for tokens in cut_at_eos(pieces, eos_id, self.file.name):
                yield TokensChunk(number, self.file.name, tokens, eos_id)


def cut_at_eos(pieces: Iterable[np.ndarray], eos_id: int, name: str) -> Iterator[np.ndarray]:
    """The tokens of ``pieces`` in arrays that each end in EOS; the last one may lack it.

    Raises:
        UserError: there is no EOS at all, or none in ``MAX_DOCUMENT_TOKENS`` tokens.
    """
    held: list[np.ndarray] = []
    tokens_held, seen = 0, False
    for piece in pieces:
        found = np.flatnonzero(piece == eos_id)
        if found.size:
            cut, seen = int(found[-1]) + 1, True
            yield np.concatenate([*held, piece[:cut]])
            held, tokens_held, piece = [], 0, piece[cut:]
        held.append(piece)
        tokens_held += len(piece)
        if tokens_held > MAX_DOCUMENT_TOKENS:
            raise _no_eos(name, eos_id, tokens_held)
    if tokens_held and not seen:
        raise _no_eos(name, eos_id, tokens_held)
    if tokens_held:
        yield np.concatenate(held)


def _no_eos(name: str, eos_id: int, tokens: int) -> UserError:
    return UserError(
        f"{name}: no EOS (id {eos_id}) in {tokens} tokens: is it the right tokenizer, and --token-dtype?"
    )


def _array_pieces(stream: IO[bytes], file: File, form: TokenFormat) -> Iterator[np.ndarray]:
    magic = stream.read(len(_NUMPY_MAGIC))
    stream.seek(0)
    dtype = _numpy_header(stream, file) if magic == _NUMPY_MAGIC else form.array_dtype(file.name)
    left = file.size - stream.tell()
    if left % dtype.itemsize:
        raise UserError(f"{file.name}: {left} bytes are no whole number of {dtype.name}: check --token-dtype")
    begin = left
    while left:
        data = stream.read(min(left, CHUNK_BYTES))
        if len(data) % dtype.itemsize or not data:
            raise UserError(f"{file.name} became shorter while it was read: run again")
        piece = np.frombuffer(data, dtype)
        if left == begin and magic != _NUMPY_MAGIC:
            _require_width(piece, file.name)
        left -= len(data)
        yield piece


def _require_width(piece: np.ndarray, name: str) -> None:
    """Refuse ids that were stored twice as wide: every second one is then 0, which may well be the EOS."""
    if len(piece) >= WIDTH_IDS and not piece[1::2].any():
        raise UserError(
            f"{name}: every second id is 0 as {piece.dtype.name}: they are stored wider, check --token-dtype"
        )


def _numpy_header(stream: IO[bytes], file: File) -> np.dtype:
    """The type of a ``.npy`` file's ids; ``stream`` is left at the first one. Never unpickles.

    Raises:
        UserError: it holds no integers, is no plain list of them, or is cut off.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError) as error:  # it is parsed as Python
        raise UserError(f"{file.name} has a damaged numpy header ({error}): copy it again") from error
    if dtype.kind not in "iu" or (fortran and len(shape) > 1):
        raise UserError(f"{file.name} is an array of {dtype.name} {shape}, not of token ids in order")
    count = int(np.prod(shape, dtype=object))
    if stream.tell() + count * dtype.itemsize != file.size:
        raise UserError(f"{file.name} is cut off: {file.size} bytes cannot hold {count} {dtype.name}")
    return dtype
