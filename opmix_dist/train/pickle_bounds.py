"""How much a pickle stands for, found without making any of its objects.

A few bytes of tuples that hold each other twice stand for billions of values as soon as anything takes their
hash, a long chain of tuples overruns the C stack, and an entry of the memo with a high number takes memory
for all below it. An abstract run over the opcodes finds such pickles: of each value it knows size and depth,
with what is shared counted as often as it is referred to.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator

MAX_DEPTH = 32
"""Containers and objects within each other; those of DCP's metadata have 11."""
MAX_VALUES_PER_BYTE = 4
"""Of the whole; DCP's metadata have 0.3 values for each of their bytes."""


def check_bounds(data: bytes) -> None:
    """
    Raises:
        pickle.UnpicklingError: it has opcodes that Python's own pickler does not write of plain objects from
            protocol 2 on, is nested more than ``MAX_DEPTH`` deep, or stands for too many values.
    """
    _Run(data).check()


_SKIPPED_BYTES = {b"\x80": 1, b"\x95": 8}  # PROTO, FRAME
_FETCHED = {b"h": 1, b"j": 4}  # BINGET, LONG_BINGET
_PUT = {b"q": 1, b"r": 4, b"\x94": 0}  # BINPUT, LONG_BINPUT, MEMOIZE
_SCALAR_BYTES = {
    b"N": 0, b"\x88": 0, b"\x89": 0, b")": 0,  # NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE
    b"K": 1, b"M": 2, b"J": 4, b"G": 8,  # BININT1, BININT2, BININT, BINFLOAT
}  # fmt: skip
_SCALAR_LENGTH_BYTES = {
    b"\x8a": 1, b"\x8b": 4,  # LONG1, LONG4
    b"\x8c": 1, b"X": 4, b"\x8d": 8,  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
    b"C": 1, b"B": 4, b"\x8e": 8,  # SHORT_BINBYTES, BINBYTES, BINBYTES8
}  # fmt: skip
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_NAMES = {b"\x93": 2, b"Q": 1}  # STACK_GLOBAL, BINPERSID
_CALLS = (b"R", b"\x81")  # REDUCE, NEWOBJ: what is called, and a tuple of arguments
_FILLED = {b"a": 1, b"s": 2, b"b": 1}  # APPEND, SETITEM, BUILD
_FILLED_TO_MARK = (b"e", b"u")  # APPENDS, SETITEMS


class _Value:
    """fetched: it is referred to from elsewhere, with its size as it was then, so nothing may be added."""

    __slots__ = ("depth", "fetched", "size")

    def __init__(self, size: int, depth: int) -> None:
        self.size, self.depth, self.fetched = size, depth, False


class _Run:
    """The abstract run: a stack and a memo of sizes and depths."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._most = MAX_VALUES_PER_BYTE * len(data)
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: list[_Value] = []

    def check(self) -> None:
        """Raises pickle.UnpicklingError."""
        try:
            for code in self._codes():
                self._do(code)
        except IndexError:
            raise pickle.UnpicklingError("its stack or memo lacks what it takes from there") from None
        if len(self._stack) != 1 or self._marks:
            raise pickle.UnpicklingError("it does not end with one value")

    def _codes(self) -> Iterator[bytes]:
        data = self._data
        while (code := data[self._at : self._at + 1]) != b".":
            if not code:
                raise pickle.UnpicklingError("it has no end")
            self._at += 1
            yield code

    def _do(self, code: bytes) -> None:
        stack = self._stack
        if code in _PUT:
            self._put(_PUT[code])
        elif code in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[code])
            stack.append(_Value(1, 0))
        elif code in _FETCHED:
            value = self._memo[self._number(_FETCHED[code])]
            value.fetched = True
            stack.append(value)
        elif code in _SCALAR_LENGTH_BYTES:
            self._skip(self._number(_SCALAR_LENGTH_BYTES[code]))
            stack.append(_Value(1, 0))
        elif code in b"}]":  # EMPTY_DICT, EMPTY_LIST
            stack.append(_Value(1, 0))
        elif code == b"(":
            self._marks.append(len(stack))
        elif code in _TUPLES:
            self._enclose(self._taken(_TUPLES[code]))
        elif code == b"t":  # TUPLE
            self._enclose(self._taken_to_mark())
        elif code in _CALLS:
            self._enclose(self._taken(2))
        elif code in _FILLED:
            self._fill(self._taken(_FILLED[code]))
        elif code in _FILLED_TO_MARK:
            self._fill(self._taken_to_mark())
        elif code in _NAMES:
            self._taken(_NAMES[code])
            stack.append(_Value(1, 0))
        elif code == b"c":  # GLOBAL
            self._skip_lines(2)
            stack.append(_Value(1, 0))
        elif code in _SKIPPED_BYTES:
            self._skip(_SKIPPED_BYTES[code])
        else:
            raise pickle.UnpicklingError(f"opcode {code!r} has no place here")

    def _put(self, number_bytes: int) -> None:
        """Picklers number the memo's entries as they come."""
        if number_bytes and self._number(number_bytes) != len(self._memo):
            raise pickle.UnpicklingError("its memo is not in order")
        self._memo.append(self._stack[-1])

    def _skip_lines(self, count: int) -> None:
        for _ in range(count):
            end = self._data.find(b"\n", self._at)
            if end < 0:
                raise pickle.UnpicklingError("it has no end")
            self._at = end + 1

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise pickle.UnpicklingError("it has no end")

    def _number(self, count: int) -> int:
        self._skip(count)
        return int.from_bytes(self._data[self._at - count : self._at], "little")

    def _taken(self, count: int) -> list[_Value]:
        """The last ``count`` values, off the stack; none from below a mark."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _taken_to_mark(self) -> list[_Value]:
        return self._taken(len(self._stack) - self._marks.pop())

    def _enclose(self, parts: list[_Value]) -> None:
        whole = _Value(1, 0)
        self._stack.append(whole)
        self._add(whole, parts)

    def _fill(self, parts: list[_Value]) -> None:
        whole = self._stack[-1]
        if whole.fetched:
            raise pickle.UnpicklingError("something is added to a value that is referred to already")
        self._add(whole, parts)

    def _add(self, whole: _Value, parts: list[_Value]) -> None:
        for part in parts:
            whole.size += part.size
            if part.depth >= whole.depth:
                whole.depth = part.depth + 1
        if whole.size > self._most:
            raise pickle.UnpicklingError("it stands for more values than metadata of its length do")
        if whole.depth > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it is nested more than {MAX_DEPTH} deep")
