"""Pickles that name nothing forbidden and still stand for more than anybody can hold."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from opmix_dist.train.checkpoint_metadata import load_metadata
from opmix_dist.train.checkpoint_storage import SafePlanner, SafeReader
from opmix_dist.train.pickle_bounds import MAX_DEPTH, check_bounds

OPCODES = list(b"(]})N\x85\x86\x94tesauh\x00\x01K.bq")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def as_key(levels: int) -> bytes:
    body = b"\x80\x04}K\x01\x85\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))
    return body + b"Ns."


def chain(levels: int) -> bytes:
    return b"\x80\x04}" + b")" + b"\x85" * levels + b"Ns."


def high_memo(levels: int) -> bytes:
    return b"\x80\x04Nr" + struct.pack("<I", 1 << levels) + b"."


def filled_afterwards(levels: int) -> bytes:
    """The lists refer to each other before they hold anything."""
    made = b"\x80\x04(" + b"]\x94" * levels
    filled = (b"h%c(h%ch%ce" % (i, i + 1, i + 1) for i in range(levels - 1))
    return made + b"".join(filled) + b"t."


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "a key that doubles": as_key,
    "a chain": chain,
    "a high number in the memo": high_memo,
    "filled afterwards": filled_afterwards,
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_what_stands_for_too_much_is_refused_before_anything_is_made(make: Callable[[int], bytes]) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load_metadata(make({high_memo: 31, chain: 1_000_000}.get(make, 60)))
    if make is not high_memo:
        pickle.loads(make(3))  # it is a pickle: of fewer levels, Python reads it


def test_depth_and_size_are_counted_as_documented() -> None:
    check_bounds(chain(MAX_DEPTH - 1))
    with pytest.raises(pickle.UnpicklingError, match=f"more than {MAX_DEPTH} deep"):
        check_bounds(chain(MAX_DEPTH))
    check_bounds(as_key(3))
    with pytest.raises(pickle.UnpicklingError, match="more values than"):
        check_bounds(as_key(12))


@settings(max_examples=60)
@given(VALUES, st.sampled_from([2, 3, 4, 5]))
def test_what_python_writes_of_plain_values_is_within_bounds(value: object, protocol: int) -> None:
    check_bounds(pickle.dumps([value, OrderedDict(a=torch.Size([1, 2])), torch.float32], protocol))


@settings(max_examples=300)
@given(st.lists(st.sampled_from(OPCODES) | st.integers(0, 255), max_size=60).map(bytes))
def test_anything_is_refused_or_within_bounds(data: bytes) -> None:
    """Whatever passes is small: Python makes it, and its text, at once."""
    try:
        check_bounds(data)
    except pickle.UnpicklingError:
        return
    with suppress(
        pickle.UnpicklingError, TypeError, AttributeError, IndexError, KeyError, EOFError, ValueError
    ):
        assert len(repr(pickle.loads(data))) < 100_000


class TestTensors:
    """The same in the file of a tensor, of a checkpoint that is otherwise good."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path, no_dist=True)
        return tmp_path

    def load(self, folder: Path) -> torch.Tensor:
        state = {"w": torch.zeros(6)}
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
        return state["w"]

    def put(self, folder: Path, record: bytes, compression: int = zipfile.ZIP_STORED) -> None:
        """In place of the tensor's file; the metadata tell where it lies and how long it is."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", compression) as archive:
            archive.writestr("a/data.pkl", record)
            archive.writestr("a/version", b"3\n")
        content = packed.getvalue()
        (folder / "__0_0.distcp").write_bytes(content)
        metadata = load_metadata((folder / ".metadata").read_bytes())
        assert isinstance(metadata, Metadata)
        for info in metadata.storage_data.values():
            info.length = len(content)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def test_a_good_one_is_read(self, checkpoint: Path) -> None:
        assert self.load(checkpoint).tolist() == list(range(6))

    @pytest.mark.parametrize("name", ["a key that doubles", "a chain"])
    def test_what_stands_for_too_much_is_refused(self, checkpoint: Path, name: str) -> None:
        self.put(checkpoint, HOSTILE[name](60))
        with pytest.raises(CheckpointException, match="w is no tensor's file"):
            self.load(checkpoint)

    def test_what_is_compressed_is_refused(self, checkpoint: Path) -> None:
        self.put(checkpoint, bytes(1 << 24), zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointException, match="is compressed"):
            self.load(checkpoint)

    def test_a_long_pickle_is_refused(self, checkpoint: Path) -> None:
        self.put(checkpoint, bytes(1 << 20))
        with pytest.raises(CheckpointException, match="its pickle has 1048576 bytes"):
            self.load(checkpoint)

    def test_an_entry_that_is_no_tensor_is_not_read(self, tmp_path: Path) -> None:
        dcp.save({"w": [1, 2]}, checkpoint_id=tmp_path, no_dist=True)
        with pytest.raises(CheckpointException, match="w is no tensor"):
            self.load(tmp_path)
