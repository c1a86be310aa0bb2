"""A sampler's state as JSON: read with care, and under 64 KiB for 2,000 domains whatever they are called.

A row per domain holds what continues its order exactly, in 24 bytes: names are kept as hashes, lags with all
their bits. Columns are packed one by one, see :func:`_pack`.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from opmix_dist.errors import UserError

STATE_VERSION = 2
ROW = np.dtype([("name", "<u8"), ("shards", "<u4"), ("drawn", "<i8"), ("lag", "<f8")])

_MAX_UNPACKED_BYTES = 64 << 20
_MAX_DRAWN = 2**53  # float64 counts exactly up to here
# Rounding of D weights over any number of batches stays far below it; a lag that was tampered with does not.
_LAG_TOLERANCE = 1e-6


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """What stands for each domain in a state, uint64 [D].

    Raises:
        UserError: two names with the same hash, for 2,000 domains one case in 10^13.
    """
    hashes: dict[int, str] = {}
    for name in names:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        if key in hashes:
            raise UserError(f"domains {hashes[key]!r} and {name!r} have the same hash: rename one")
        hashes[key] = name
    return np.array([*hashes], dtype=np.uint64)


def write_state(rows: np.ndarray, *, seed: int, shuffle_block: int, batches: int) -> dict[str, Any]:
    """JSON-able state of ``rows`` (of dtype ``ROW``) after ``batches`` batches."""
    return {
        "version": STATE_VERSION,
        "seed": seed,
        "shuffle_block": shuffle_block,
        "batches": batches,
        **{column: _pack(rows[column]) for column in ROW.names or ()},
    }


def read_state(state: Mapping[str, Any], *, seed: int, shuffle_block: int) -> tuple[int, np.ndarray]:
    """Batches and rows (of dtype ``ROW``) of a state, checked.

    Raises:
        UserError: a state of another version or seed, with blocks of another size, or damaged.
    """
    if not isinstance(state, Mapping):
        raise _damaged()
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"sampler state has version {state.get('version')}; this version reads {STATE_VERSION}: resume "
            f"with the release that wrote it"
        )
    for key, setting, own in (("seed", "seed", seed), ("shuffle_block", "data.shuffle_block", shuffle_block)):
        if state.get(key) != own:
            raise UserError(
                f"sampler state was made with {setting} {state.get(key)}, this run has {own}, which is "
                f"another order of the samples: set {setting} to {state.get(key)}"
            )
    try:
        rows = _read_rows(state)
    except (KeyError, TypeError, ValueError, zlib.error):
        raise _damaged() from None
    batches = state.get("batches")
    if type(batches) is not int or batches < 0 or not _is_sound(rows):
        raise _damaged()
    return batches, rows


def _read_rows(state: Mapping[str, Any]) -> np.ndarray:
    columns = {column: _unpack(state[column], ROW[column]) for column in ROW.names or ()}
    rows = np.empty(len(columns["name"]), dtype=ROW)
    for column, values in columns.items():
        if len(values) != len(rows):
            raise ValueError(f"{len(values)} values of {column} for {len(rows)} domains")
        rows[column] = values
    return rows


def _is_sound(rows: np.ndarray) -> bool:
    drawn, lag = rows["drawn"], rows["lag"]
    return bool(
        len(rows) > 0
        and len(np.unique(rows["name"])) == len(rows)
        and ((drawn >= 0) & (drawn <= _MAX_DRAWN)).all()
        and (np.abs(lag) <= 1 + _LAG_TOLERANCE).all()  # no NaN is
        and abs(math.fsum(lag)) <= _LAG_TOLERANCE
    )


def _damaged() -> UserError:
    return UserError("sampler state is damaged: resume from another checkpoint")


def _pack(column: np.ndarray) -> str:
    """Text for JSON: the first bytes of all values, then the second ones, ..., as zlib and base 85.

    In this order the bytes that are alike, such as the zeros above a count, compress to nothing.
    """
    planes = np.frombuffer(column.tobytes(), dtype=np.uint8).reshape(-1, column.itemsize).T
    return base64.b85encode(zlib.compress(planes.tobytes())).decode()


def _unpack(text: str, dtype: np.dtype) -> np.ndarray:
    """The values that :func:`_pack` was given; ValueError or zlib.error when they are none."""
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b85decode(text), _MAX_UNPACKED_BYTES)
    if not unpacker.eof:
        raise ValueError("cut off, or too long")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    return np.frombuffer(planes.T.tobytes(), dtype=dtype)
