"""Data as the configuration asks for it: stores, options of reading, held-out samples that have a loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opmix_dist.config import DataConfig
from opmix_dist.data.build import held_out_samples, open_data, read_options
from opmix_dist.data.loader import ReadOptions
from opmix_dist.data.samples import Sample, write_index, write_shard
from opmix_dist.data.store import ShardStore
from opmix_dist.errors import UserError
from tests.data.shard_files import T, sample_tokens, write_catalogue

pytestmark = pytest.mark.usefixtures("streaming")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_catalogue(tmp_path / "data", {"a": 20, "b": 10})
    return tmp_path / "data"


def test_a_local_root_needs_no_store(root: Path) -> None:
    config = DataConfig(root=str(root), domains=["b", "a"])
    catalogue = open_data(config)
    assert (catalogue.names, catalogue.store) == (("b", "a"), None)
    assert open_data(config, ["a"]).names == ("a",)


@pytest.mark.parametrize(("verify", "check", "always"), [
    ("never", False, False), ("fetch", True, False), ("always", True, True),
])  # fmt: skip
def test_a_cache_is_a_store_with_the_settings_given(
    root: Path, tmp_path: Path, verify: str, check: bool, always: bool
) -> None:
    config = DataConfig.model_validate({
        "root": f"file://{root}", "cache": str(tmp_path / "cache"), "cache_limit": "2GB",
        "verify_shards": verify, "fetch_threads": 3, "fetch_ahead": 5, "fetch_timeout_s": 7.0,
        "mask_documents": True,
    })  # fmt: skip
    assert open_data(config).store == ShardStore(
        f"file://{root}", tmp_path / "cache", limit_bytes=2 * 10**9, check=check, timeout_s=7.0
    )
    assert read_options(config) == ReadOptions(
        mask_documents=True, verify=always, fetch_threads=3, fetch_ahead=5
    )
    held_out = held_out_samples(config, open_data(config), samples_per_domain=2, seed=0)
    expected = held_out_samples(
        DataConfig(root=str(root)), open_data(DataConfig(root=str(root))), samples_per_domain=2, seed=0
    )
    assert held_out.batch.tokens.tolist() == expected.batch.tokens.tolist()
    assert held_out.batch.position_ids is not None
    assert held_out.batch.position_ids[0].tolist() == [0, 1, 2, 3] * 2, "a document ends in the middle"
    assert expected.batch.position_ids is None


def test_a_domain_without_a_target_is_named(root: Path) -> None:
    """Its samples are chats in which nothing is learnt."""
    none = np.zeros((0, 2), dtype=np.uint32)
    samples = [Sample(sample_tokens(1, i), np.array([T], dtype=np.uint32), none) for i in range(9)]
    folder = root / "b" / "eval"
    entry = write_shard(folder, 0, samples, dtype="uint16", spans=True, compression="none")
    for leftover in folder.glob("shard.00001*"):
        leftover.unlink()
    write_index(folder, [entry])
    config = DataConfig(root=str(root))
    with pytest.raises(UserError, match="domain b: none of 4 held-out samples has a token that counts"):
        held_out_samples(config, open_data(config), samples_per_domain=4, seed=0)
    assert len(held_out_samples(config, open_data(config, ["a"]), samples_per_domain=4, seed=0).batch) == 4
