"""W_m = W + s * sum_c u_mc B_c A_c: full deltas merged into copies of a weight (OP-Mix, arXiv 2605.15220).

Tiny example with r = 1 and one adapter: W = 1, A = 2, B = 3, s = 0.5, u = 0.1: 1 + 0.5 * 0.1 * 3 * 2 = 1.3.

The coefficients enter in float32, on each adapter's own product B_c A_c, and not on B before the product:
rounding u * s * B to 16 bits would cost another 1.6e-3 of the delta (bfloat16, root mean square), and float16
loses small entries. The price is C multiply-adds for each element, and columns in blocks of one adapter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels import stochastic
from opmix_kernels.language import dot, offset, rounded
from opmix_kernels.runtime import Config, Kernel, cdiv, require_available
from opmix_kernels.stochastic import stochastically_rounded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

PROGRAMS = 1024
"""Programs that fill any GPU: candidates share a program, and one reading of W, where there are more."""


def reference(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Tensor:
    """Plain torch, arguments as of :func:`merge_deltas` (coefficients [M, C]), computed in the widest dtype
    of weight, A and B, in float32 at least; float64 arguments give the yardstick of the tests."""
    widest = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), B.dtype)
    dtype = torch.promote_types(widest, torch.float32)
    deltas = torch.einsum("mc,cor,cri->moi", coefficients.to(dtype), B.to(dtype), A.to(dtype))
    merged = weight.to(dtype) + scale * deltas
    if seed is not None:
        return stochastic.reference(merged.float(), seed)
    return merged.to(out_dtype or weight.dtype)


@triton.jit
def merge_kernel(
    W, A, B, U, OUT, M, N, D, C, candidates, scale, seed, w_row, w_column, a_adapter, a_row, a_column,
    b_adapter, b_row, b_column, out_candidate, out_row, out_column,
    RANK: tl.constexpr, BR: tl.constexpr, STOCHASTIC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BD] of ``candidates`` of the M results: W is read once for them.

    A [C, RANK, D], B [C, N, RANK]. A step of the inner loop takes BR columns of one adapter.
    """
    PARTS: tl.constexpr = (RANK + BR - 1) // BR
    tiles = tl.cdiv(D, BD)
    first_row = (tl.program_id(0) // tiles) * BN
    first_column = (tl.program_id(0) % tiles) * BD
    rows = first_row + tl.arange(0, BN)
    columns = first_column + tl.arange(0, BD)
    in_rows, in_columns = rows[:, None] < N, columns[None, :] < D
    inside = in_rows & in_columns
    rows_of_b = B + offset(rows, b_row)[:, None]
    columns_of_a = A + offset(columns, a_column)[None, :]
    weight = tl.load(W + offset(rows, w_row)[:, None] + offset(columns, w_column)[None, :], mask=inside,
                     other=0.0).to(tl.float32)  # fmt: skip
    out = OUT + offset(rows, out_row)[:, None] + offset(columns, out_column)[None, :]
    first = tl.program_id(1) * candidates
    for m in range(first, min(first + candidates, M)):
        delta = tl.zeros((BN, BD), dtype=tl.float32)
        for step in range(0, C * PARTS):
            adapter = step // PARTS
            js = (step % PARTS) * BR + tl.arange(0, BR)
            b = tl.load(rows_of_b + offset(adapter, b_adapter) + offset(js, b_column)[None, :],
                        mask=in_rows & (js[None, :] < RANK), other=0.0)  # fmt: skip
            a = tl.load(columns_of_a + offset(adapter, a_adapter) + offset(js, a_row)[:, None],
                        mask=(js[:, None] < RANK) & in_columns, other=0.0)  # fmt: skip
            gate = tl.load(U + m * C + adapter)
            delta += gate * dot(b, a, tl.zeros((BN, BD), dtype=tl.float32))
        merged = weight + scale * delta
        if STOCHASTIC:
            row_of_all = offset(m, N) + rows
            merged = stochastically_rounded(merged, seed, row_of_all, first_column, D, BD)
        tl.store(out + offset(m, out_candidate), rounded(merged, OUT.dtype.element_ty), mask=inside)


# 32 elements a thread: W, an adapter's product and the sum of them are held in float32 registers, and two
# blocks of 256 threads fit on a multiprocessor
_WIDE = Config({"BN": 64, "BD": 128}, warps=8, stages=3)
_SMALL = Config({"BN": 64, "BD": 64}, warps=4, stages=2)
_FLOAT = Config({"BN": 32, "BD": 64}, warps=8, stages=2)
MERGE = Kernel(
    merge_kernel,
    {
        "sm_80": {2: [_WIDE, _SMALL], 4: [_FLOAT]},
        "sm_90": {2: [_WIDE, Config({"BN": 128, "BD": 128}, warps=16, stages=3)], 4: [_FLOAT]},
        "gfx942": {2: [Config({"BN": 64, "BD": 128}, warps=4, stages=2), _SMALL], 4: [_SMALL]},
    },
    is_product=True,
)


def _launch(
    weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, scale: float, seed: int | None, out: Tensor
) -> None:
    """Merge into ``out`` [M, d_out, d_in], of any strides."""
    require_available(weight.device)
    (count, rank, width), candidates, height = A.shape, len(coefficients), len(weight)
    half = A.dtype == B.dtype and A.dtype != torch.float32  # its products are exact in float32
    A, B = (x if half else x.to(out.dtype) for x in (A, B))

    tiles = cdiv(height, 128) * cdiv(width, 128)
    together = max(1, cdiv(candidates * min(tiles, PROGRAMS), PROGRAMS))
    MERGE(
        lambda b: (cdiv(height, b["BN"]) * cdiv(width, b["BD"]), cdiv(candidates, together)),
        like=A,
        key=f"{height}x{width} C{count} r{rank}",
        constexprs={
            "RANK": rank,
            "BR": min(32, max(16, triton.next_power_of_2(rank))),
            "STOCHASTIC": seed is not None,
        },
        W=weight, A=A, B=B, U=coefficients.float().contiguous(), OUT=out,
        M=candidates, N=height, D=width, C=count, candidates=together, scale=scale, seed=seed or 0,
        w_row=weight.stride(0), w_column=weight.stride(1),
        a_adapter=A.stride(0), a_row=A.stride(1), a_column=A.stride(2),
        b_adapter=B.stride(0), b_row=B.stride(1), b_column=B.stride(2),
        out_candidate=out.stride(0), out_row=out.stride(1), out_column=out.stride(2),
    )  # fmt: skip


@torch.library.custom_op("opmix_kernels::merge_deltas", mutates_args=())
def _merged(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    scale: float,
    out_dtype: torch.dtype,
    seed: int | None,
) -> Tensor:
    out = weight.new_empty((len(coefficients), *weight.shape), dtype=out_dtype)
    _launch(weight, A, B, coefficients, scale, seed, out)
    return out


@_merged.register_fake
def _(weight, A, B, coefficients, scale, out_dtype, seed):
    return weight.new_empty((coefficients.shape[0], *weight.shape), dtype=out_dtype)


@torch.library.custom_op("opmix_kernels::merge_deltas_into", mutates_args=("out",))
def _merge_into(
    weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, scale: float, seed: int | None, out: Tensor
) -> None:
    _launch(weight, A, B, coefficients, scale, seed, out)


def merge_deltas(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """W_m = W + s * sum_c u_mc B_c A_c for every candidate m; source: arXiv 2605.15220, with the full deltas
    summed. Without gradients: those of the coefficients come from :func:`gated_lowrank_linear`.

    Everything is summed in float32 and rounded once, to the dtype of the result. Adapters of one 16-bit
    dtype are multiplied as they are, exactly; others are cast to the dtype of the result first. Measured for
    C = 7 and r = 16, root mean square of the error over that of the delta, before the result is rounded:
    1e-7, and 2.3e-3 where float32 adapters are cast to bfloat16 (3e-4: float16). Rounding the result to
    bfloat16 costs 1.7e-3 of the *weight*: as much as the whole delta where that is 0.2% of the weight.

    FLOPs: M d_out d_in C (2 r + 2). Bytes: W once and each result once, where L2 holds A and B:
    d_out d_in (bytes of W + M bytes of a result). With r = 16 and C = 7 in bfloat16 that is 126 to 252 FLOPs
    a byte: below what tensor cores do for each byte of memory traffic (H200: 184 measured) for one candidate.

    Args:
        weight: [d_out, d_in], float32, float16 or bfloat16, any strides.
        A: [C, r, d_in], any strides; B: [C, d_out, r].
        coefficients: [M, C], or [C] for one candidate.
        scale: s.
        out_dtype: of the result; the weight's if not given.
        seed: round to bfloat16 stochastically, so that the mean over seeds is W_m: 0 to 2^63 - 1. Results of
            the same seed, coefficients' place and shape are the same bits on every device.
        out: where to put the result, any strides; it must not overlap the weight, A or B.

    Returns:
        [M, d_out, d_in], or [d_out, d_in] for coefficients [C].

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; gradients that would be lost.
        RuntimeError: tensors that are not on a GPU, outside of the interpreter.
    """
    _check(weight, A, B, coefficients)
    dtype = out.dtype if out is not None else out_dtype or weight.dtype
    several = coefficients if coefficients.dim() == 2 else coefficients[None]
    shape = (*coefficients.shape[:-1], *weight.shape)
    if dtype not in DTYPES:
        raise ValueError(f"out_dtype is {dtype}: float32, float16 or bfloat16")
    if out is not None and (out_dtype or dtype) != dtype:
        raise ValueError(f"out_dtype is {out_dtype}, and out is {dtype}")
    if out is not None and (tuple(out.shape) != shape or out.device != weight.device):
        raise ValueError(f"out is {tuple(out.shape)} on {out.device}, not {shape} on {weight.device}")
    if seed is not None and (dtype != torch.bfloat16 or not 0 <= seed < 2**63):
        raise ValueError(f"seed is {seed} with a result of {dtype}: from 0 to 2^63 - 1, with bfloat16 only")
    if out is None:
        merged: Tensor = _merged(weight, A, B, several, scale, dtype, seed)
        return merged if coefficients.dim() == 2 else merged[0]
    _merge_into(weight, A, B, several, scale, seed, out if coefficients.dim() == 2 else out[None])
    return out


def _check(weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}, not [d_out, d_in]")
    (d_out, d_in), count, rank = weight.shape, A.shape[0], A.shape[1]
    if A.dim() != 3 or A.shape[2] != d_in:
        raise ValueError(f"A is {tuple(A.shape)}, not [C, r, {d_in}]")
    if B.shape != (count, d_out, rank):
        raise ValueError(f"B is {tuple(B.shape)}, not [{count}, {d_out}, {rank}]")
    if coefficients.dim() not in (1, 2) or coefficients.shape[-1] != count:
        raise ValueError(f"coefficients are {tuple(coefficients.shape)}, not [M, {count}] or [{count}]")
    for name, x in {"weight": weight, "A": A, "B": B, "coefficients": coefficients}.items():
        if name != "coefficients" and x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: float32, float16 or bfloat16")
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device}, weight on {weight.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which merging does not give: use gated_lowrank_linear, or "
                "torch.no_grad()"
            )


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device."""
    with torch.device("meta"):
        for rank, candidates, seed in ((16, 64, None), (64, 1, None), (16, 1, 0)):
            if seed is not None and dtype != torch.bfloat16:
                continue
            weight = torch.empty(2048, 2048)
            A = torch.empty(7, rank, 2048, dtype=dtype)
            B = torch.empty(7, 2048, rank, dtype=dtype)
            out = torch.empty(candidates, 2048, 2048, dtype=dtype)
            _launch(weight, A, B, torch.empty(candidates, 7), 2.0, seed, out)
