import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opmix_dist.data.mds import import_streaming
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError
from tests.data.shard_files import T, sample_tokens, write_split

pytestmark = pytest.mark.usefixtures("streaming")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_split(folder, 3, 20)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil: streaming's writer takes a second to close."""
    return Path(shutil.copytree(written, tmp_path / "d"))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reads_every_sample_as_written(tmp_path: Path, dtype: str) -> None:
    write_split(tmp_path, 3, 20, dtype=dtype)
    split = ShardedSplit(tmp_path)
    assert (len(split), split.sequence_length) == (20, T)
    assert len(split.shard_sizes) > 1
    assert split.shard_sizes.sum() == 20
    for sample in range(20):
        read = split.read(sample)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, sample_tokens(3, sample))


@pytest.mark.parametrize("outside", [-1, 20])
def test_sample_outside_the_split(folder: Path, outside: int) -> None:
    with pytest.raises(IndexError, match="of 20"):
        ShardedSplit(folder).read(outside)


def test_pickles_as_its_paths(folder: Path) -> None:
    split = ShardedSplit(folder)
    split.read(0)
    data = pickle.dumps(split)
    assert len(data) < 400
    np.testing.assert_array_equal(pickle.loads(data).read(19), sample_tokens(3, 19))


def test_two_readers_of_one_folder(folder: Path) -> None:
    first, second = ShardedSplit(folder), ShardedSplit(folder)
    np.testing.assert_array_equal(first.read(7), second.read(7))


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_remote_shards_come_when_read(tmp_path: Path, options: dict[str, str]) -> None:
    write_split(tmp_path / "remote", 1, 20, **options)
    split = ShardedSplit(tmp_path / "cache", str(tmp_path / "remote"))
    assert list((tmp_path / "cache").glob("*.mds")) == []
    np.testing.assert_array_equal(split.read(19), sample_tokens(1, 19))
    assert len(list((tmp_path / "cache").glob("*.mds"))) == 1


def test_killed_download_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    split = ShardedSplit(cache, str(folder))
    (cache / "shard.00000.mds").write_bytes(b"half")
    np.testing.assert_array_equal(split.read(0), sample_tokens(3, 0))


def test_remote_that_is_gone_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opmix_dist.data.shards.DOWNLOAD_ATTEMPTS", 1)
    split = ShardedSplit(tmp_path / "cache", str(folder))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"shard \S*shard.00000.mds: it cannot be fetched"):
        split.read(0)


def test_local_compressed_shards_are_kept(tmp_path: Path) -> None:
    write_split(tmp_path, 1, 20, compression="zstd")
    np.testing.assert_array_equal(ShardedSplit(tmp_path).read(0), sample_tokens(1, 0))
    assert (tmp_path / "shard.00000.mds.zstd").exists()


def test_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    split = ShardedSplit(folder)
    split.read(0)
    with pytest.raises(UserError, match=r"shard \S*shard.00001.mds: \d+ of \d+ bytes"):
        split.read(int(split.shard_sizes[0]))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match=r"shard.00000.mds: 0 of \d+ bytes"):
        ShardedSplit(folder).read(0)


def test_shard_of_zeros_is_named(folder: Path) -> None:
    shard = folder / "shard.00000.mds"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"shard.00000.mds: sample 0 cannot be read"):
        ShardedSplit(folder).read(0)


def test_pkl_column_is_refused(tmp_path: Path) -> None:
    import_streaming()
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path), columns={"tokens": "pkl"}) as writer:
        writer.write({"tokens": [1, 2, 3]})
    with pytest.raises(UserError, match=r"column `tokens` is pkl"):
        ShardedSplit(tmp_path)


def test_float_tokens_are_refused(tmp_path: Path) -> None:
    import_streaming()
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path), columns={"tokens": "ndarray:float32:4"}) as writer:
        writer.write({"tokens": np.zeros(4, dtype=np.float32)})
    with pytest.raises(UserError, match=r"column `tokens` is ndarray:float32:4"):
        ShardedSplit(tmp_path)


@pytest.mark.parametrize("basename", ["../shard.00000.mds", "/etc/passwd", "..", "a/b", "", "shard.mds\n"])
def test_file_name_that_leaves_the_folder(folder: Path, basename: str) -> None:
    path = edit_index(folder, lambda index: index["shards"][0]["raw_data"].update(basename=basename))
    with pytest.raises(UserError, match=rf"{path}: `shards.0.raw_data.basename`"):
        ShardedSplit(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda index: index["shards"].clear(), "`shards`"),
        (lambda index: index["shards"][0].update(samples=-1), "`shards.0.samples`"),
        (lambda index: index["shards"][0].update(format="json"), "`shards.0.format`"),
        (lambda index: index["shards"][0].update(column_names=["text"]), "`shards.0.column_names.0`"),
        (lambda index: index["shards"][0].update(column_encodings=["ndarray:uint16:9"]), "one length T"),
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
