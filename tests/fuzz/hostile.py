"""What somebody who means harm, or a disk that fails, puts in the place of a good file."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEEP = 100_000
LEAVES_CHANGED = 25
"""Values of a JSON document that are replaced, one at a time."""


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def contents(good: bytes, marker: Path) -> Iterator[tuple[str, bytes]]:
    """What a file may hold instead, by name.

    Args:
        marker: folder that is made by whoever executes what is planted.
    """
    yield from pickles(marker)
    yield "nothing", b""
    for part in (0.02, 0.3, 0.5, 0.9):
        yield f"the first {part:.0%}", good[: int(part * len(good))]
    yield "all but a byte", good[:-1]
    yield "all but the first byte", good[1:]
    yield "twice", good + good
    yield "more behind it", good + b"\0\xff garbage"
    yield "zeros", bytes(len(good))
    yield "ones", b"\xff" * len(good)
    yield "no UTF-8", good.replace(b"a", b"\xff\xfe")
    yield "terminal codes", good.replace(b"e", b"\x1b]0;x\x07")
    yield "deep lists", b"[" * DEEP
    yield "deep objects", b'{"a":' * DEEP
    yield "a scalar", b"1"
    yield "null", b"null"
    yield "a list", b"[1, 2]"
    yield "a number of many digits", b"9" * 100_000
    yield "a long line", b'"' + b"x" * 3_000_000 + b'"'
    yield "many small values", b"[" + b"0," * 300_000 + b"0]"
    for size in (2**31, 2**40, 2**63 - 1, 2**64 - 1):  # lengths, where formats have theirs
        yield f"{size} at the start", size.to_bytes(8, "little") + good[8:]
        yield f"{size} at the end", good[:-8] + size.to_bytes(8, "little")


def pickles(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Files that execute something in readers that unpickle."""
    payload = Payload(marker)
    for protocol in (0, 2, 4):
        yield f"a pickle of protocol {protocol}", pickle.dumps(payload, protocol)
    saved = io.BytesIO()
    torch.save(payload, saved)
    yield "a torch file", saved.getvalue()
    array = io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    yield "a numpy file", array.getvalue()
    yield "YAML that calls", f'!!python/object/apply:os.mkdir ["{marker}"]'.encode()


NASTY_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**53 + 1,
    10**30,
    10**4000,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "x" * 100_000,
    "../../../etc/passwd",
    "/dev/zero",
    "\x1b[2J\x00<script>alert(1)</script>",
    "\ud800",
    [],
    {},
    {"__class__": "os.system"},
)


NASTY_NAMES = ("../up", "a/b", "", "x" * 1000, "<script>", "\x1b[2J", ".", "é\u202e")


def documents(good: Any, seed: int, *, few: bool = False) -> Iterator[tuple[str, Any]]:
    """JSON values like ``good``, with a value replaced, a key renamed or removed."""
    rng = random.Random(seed)
    places = list(_places(good))
    most = 2 if few else LEAVES_CHANGED
    for place in rng.sample(places, min(len(places), most)):
        for value in rng.sample(NASTY_VALUES, 4):
            yield f"{place} is {str(value)[:40]!r}", _changed(good, place, lambda _, new=value: new)
        yield f"{place} is nested", _changed(good, place, _nested)
    for place in rng.sample(places, min(len(places), most)):
        if place and isinstance(place[-1], str):
            yield f"{place} is missing", _changed(good, place[:-1], _without(place[-1]))
            for name in rng.sample(NASTY_NAMES, 2):
                yield f"{place} is named {name[:20]!r}", _changed(good, place[:-1], _renamed(place[-1], name))


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _places(child, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value[:3]):
            yield from _places(child, (*at, index))


def _changed(document: Any, place: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    holder = [copy.deepcopy(document)]
    target: Any = holder
    path: tuple[Any, ...] = (0, *place)
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = change(target[path[-1]])
    return holder[0]


def _nested(value: Any) -> Any:
    for _ in range(400):
        value = [value]
    return value


def _without(key: str) -> Callable[[Any], Any]:
    return lambda parent: {name: child for name, child in parent.items() if name != key}


def _renamed(key: str, to: str) -> Callable[[Any], Any]:
    return lambda parent: {to if name == key else name: child for name, child in parent.items()}


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


# What is no file of bytes at all. Each takes the place of `path`.


def a_pipe(path: Path) -> None:
    """Nobody writes into it: who opens it to read waits."""
    os.mkfifo(path)


def a_device(path: Path) -> None:
    """Zeros without end."""
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def holes(path: Path) -> None:
    """A terabyte that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


def nothing(path: Path) -> None:
    """The file is missing."""


PLACES = (a_pipe, a_device, a_folder, a_loop, holes, nothing)
