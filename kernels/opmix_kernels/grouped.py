"""Products with one thin matrix per group of rows: narrowing, widening, and their gradients' outer product.

Rows [R, ...] lie grouped: group k's follow each other. F_k is group k's matrix, of r rows (the rank) and D
columns, read through strides, so that A_k [r, d_in] and B_k^T (B_k [d_out, r]) serve alike. With a mask M
from :mod:`opmix_kernels.dropout` or without:

    shrink   [R, D] -> [R, r]       H = alpha * (M * X) F_k^T
    expand   [R, r] -> [R, D]       Y += M * (H F_k)              in place
    outer    [R, D], [R, r] -> [K, D, r]   sum over the group's rows of (M * X)^T H

Products are accumulated in float32. Costs with e bytes per element: 2 R r D FLOPs each; shrink and outer read
e R (D + r) bytes, expand reads and writes e R (2 D + r); F_k comes from the cache. All are bound by memory up
to r = 128 or so.

Groups are equal, or bounded by offsets that only the device knows: then the grid has room for any division
of R rows, and each program looks up what is its own. Nothing is added up by atomics, and tiles start with the
group: a group's results are the same bits whichever groups it shares the call with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.dropout import NO_DROPOUT, Dropout, kept
from opmix_kernels.language import dot, offset, rounded
from opmix_kernels.runtime import ARCHITECTURES, Config, Kernel, cdiv


@triton.jit
def group_of(tile, OFFSETS, rows, groups, per_group, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Group of a tile of SIZE rows, and three rows: where the group begins, where the tile does, where the
    group ends. A tile that has no rows begins at the end.

    Of groups that begin at rows o_k, group k owns the tiles from o_k // SIZE + k on: there are never more of
    its tiles than up to the next group's first, as ceil((o' - o) / SIZE) <= o' // SIZE - o // SIZE + 1. So
    no running sum over the groups' tiles is needed.
    """
    if OFFSETS is None:
        tiles = tl.cdiv(per_group, SIZE)
        group = tile // tiles
        begin = group * per_group
        end = begin + per_group
        first = begin + tile % tiles * SIZE
    else:
        ks = tl.arange(0, GROUPS)
        begins = tl.load(OFFSETS + ks, mask=ks < groups, other=0).to(tl.int32)
        started = (begins // SIZE + ks <= tile) & (ks < groups)
        group = tl.maximum(tl.sum(started.to(tl.int32), axis=0) - 1, 0)
        begin = tl.load(OFFSETS + group).to(tl.int32)
        end = tl.minimum(tl.load(OFFSETS + group + 1).to(tl.int32), rows)
        first = begin + (tile - begin // SIZE - group) * SIZE
        end = tl.where(first < begin, first, end)  # rows before the first group are nobody's
    return group, begin, first, end


@triton.jit
def shrink_kernel(
    X, F, H, OFFSETS, SEEDS, STEP,
    rows, groups, per_group, D, rank, alpha, threshold, x_row, f_group, f_rank, f_column,
    GROUPS: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BJ] of H [rows, rank], summed over D."""
    group, begin, first, end = group_of(tl.program_id(0), OFFSETS, rows, groups, per_group, BR, GROUPS)
    if first >= end:
        return
    ts = first + tl.arange(0, BR)
    js = tl.program_id(1) * BJ + tl.arange(0, BJ)
    in_rows, in_rank = ts < end, js < rank
    x_rows = X + offset(ts, x_row)[:, None]
    f_rows = F + offset(group, f_group) + js[None, :] * f_rank
    if SEEDS is not None:
        seed, step = tl.load(SEEDS + group), tl.load(STEP)
    total = tl.zeros((BR, BJ), dtype=tl.float32)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        in_columns = columns < D
        x = tl.load(x_rows + columns[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        f = tl.load(
            f_rows + columns[:, None] * f_column, mask=in_columns[:, None] & in_rank[None, :], other=0.0
        )
        if SEEDS is not None:
            x = tl.where(kept(seed, step, ts - begin, start, threshold, BD), x, 0.0)
        total = dot(x, f, total)
    where = H + offset(ts, rank)[:, None] + js[None, :]
    tl.store(where, rounded(total * alpha, H.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])


@triton.jit
def expand_kernel(
    H, F, Y, OFFSETS, SEEDS, STEP,
    rows, groups, per_group, D, rank, threshold, y_row, f_group, f_rank, f_column,
    GROUPS: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BD] of Y [rows, D], summed over the rank. Neighbouring programs have the same rows."""
    across = tl.cdiv(D, BD)
    tile, first_column = tl.program_id(0) // across, tl.program_id(0) % across * BD
    group, begin, first, end = group_of(tile, OFFSETS, rows, groups, per_group, BR, GROUPS)
    if first >= end:
        return
    ts = first + tl.arange(0, BR)
    columns = first_column + tl.arange(0, BD)
    in_rows, in_columns = ts < end, columns < D
    where = Y + offset(ts, y_row)[:, None] + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    y = tl.load(where, mask=inside, other=0.0)  # on its way while the product is computed
    h_rows = H + offset(ts, rank)[:, None]
    f_columns = F + offset(group, f_group) + columns[None, :] * f_column
    total = tl.zeros((BR, BD), dtype=tl.float32)
    for start in range(0, rank, BJ):
        js = start + tl.arange(0, BJ)
        in_rank = js < rank
        h = tl.load(h_rows + js[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        f = tl.load(f_columns + js[:, None] * f_rank, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
        total = dot(h, f, total)
    if SEEDS is not None:
        seed, step = tl.load(SEEDS + group), tl.load(STEP)
        total = tl.where(kept(seed, step, ts - begin, first_column, threshold, BD), total, 0.0)
    tl.store(where, rounded(y.to(tl.float32) + total, Y.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    X, H, PARTIAL, OFFSETS, SEEDS, STEP,
    rows, groups, per_group, D, rank, threshold, x_row, h_row, p_column, p_rank,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile [BD, BJ] of the outer product [D, rank] over at most CHUNK rows of one group. Neighbouring
    programs have the same rows."""
    across = tl.cdiv(D, BD)
    chunk, first_column = tl.program_id(0) // across, tl.program_id(0) % across * BD
    group, begin, first, end = group_of(chunk, OFFSETS, rows, groups, per_group, CHUNK, GROUPS)
    if first >= end:
        return  # and the sum does not read it
    columns = first_column + tl.arange(0, BD)
    js = tl.program_id(1) * BJ + tl.arange(0, BJ)
    in_columns, in_rank = columns < D, js < rank
    stop = tl.minimum(first + CHUNK, end)
    if SEEDS is not None:
        seed, step = tl.load(SEEDS + group), tl.load(STEP)
    total = tl.zeros((BD, BJ), dtype=tl.float32)
    for start in range(first, stop, BR):
        ts = start + tl.arange(0, BR)
        in_rows = ts < stop
        x = tl.load(X + offset(ts, x_row)[:, None] + columns[None, :],
                    mask=in_rows[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
        h = tl.load(H + offset(ts, h_row)[:, None] + js[None, :],
                    mask=in_rows[:, None] & (js < h_row)[None, :], other=0.0)  # fmt: skip
        if SEEDS is not None:
            x = tl.where(kept(seed, step, ts - begin, first_column, threshold, BD), x, 0.0)
        total = dot(tl.trans(x), h, total)
    where = PARTIAL + offset(chunk, D * rank) + columns[:, None] * p_column + js[None, :] * p_rank
    tl.store(where, total, mask=in_columns[:, None] & in_rank[None, :])


@triton.jit
def add_chunks_kernel(
    PARTIAL, OUT, OFFSETS, rows, groups, per_group, size,
    CHUNK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BE elements of group k's sum [size] over its chunks, in their order."""
    group = tl.program_id(1)
    if OFFSETS is None:
        count = tl.cdiv(per_group, CHUNK)
        chunk = group * count
    else:
        begin = tl.load(OFFSETS + group).to(tl.int32)
        end = tl.minimum(tl.load(OFFSETS + group + 1).to(tl.int32), rows)
        count = tl.cdiv(end - begin, CHUNK)
        chunk = begin // CHUNK + group
    elements = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = elements < size
    total = tl.zeros((BE,), dtype=tl.float32)
    for i in range(0, count):
        total += tl.load(PARTIAL + offset(chunk + i, size) + elements, mask=inside, other=0.0)
    tl.store(OUT + offset(group, size) + elements, rounded(total, OUT.dtype.element_ty), mask=inside)


_HALVES = (Config({"BR": 64, "BD": 64}, warps=4, stages=3), Config({"BR": 128, "BD": 64}, warps=8, stages=3))
_HALVES_IN_PLACE = (
    Config({"BR": 64, "BD": 64}, warps=4, stages=2),
    Config({"BR": 64, "BD": 128}, warps=8, stages=2),
)
_HALVES_OUTER = (
    Config({"BR": 64, "BD": 64}, warps=4, stages=3),
    Config({"BR": 64, "BD": 128}, warps=8, stages=3),
)
_FLOAT32 = (Config({"BR": 32, "BD": 32}, warps=4, stages=2),)
_FLOAT32_IN_PLACE = (Config({"BR": 32, "BD": 64}, warps=4, stages=2),)
SHRINK = Kernel(
    shrink_kernel,
    {a: {2: _HALVES, 4: _FLOAT32} for a in ARCHITECTURES},
    is_product=True,
    name="grouped_shrink_kernel",
)
EXPAND = Kernel(
    expand_kernel, {a: {2: _HALVES_IN_PLACE, 4: _FLOAT32_IN_PLACE} for a in ARCHITECTURES}, is_product=True
)
OUTER = Kernel(outer_kernel, {a: {2: _HALVES_OUTER, 4: _FLOAT32} for a in ARCHITECTURES}, is_product=True)
ADD_CHUNKS = Kernel(
    add_chunks_kernel, {a: {4: (Config({"BE": 1024}, warps=4),)} for a in ARCHITECTURES}, is_product=False
)


@dataclass(frozen=True)
class Groups:
    """How R rows are divided among ``count`` groups: equally, or at ``offsets`` (int64 [count + 1])."""

    count: int
    offsets: Tensor | None = None

    def arguments(self, rows: int) -> dict[str, Any]:
        return {
            "OFFSETS": self.offsets,
            "rows": rows,
            "groups": self.count,
            "per_group": rows // self.count,
        }

    @property
    def width(self) -> int:
        """Power of two from the number of groups up."""
        return triton.next_power_of_2(self.count)

    def tiles(self, rows: int, size: int) -> int:
        """Enough tiles of ``size`` rows, none of which reaches over two groups."""
        if self.offsets is None:
            return self.count * cdiv(rows // self.count, size)
        return rows // size + self.count


def _rank_tile(rank: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(rank), 16), largest)  # a product's sides are 16 at least


def _key(width: int, rank: int, dropout: Dropout) -> str:
    return f"d{width} r{rank}{' dropout' if dropout.threshold else ''}"


def shrink(x: Tensor, factors: Tensor, groups: Groups, alpha: float, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """alpha * (M * x) F_k^T, [R, r] in x's dtype; rows of no group stay as they were allocated.

    Args:
        x: [R, D], elements of a row side by side.
        factors: [K, r, D] of x's dtype, any strides.
    """
    rows, width = x.shape
    rank = factors.shape[1]
    h = x.new_empty(rows, rank)
    tile = _rank_tile(rank, 128)
    SHRINK(
        lambda b: (groups.tiles(rows, b["BR"]), cdiv(rank, tile)),
        like=x,
        key=_key(width, rank, dropout),
        constexprs={"GROUPS": groups.width, "BJ": tile},
        X=x, F=factors, H=h, D=width, rank=rank, alpha=alpha, x_row=x.stride(0),
        f_group=factors.stride(0), f_rank=factors.stride(1), f_column=factors.stride(2),
        **groups.arguments(rows), **dropout.arguments(),
    )  # fmt: skip
    return h


def expand_(y: Tensor, h: Tensor, factors: Tensor, groups: Groups, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """y += M * (h F_k) in place; rows of no group stay as they are.

    Args:
        y: [R, D], elements of a row side by side.
        h: [R, r] contiguous, of y's dtype.
        factors: [K, r, D] of y's dtype, any strides.
    """
    rows, width = y.shape
    rank = factors.shape[1]
    EXPAND(
        lambda b: (groups.tiles(rows, b["BR"]) * cdiv(width, b["BD"]),),
        like=y,
        key=_key(width, rank, dropout),
        constexprs={"GROUPS": groups.width, "BJ": _rank_tile(rank, 64)},
        H=h, F=factors, Y=y, D=width, rank=rank, y_row=y.stride(0),
        f_group=factors.stride(0), f_rank=factors.stride(1), f_column=factors.stride(2),
        **groups.arguments(rows), **dropout.arguments(),
    )  # fmt: skip
    return y


def outer(
    x: Tensor, h: Tensor, groups: Groups, out: Tensor, *, transposed: bool, dropout: Dropout = NO_DROPOUT
) -> Tensor:
    """Sums over each group's rows of (M * x)^T h into ``out``; zeros for a group without rows.

    Chunks of rows are summed one by one into float32 scratch of about (R / chunk + K) r D elements, and these
    in their order: at r = 16 the scratch adds a sixteenth to the bytes read.

    Args:
        x: [R, D], elements of a row side by side.
        h: [R, r or more] contiguous, of x's dtype; columns from r on are zeros.
        out: contiguous, [K, D, r], or [K, r, D] where ``transposed``.
    """
    rows, width = x.shape
    rank = out.shape[1] if transposed else out.shape[2]
    tile = _rank_tile(rank, 128)
    chunk = min(64 * tile, 2048)
    partial = torch.empty(groups.tiles(rows, chunk), width * rank, dtype=torch.float32, device=x.device)
    OUTER(
        lambda b: (len(partial) * cdiv(width, b["BD"]), cdiv(rank, tile)),
        like=x,
        key=_key(width, rank, dropout),
        constexprs={"GROUPS": groups.width, "CHUNK": chunk, "BJ": tile},
        X=x, H=h, PARTIAL=partial, D=width, rank=rank, x_row=x.stride(0), h_row=h.shape[1],
        p_column=1 if transposed else rank, p_rank=width if transposed else 1,
        **groups.arguments(rows), **dropout.arguments(),
    )  # fmt: skip
    ADD_CHUNKS(
        lambda b: (cdiv(width * rank, b["BE"]), groups.count),
        like=partial,
        constexprs={"CHUNK": chunk},
        PARTIAL=partial, OUT=out, size=width * rank, **groups.arguments(rows),
    )  # fmt: skip
    return out
