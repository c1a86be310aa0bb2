"""Which documents share a run of words with texts that a model will be evaluated on.

Texts become lower-cased words (``\\w+``), and each run of n words, a gram, becomes one 64-bit hash. A word
that no evaluation text has cannot be part of a shared gram, so most documents end after a dictionary look-up
per word; what is left is hashed in one go, and a hash that is met is compared word by word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is zero modulo 2**64
UNKNOWN = 0


@dataclass(frozen=True)
class _Table:
    """The grams of one length, sorted by hash."""

    hashes: np.ndarray  # uint64 [G]
    begins: np.ndarray  # int64 [G], where each gram lies in the evaluation texts' words


@dataclass(frozen=True)
class Grams:
    """The grams of evaluation texts; picklable."""

    numbers: Mapping[str, int]  # of each word, from 1
    words: np.ndarray  # uint32 [W], all texts end to end
    tables: Mapping[int, _Table]  # by length

    @classmethod
    def of(cls, texts: Iterable[str], ngram: int) -> Grams:
        """Grams of ``ngram`` words; a text of fewer is one gram as a whole, and one of none gives none."""
        numbers: dict[str, int] = {}
        lines = [
            np.array([numbers.setdefault(word, len(numbers) + 1) for word in split_words(text)], np.uint32)
            for text in texts
        ]
        begins: dict[int, list[np.ndarray]] = {}
        at = 0
        for line in lines:
            length = min(ngram, len(line))
            if length:
                begins.setdefault(length, []).append(np.arange(at, at + len(line) - length + 1))
            at += len(line)
        words = np.concatenate(lines) if lines else np.empty(0, np.uint32)
        tables = {length: _table(words, np.concatenate(found), length) for length, found in begins.items()}
        return cls(numbers, words, tables)

    def fingerprint(self) -> str:
        """sha256, hexadecimal, of all that decides what is met."""
        state = hashlib.sha256("\n".join(self.numbers).encode())
        for length, table in sorted(self.tables.items()):
            state.update(f"{length} {len(table.hashes)}".encode())
            state.update(table.hashes.astype("<u8").tobytes())
        return state.hexdigest()

    def met_in(self, text: str) -> bool:
        """Whether ``text`` holds one of the grams."""
        find = self.numbers.get
        words = np.array([find(word, UNKNOWN) for word in split_words(text)], np.uint32)
        unknown = np.append(0, np.cumsum(words == UNKNOWN))
        return any(self._met(words, unknown, length) for length in self.tables if length <= len(words))

    def _met(self, words: np.ndarray, unknown: np.ndarray, length: int) -> bool:
        begins = np.flatnonzero(unknown[length:] == unknown[:-length])  # grams of known words only
        if not len(begins):
            return False
        table = self.tables[length]
        hashes = _hashes(words, begins, length)
        # Several grams may share a hash: equal ones, or by chance others
        first = np.searchsorted(table.hashes, hashes, side="left")
        last = np.searchsorted(table.hashes, hashes, side="right")
        for hit in np.flatnonzero(first < last).tolist():
            gram = words[begins[hit] : begins[hit] + length]
            candidates = table.begins[first[hit] : last[hit], None] + np.arange(length)
            if (self.words[candidates] == gram).all(axis=1).any():
                return True
        return False


def split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _table(words: np.ndarray, begins: np.ndarray, length: int) -> _Table:
    hashes = _hashes(words, begins, length)
    unique, first = np.unique(hashes, return_index=True)
    if len(unique) < len(hashes):  # keep one of equal grams, and all of those that share a hash by chance
        first = _one_of_equals(words, begins, hashes, length)
        unique = hashes[first]
    return _Table(unique, begins[first])


def _one_of_equals(words: np.ndarray, begins: np.ndarray, hashes: np.ndarray, length: int) -> np.ndarray:
    """Numbers of distinct grams, in the order of their hashes."""
    order = np.argsort(hashes, kind="stable")
    same = np.append(False, hashes[order][1:] == hashes[order][:-1])
    for offset in range(length):
        column = words[begins[order] + offset]
        same &= np.append(False, column[1:] == column[:-1])
    return order[~same]


def _hashes(words: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
    """Polynomial hashes modulo 2**64 of the runs of ``length`` words at ``begins``; uint64, as many."""
    hashes = np.zeros(len(begins), np.uint64)
    for offset in range(length):
        hashes = hashes * _BASE + words[begins + offset].astype(np.uint64)
    return hashes
