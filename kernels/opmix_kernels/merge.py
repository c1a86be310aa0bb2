"""W_m = W + s * sum_c u_mc B_c A_c: full deltas merged into copies of a weight (OP-Mix, arXiv 2605.15220).

Tiny example with r = 1 and one adapter: W = 1, A = 2, B = 3, s = 0.5, u = 0.1: 1 + 0.5 * 0.1 * 3 * 2 = 1.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.language import dot, offset, rounded
from opmix_kernels.runtime import Config, Kernel, cdiv, require_available


def reference(weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, scale: float) -> Tensor:
    """In the precision of the arguments, promoted; float64 arguments give the yardstick of the tests."""
    deltas = torch.einsum("mc,cor,cri->moi", coefficients.to(A.dtype), B, A)
    return weight + scale * deltas


@triton.jit
def merge_kernel(
    W, A, B, U, OUT, M, N, D, J, scale, w_row, a_row, b_row, out_candidate, out_row,
    RANK: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BD] of all M results: W is read once. A [J, D], B [N, J], J = C * RANK columns."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    in_rows, in_columns = rows < N, columns < D
    inside = in_rows[:, None] & in_columns[None, :]
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    weight = tl.load(W + rows[:, None] * w_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    for m in range(0, M):
        total = tl.zeros((BN, BD), dtype=tl.float32)
        for start in range(0, J, BJ):
            js = start + tl.arange(0, BJ)
            in_js = js < J
            gates = tl.load(U + m * C + js // RANK, mask=in_js, other=0.0) * scale
            b = tl.load(
                B + rows[:, None] * b_row + js[None, :], mask=in_rows[:, None] & in_js[None, :], other=0.0
            )
            a = tl.load(A + js[:, None].to(tl.int64) * a_row + columns[None, :],
                        mask=in_js[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
            gated = rounded(b.to(tl.float32) * gates[None, :], A.dtype.element_ty)
            total = dot(gated, a, total)
        where = OUT + offset(m, out_candidate) + rows[:, None] * out_row + columns[None, :]
        tl.store(where, rounded(weight + total, OUT.dtype.element_ty), mask=inside)


_TILES = Config({"BN": 64, "BD": 64, "BJ": 32}, warps=4, stages=2)
MERGE = Kernel(
    merge_kernel, {a: {2: [_TILES], 4: [_TILES]} for a in ("sm_80", "sm_90", "gfx942")}, is_product=True
)


def merge(
    weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, scale: float, out_dtype: torch.dtype
) -> Tensor:
    """Arguments as of :func:`merge_deltas`."""
    require_available(weight.device)
    count, rank, width = A.shape
    stacked_a = A.reshape(count * rank, width).contiguous()
    stacked_b = B.permute(1, 0, 2).reshape(len(weight), count * rank).contiguous()
    out = weight.new_empty((len(coefficients), *weight.shape), dtype=out_dtype)
    MERGE(
        lambda b: (cdiv(len(weight), b["BN"]), cdiv(width, b["BD"])),
        like=A,
        constexprs={"RANK": rank, "C": count},
        W=weight, A=stacked_a, B=stacked_b, U=coefficients.float().contiguous(), OUT=out,
        M=len(coefficients), N=len(weight), D=width, J=count * rank, scale=scale,
        w_row=weight.stride(0), a_row=stacked_a.stride(0), b_row=stacked_b.stride(0),
        out_candidate=out.stride(0), out_row=out.stride(1),
    )  # fmt: skip
    return out


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device."""
    with torch.device("meta"):
        weight, A, B = (
            torch.empty(2048, 2048),
            torch.empty(7, 16, 2048, dtype=dtype),
            torch.empty(7, 2048, 16, dtype=dtype),
        )
        merge(weight, A, B, torch.empty(64, 7), 2.0, dtype)
