"""The record of a domain's second pass, from which a killed run goes on: what it may hold, and its reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from opmix_dist.bounded import require_ordinary
from opmix_dist.data.catalogue import Split
from opmix_dist.data.packing import Arrays
from opmix_dist.errors import UserError

RECORD_FILE = "written.safetensors"
MAX_RECORD_BYTES = 8 << 30
"""Less than a shard and a window of documents of each split; shards are some 64 MiB."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Counts(_Checked):
    """Of a split, in its shards and in what is held back."""

    samples: Count
    tokens: Count
    documents: Count


class State(_Checked):
    tokenizer: str
    """Its fingerprint."""
    chunks: Count
    """Of the source, all in the samples that were made."""
    tokens_cut: Count
    unlearnt: Count
    counts: dict[Split, Counts]
    shards: dict[Split, list[dict[str, Any]]]
    """Entries of ``index.json``, whose reader checks them."""


@dataclass(frozen=True)
class Record:
    """What an earlier run saved of a domain's second pass."""

    state: State
    arrays: Arrays
    """What each split's packer and cutter hold back, by ``SPLIT.packer.NAME`` and ``SPLIT.cutter.NAME``."""


def read_record(work: Path) -> Record | None:
    """Of a domain's ``work`` folder. None when there is none; raises UserError when it is damaged."""
    file = work / RECORD_FILE
    if not file.exists():
        return None
    try:
        return _read(file)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"cannot go on with {file} ({what}): delete {work.parent}") from None


def _read(file: Path) -> Record:
    require_ordinary(file, MAX_RECORD_BYTES)
    with safe_open(file, framework="np") as opened:
        state = State.model_validate_json((opened.metadata() or {})["state"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    for name, array in arrays.items():
        _check(name, array, arrays)
    return Record(state, arrays)


def _check(name: str, array: np.ndarray, arrays: Arrays) -> None:
    """Of rows that lie end to end there are as many values as the rows' lengths say; ends of documents lie
    within the tokens."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} holds no integers")
    column, _, part = name.rpartition(".")
    if part == "counts":
        values = arrays[f"{column}.values"]
        if array.ndim != 1 or (array < 0).any() or array.sum(dtype=object) != len(values):
            raise ValueError(f"{name} does not count {column}.values")
    elif part == "values":
        arrays[f"{column}.counts"]
    elif part == "ends":
        tokens = arrays[f"{column}.tokens"]
        if array.ndim != 1 or tokens.ndim != 1 or ((array < 1) | (array > len(tokens))).any():
            raise ValueError(f"{name} are no places in {column}.tokens")
