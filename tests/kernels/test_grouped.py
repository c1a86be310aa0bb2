"""The grouped products alone: tiles, strides, large indices, who owns which rows, and broken copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opmix_kernels import joint_lora
from opmix_kernels.dropout import Dropout, keep_mask, threshold_of
from opmix_kernels.grouped import (
    ADD_CHUNKS,
    EXPAND,
    OUTER,
    SHRINK,
    Groups,
    expand_,
    outer,
    shrink,
)
from opmix_kernels.runtime import Config, Kernel, recording
from tests.kernels.checking import DEVICE, assert_close, broken, poisoned_memory, random

TILE = Config({"BR": 16, "BD": 16}, warps=1, stages=1)
WIDE_TILE = Config({"BR": 16, "BD": 32}, warps=2, stages=2)
P = 0.3
BOUNDS = (0, 17, 17, 50)
"""One group has no rows; rows from 50 on are nobody's."""


def offsets_of(bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds, device=DEVICE)


def dropped(groups: int) -> Dropout:
    seeds = torch.arange(groups, device=DEVICE) * 1000 - 7
    return Dropout(threshold_of(P), seeds, torch.tensor(9, device=DEVICE))


def masks(bounds: tuple[int, ...], columns: int, dropout: Dropout) -> list[Tensor]:
    """Float64, per group."""
    if dropout.seeds is None or dropout.step is None:
        return [torch.ones(e - b, columns, dtype=torch.float64) for b, e in pairwise(bounds)]
    return [
        keep_mask(dropout.seeds[k : k + 1], dropout.step, bounds[k + 1] - bounds[k], columns, P)[0].double()
        for k in range(len(bounds) - 1)
    ]


def check_shrink(x: Tensor, F: Tensor, bounds: tuple[int, ...], dropout: Dropout) -> None:
    with poisoned_memory():
        found = shrink(x, F, Groups(len(F), offsets_of(bounds)), 0.7, dropout)
    for k, mask in enumerate(masks(bounds, x.shape[1], dropout)):
        span = slice(bounds[k], bounds[k + 1])
        if len(mask):
            expected = 0.7 * (mask * x[span].double()) @ F[k].double().T
            assert_close(found[span], expected, x.dtype, f"group {k}")
    assert found[bounds[-1] :].isnan().all()


def check_expand(y: Tensor, h: Tensor, F: Tensor, bounds: tuple[int, ...], dropout: Dropout) -> None:
    expected = y.double()
    for k, mask in enumerate(masks(bounds, y.shape[1], dropout)):
        span = slice(bounds[k], bounds[k + 1])
        expected[span] += mask * (h[span].double() @ F[k].double())
    before = y[bounds[-1] :].clone()
    assert expand_(y, h, F, Groups(len(F), offsets_of(bounds)), dropout) is y
    assert_close(y, expected, y.dtype)
    assert torch.equal(y[bounds[-1] :], before)


def check_outer(
    x: Tensor, h: Tensor, bounds: tuple[int, ...], dropout: Dropout, transposed: bool = False
) -> None:
    count = len(bounds) - 1
    shape = (count, h.shape[1], x.shape[1]) if transposed else (count, x.shape[1], h.shape[1])
    with poisoned_memory():
        out = x.new_empty(shape, dtype=torch.float32)
        outer(x, h, Groups(count, offsets_of(bounds)), out, transposed=transposed, dropout=dropout)
    for k, mask in enumerate(masks(bounds, x.shape[1], dropout)):
        span = slice(bounds[k], bounds[k + 1])
        expected = (mask * x[span].double()).T @ h[span].double()
        found = out[k].T if transposed else out[k]
        if len(mask):
            assert_close(found, expected, torch.float32, f"group {k}")
        else:
            assert (found == 0).all()


def check_all(bounds: tuple[int, ...], rows: int, columns: int, rank: int, dropout: Dropout) -> None:
    count = len(bounds) - 1
    x, h, F = random(rows, columns), random(rows, rank, seed=1), random(count, rank, columns, seed=2)
    check_shrink(x, F, bounds, dropout)
    check_outer(x, h, bounds, dropout)
    check_expand(x, h, F, bounds, dropout)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in (SHRINK, EXPAND, OUTER):
            stack.enter_context(kernel.using(TILE))
        stack.enter_context(ADD_CHUNKS.using(Config({"BE": 64}, warps=1)))
        yield


@pytest.mark.parametrize("config", [TILE, WIDE_TILE], ids=str)
def test_several_tiles(config: Config) -> None:
    with SHRINK.using(config), EXPAND.using(config), OUTER.using(config):
        check_all(BOUNDS, 53, 37, 5, dropped(3))


@pytest.mark.usefixtures("small_tiles")
def test_ranks_of_several_tiles() -> None:
    check_all((0, 9, 20), 20, 19, 150, dropped(2))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 33),
    st.integers(1, 20),
    st.booleans(),
)
def test_any_shape(sizes: list[int], more: int, columns: int, rank: int, drop: bool) -> None:
    bounds = (0, *torch.tensor(sizes).cumsum(0).tolist())
    check_all(bounds, max(bounds[-1] + more, 1), columns, rank, dropped(len(sizes)) if drop else Dropout())


def test_groups_of_many_chunks() -> None:
    """Sums over more than a chunk of rows (1024 at this rank), in a group that begins within one."""
    with OUTER.using(Config({"BR": 512, "BD": 16}, warps=1)):
        x, h = random(3200, 16), random(3200, 4, seed=1)
        check_outer(x, h, (0, 700, 3100), Dropout())
        check_outer(x, h, (0, 700, 3100), dropped(2), transposed=True)


@pytest.mark.usefixtures("small_tiles")
def test_equal_groups_are_groups_at_equal_offsets() -> None:
    x, h, F = random(60, 19), random(60, 5, seed=1), random(3, 5, 19, seed=2)
    equal, given_bounds = Groups(3), Groups(3, offsets_of((0, 20, 40, 60)))
    drop = dropped(3)
    assert torch.equal(shrink(x, F, equal, 0.7, drop), shrink(x, F, given_bounds, 0.7, drop))
    a, b = (expand_(x.clone(), h, F, g, drop) for g in (equal, given_bounds))
    assert torch.equal(a, b)
    a, b = (
        outer(x, h, g, torch.empty_like(F.mT), transposed=False, dropout=drop) for g in (equal, given_bounds)
    )
    assert torch.equal(a, b)


@pytest.mark.usefixtures("small_tiles")
def test_offsets_that_pass_the_rows_touch_no_other_memory() -> None:
    memory = random(60, 19)
    kept = memory[40:].clone()
    expand_(memory[:40], random(40, 5), random(2, 5, 19), Groups(2, offsets_of((0, 20, 55))))
    assert torch.equal(memory[40:], kept)


@pytest.mark.usefixtures("small_tiles")
def test_strides() -> None:
    rows = random(53, 60)[:, 3:40]  # a slice of wider rows
    factors = random(3, 37, 5, seed=2).mT
    check_shrink(rows, factors, BOUNDS, dropped(3))
    check_outer(rows, random(53, 5, seed=1), BOUNDS, dropped(3))
    check_expand(rows, random(53, 5, seed=1), factors, BOUNDS, dropped(3))


@pytest.mark.usefixtures("small_tiles")
def test_indices_beyond_32_bits() -> None:
    """Rows and factors whose elements lie more than 2^31 apart; only what is touched takes memory."""
    far = torch.empty(2**31 + 2**26, dtype=torch.bfloat16, device=DEVICE)
    x = far.as_strided((40, 16), (2**31 // 38, 1)).copy_(random(40, 16))
    h, bounds = random(40, 4, dtype=torch.bfloat16, seed=1), (0, 19, 40)
    F = random(2, 4, 16, dtype=torch.bfloat16, seed=2)
    check_shrink(x, F, bounds, Dropout())
    check_outer(x, h, bounds, Dropout())
    check_expand(x, h, F, bounds, Dropout())
    far_factors = far.as_strided((2, 4, 16), (2**31 + 2**20, 16, 1)).copy_(F)
    near = random(40, 16, dtype=torch.bfloat16)
    check_shrink(near, far_factors, bounds, Dropout())
    check_expand(near, h, far_factors, bounds, Dropout())


def test_launching_reads_no_data() -> None:
    """Tensors of the meta device have none: so nothing is waited for, and grids depend on shapes only."""
    with recording("sm_90") as found:
        joint_lora.examples(torch.bfloat16)
    names = {launch.kernel.name for launch in found.launches}
    assert names == {kernel.name for kernel in (SHRINK, EXPAND, OUTER, ADD_CHUNKS)}


def broken_shrink() -> None:
    x, F = random(60, 37), random(3, 5, 37, seed=2)
    check_shrink(x, F, BOUNDS, dropped(3))


def broken_expand() -> None:
    check_expand(random(60, 37), random(60, 20, seed=1), random(3, 20, 37, seed=2), BOUNDS, dropped(3))


def broken_outer() -> None:
    x, h = random(2200, 19), random(2200, 5, seed=1)
    with OUTER.using(Config({"BR": 512, "BD": 16}, warps=1)):
        check_outer(x, h, (0, 700, 2000), dropped(2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("kernel", "check", "old", "new"),
    [
        (SHRINK, broken_shrink, "range(0, D, BD)", "range(0, D - BD, BD)"),
        (SHRINK, broken_shrink, "offset(group, f_group)", "offset(0, f_group)"),
        (SHRINK, broken_shrink, "ts < end, js < rank", "ts < rows, js < rank"),
        (SHRINK, broken_shrink, "total * alpha", "total"),
        (SHRINK, broken_shrink, "ts - begin", "ts"),
        (SHRINK, broken_shrink, "tl.load(SEEDS + group)", "tl.load(SEEDS)"),
        (EXPAND, broken_expand, "in_rank = js < rank", "in_rank = js < rank - 1"),
        (EXPAND, broken_expand, "offset(group, f_group)", "offset(0, f_group)"),
        (EXPAND, broken_expand, "ts < end", "ts < rows"),
        (EXPAND, broken_expand, "% across * BD", "// across * BD"),
        (EXPAND, broken_expand, "first_column, threshold", "0, threshold"),
        (EXPAND, broken_expand, "y.to(tl.float32) + total", "total"),
        (OUTER, broken_outer, "tl.minimum(first + CHUNK, end)", "first + CHUNK"),
        (OUTER, broken_outer, "tl.minimum(first + CHUNK, end)", "end"),
        (OUTER, broken_outer, "in_rows = ts < stop", "in_rows = ts < stop - 1"),
        (OUTER, broken_outer, "offset(chunk, D * rank)", "offset(chunk, D)"),
        (OUTER, broken_outer, "ts - begin", "ts - first"),
        (ADD_CHUNKS, broken_outer, "range(0, count)", "range(1, count)"),
        (ADD_CHUNKS, broken_outer, "begin // CHUNK + group", "begin // CHUNK"),
        (ADD_CHUNKS, broken_outer, "tl.cdiv(end - begin, CHUNK)", "tl.cdiv(rows, CHUNK)"),
    ],
)
def test_a_broken_copy_fails(kernel: Kernel, check: Callable[[], None], old: str, new: str) -> None:
    with broken(kernel, old, new), pytest.raises(AssertionError):
        check()
