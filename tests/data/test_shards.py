import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opmix_dist.data.mds import import_streaming
from opmix_dist.data.samples import DType, Sample, write_index, write_shard
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError
from tests.data.shard_files import T, flip_a_byte, sample, sample_tokens, uint32, write_split

pytestmark = pytest.mark.usefixtures("streaming")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_split(folder, 3, 20)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "d"))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    return path


def assert_sample(read: Sample, domain: int, number: int) -> None:
    np.testing.assert_array_equal(read.tokens, sample_tokens(domain, number))
    assert read.ends.tolist() == [T // 2]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reads_every_sample_as_written(tmp_path: Path, dtype: DType) -> None:
    write_split(tmp_path, 3, 20, dtype=dtype)
    split = ShardedSplit(tmp_path)
    assert len(split) == 20
    assert split.shard_sizes.tolist() == [7, 7, 6]
    for number in range(20):
        read = split.read(number)
        assert read.tokens.dtype == dtype
        assert_sample(read, 3, number)


def test_samples_of_any_length_without_ends_and_with_spans(tmp_path: Path) -> None:
    short = Sample(np.array([7], dtype=np.uint16), ends=uint32([]), spans=uint32([]).reshape(0, 2))
    chat = Sample(np.arange(6, dtype=np.uint16), ends=uint32([3, 6]), spans=uint32([[1, 3], [4, 6]]))
    write_index(
        tmp_path, [write_shard(tmp_path, 0, [short, chat], dtype="uint16", spans=True, compression="none")]
    )
    read = [ShardedSplit(tmp_path).read(number) for number in range(2)]
    for found, written in zip(read, (short, chat), strict=True):
        for field in ("tokens", "ends", "spans"):
            np.testing.assert_array_equal(getattr(found, field), getattr(written, field))


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_tokens_that_are_no_sample(shape: tuple[int, ...]) -> None:
    """MDSWriter writes none, a damaged shard may hold one."""
    with pytest.raises(ValueError, match="tokens have the shape"):
        Sample.from_row({"tokens": np.zeros(shape, dtype=np.uint16), "ends": b""})


def test_memory_of_a_shard(folder: Path) -> None:
    """A trillion tokens are 30,000 shards, in every reader process."""

    def grow(index: dict[str, Any]) -> None:
        file = index["shards"][0]["raw_data"]
        index["shards"] = [
            {**index["shards"][0], "raw_data": {**file, "basename": f"shard.{number:05}.mds"}}
            for number in range(2_000)
        ]

    edit_index(folder, grow)
    tracemalloc.start()
    split = ShardedSplit(folder)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(split.files) == 2_000
    assert taken < 500 * 2_000


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [sample(1, number) for number in range(5)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 3, rows, dtype="uint16", spans=False, compression="zstd")
    a, b = (tmp_path / name / "shard.00003.mds.zstd" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("outside", [-1, 20])
def test_sample_outside_the_split(folder: Path, outside: int) -> None:
    with pytest.raises(IndexError, match="of 20"):
        ShardedSplit(folder).read(outside)


def test_pickles_as_its_paths(folder: Path) -> None:
    split = ShardedSplit(folder)
    split.read(0)
    data = pickle.dumps(split)
    assert len(data) < 400
    assert_sample(pickle.loads(data).read(19), 3, 19)


def test_two_readers_of_one_folder(folder: Path) -> None:
    first, second = ShardedSplit(folder), ShardedSplit(folder)
    np.testing.assert_array_equal(first.read(7).tokens, second.read(7).tokens)


def test_local_compressed_shards_are_kept(tmp_path: Path) -> None:
    write_split(tmp_path, 1, 20, compression="zstd")
    assert_sample(ShardedSplit(tmp_path).read(0), 1, 0)
    assert (tmp_path / "shard.00000.mds.zstd").exists()


def test_a_damaged_compressed_shard_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, 1, 20, compression="zstd")
    flip_a_byte(tmp_path / "shard.00001.mds.zstd")
    split = ShardedSplit(tmp_path)
    split.read(0)
    with pytest.raises(UserError, match=r"shard \S*shard.00001.mds: \S*.zstd cannot be fetched"):
        split.read(7)
    assert not list(tmp_path.glob("*.part"))


def test_flipped_bytes_are_found_when_asked_for(folder: Path) -> None:
    flip_a_byte(folder / "shard.00001.mds")
    unchecked = ShardedSplit(folder)
    assert sum(sum(unchecked.read(n).tokens != sample_tokens(3, n)) for n in range(7, 14)) == 1
    checked = ShardedSplit(folder, verify=True)
    checked.read(0)
    with pytest.raises(UserError, match=r"shard \S*shard.00001.mds: its hash is not the one of its index"):
        checked.read(7)


def test_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    split = ShardedSplit(folder)
    split.read(0)
    with pytest.raises(UserError, match=r"shard \S*shard.00001.mds: \d+ of \d+ bytes"):
        split.read(int(split.shard_sizes[0]))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match=r"shard.00000.mds: is missing"):
        ShardedSplit(folder).read(0)


def test_shard_of_zeros_is_named(folder: Path) -> None:
    shard = folder / "shard.00000.mds"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"shard.00000.mds: sample 0 cannot be read"):
        ShardedSplit(folder).read(0)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"tokens": "pkl"}, {"tokens": [1, 2, 3]}),
        ({"tokens": "ndarray:uint16", "ends": "bytes", "extra": "pkl"}, None),
        (
            {"tokens": "ndarray:float32", "ends": "bytes"},
            {"tokens": np.zeros(4, dtype=np.float32), "ends": b""},
        ),
    ],
)
def test_other_columns_are_refused(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any] | None
) -> None:
    import_streaming()
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path), columns=columns) as writer:
        writer.write(row or {**sample(1, 1).to_row(), "extra": {"any": "thing"}})
    with pytest.raises(UserError, match=r"column `\w+` of type (pkl|ndarray:float32) is none of a sample's"):
        ShardedSplit(tmp_path)


@pytest.mark.parametrize(
    "basename", ["../shard.00000.mds", "/etc/passwd", "..", "a/b", "", "shard.mds\n", "index.json"]
)
def test_file_name_that_leaves_the_folder_or_is_no_shards(folder: Path, basename: str) -> None:
    path = edit_index(folder, lambda index: index["shards"][0]["raw_data"].update(basename=basename))
    with pytest.raises(UserError, match=rf"{path}: `shards.0.raw_data.basename`"):
        ShardedSplit(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda index: index["shards"].clear(), "`shards`"),
        (lambda index: index["shards"][0].update(samples=-1), "`shards.0.samples`"),
        (lambda index: index["shards"][0].update(format="json"), "`shards.0.format`"),
        (lambda index: index["shards"][0].update(column_names=["text", "ends"]), "different columns"),
        (lambda index: [s.update(column_names=["ends", "text"]) for s in index["shards"]], "column `text`"),
        (lambda index: [s.update(column_names=["ends"]) for s in index["shards"]], "of different number"),
        (lambda index: index["shards"][0].update(compression="gz"), "neither none nor zstd"),
        (lambda index: index.update(version=1), "`version`"),
    ],
)
def test_index_that_is_no_index_of_samples(
    folder: Path, edit: Callable[[dict[str, Any]], None], named: str
) -> None:
    path = edit_index(folder, edit)
    with pytest.raises(UserError, match=f"{path}: .*{named}"):
        ShardedSplit(folder)


def test_index_missing_damaged_or_huge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot read \S*absent/index.json"):
        ShardedSplit(folder / "absent")
    monkeypatch.setattr("opmix_dist.data.shards.MAX_INDEX_BYTES", 100)
    with pytest.raises(UserError, match=r"index.json is larger than 100 bytes"):
        ShardedSplit(folder)
    monkeypatch.undo()
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json: .*Invalid JSON"):
        ShardedSplit(folder)
