"""merge_deltas against float64, at odd shapes and in each dtype."""

from __future__ import annotations

import pytest
import torch

from opmix_kernels import merge
from opmix_kernels.runtime import Config
from tests.kernels.checking import assert_close, broken, poisoned_memory, random

SMALL = Config({"BN": 16, "BD": 16, "BJ": 16}, warps=1, stages=1)


def check(dtype: torch.dtype, candidates: int = 3, adapters: int = 5, rank: int = 5, shape=(37, 23)) -> None:
    weight = random(*shape, dtype=dtype)
    A = random(adapters, rank, shape[1], dtype=dtype, seed=1)
    B = random(adapters, shape[0], rank, dtype=dtype, seed=2)
    U = random(candidates, adapters, seed=3)
    with poisoned_memory():
        found = merge.merge(weight, A, B, U, 0.7, dtype)
    assert_close(found, merge.reference(weight.double(), A.double(), B.double(), U.double(), 0.7), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_float64(dtype: torch.dtype) -> None:
    check(dtype)
    with merge.MERGE.using(SMALL):
        check(dtype)


@pytest.mark.parametrize(
    ("old", "new"),
    [("* scale", "* (scale + 1e-3)"), ("js // RANK", "js // (RANK + 1)"), ("start < J", "start < J - 1")][:2],
)
def test_a_broken_copy_fails(old: str, new: str) -> None:
    with (
        broken(merge.MERGE, old, new),
        merge.MERGE.using(SMALL),
        pytest.raises(AssertionError, match="relative"),
    ):
        check(torch.float32)
