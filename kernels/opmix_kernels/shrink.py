"""The producer of the wide buffer: normalised activations and gated low-rank activations, side by side.

    X' = x                                   or RMSNorm: x / sqrt(mean(x^2) + eps) * g
    Z_i = s * repeat(u_m, r) * (X' A_i^T)    candidate m's rows, consumer i of n
    row = [ Z_0 | X' | Z_1 | ... ]           columns as of opmix_kernels.wide.WideLayout

A layer of M candidate mixtures (OP-Mix, arXiv 2605.15220), W x + s B diag(repeat(u_m, r)) A x, is then one
library product of a span of the buffer. The same kernel, run on the gradient G with B^T for A, writes the
buffer [s u (G B) | G] of the backward pass, and on the way sums what the coefficients' gradients need.

Tiny example, no norm, d = r = C = n = 1: x = 2, A = 3, u = 0.5, s = 10: Z = 10 * 0.5 * 2 * 3 = 30, and the
row is [30 | 2] (and zeros between, to multiples of 16 columns).

Cost for R rows and J = C * r: 2 R n J d FLOPs on tensor cores; R d elements read from memory once, and again
from cache (or memory, where d is large) for the norm and for each further block of BJ columns; R (d + n J)
elements written; A (n J d elements) is read from cache once per BR rows.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.language import dot, offset, rounded
from opmix_kernels.runtime import Config, Kernel, as_rows, cdiv, require_available
from opmix_kernels.wide import WideLayout, padded, padded_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(
    x: Tensor,
    A: Tensor,
    coefficients: Tensor,
    scale: float,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`norm_shrink_gate` in plain torch, rounding where the kernel rounds; float64 arguments give the
    yardstick of the tests."""
    out_dtype = out_dtype or x.dtype
    x = x.reshape(-1, x.shape[-1])
    if norm_weight is not None:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        x = normed * norm_weight
    x = x.to(out_dtype)
    layout = WideLayout(x.shape[1], len(A), A.shape[1] * A.shape[2])
    wide = x.new_zeros(len(x), layout.width)
    wide[:, layout.x] = x
    gates = (scale * coefficients).repeat_interleave(A.shape[2], dim=1)  # [M, J]
    gates = gates.repeat_interleave(len(x) // max(len(gates), 1), dim=0)  # [R, J]
    for i, consumer in enumerate(A.to(out_dtype)):
        low = x @ consumer.flatten(0, 1).T
        wide[:, layout.z(i)] = (gates.to(torch.promote_types(low.dtype, torch.float32)) * low).to(out_dtype)
    return wide


@triton.jit
def shrink_kernel(
    X, A, U, G, OUT, PRODUCTS, SAVED, PARTIALS, T, D, DP, tiles, scale, eps, x_row, a_row, a_column, out_row,
    C: tl.constexpr, RANK: tl.constexpr, JP: tl.constexpr, N: tl.constexpr,
    BR: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BR rows of one candidate: X [R, D] to OUT [R, DP + N * JP]; A [N * JP, D].

    G [D], the norm's weight, or None without a norm. PRODUCTS [R, N * JP], or None: X' A^T before the gates.
    SAVED [R, N * JP] and PARTIALS [programs, N * JP], or None: sums over this program's rows of
    SAVED * (X' A^T), float32. Tiles never span two candidates, so that the gates are one row of U.
    """
    candidate = tl.program_id(0) // tiles
    t = (tl.program_id(0) % tiles) * BR + tl.arange(0, BR)
    in_rows = t < T
    rows = (offset(candidate, T) + t)[:, None]
    x_rows, out_rows = X + rows * x_row, OUT + rows * out_row
    if G is not None:
        squares = tl.zeros((BR, BK), dtype=tl.float32)
        for k in range(0, D, BK):
            ks = k + tl.arange(0, BK)
            inside = in_rows[:, None] & (ks < D)[None, :]
            x = tl.load(x_rows + ks[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += x * x
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)
    for j in range(0, N * JP, BJ):
        js = j + tl.arange(0, BJ)
        in_columns = js < N * JP
        total = tl.zeros((BR, BJ), dtype=tl.float32)
        for k in range(0, D, BK):
            ks = k + tl.arange(0, BK)
            in_ks = ks < D
            x = tl.load(x_rows + ks[None, :], mask=in_rows[:, None] & in_ks[None, :], other=0.0)
            if G is not None:
                g = tl.load(G + ks, mask=in_ks, other=0.0).to(tl.float32)
                # as Hugging Face's LlamaRMSNorm: rounded to the input's dtype before the weight
                x = rounded(x.to(tl.float32) * inverse[:, None], X.dtype.element_ty).to(tl.float32)
                x = rounded(x * g[None, :], OUT.dtype.element_ty)
            elif X.dtype.element_ty != OUT.dtype.element_ty:
                x = rounded(x.to(tl.float32), OUT.dtype.element_ty)
            a = tl.load(A + js[None, :].to(tl.int64) * a_row + ks[:, None].to(tl.int64) * a_column,
                        mask=in_ks[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
            # padding gets the zeros that were loaded in place of columns from D on
            first = in_rows[:, None] & (ks < DP)[None, :] & (j == 0)
            tl.store(out_rows + JP + ks[None, :], x, mask=first)
            total = dot(x, a, total)
        within = js % JP
        gates = tl.load(U + candidate * C + within // RANK, mask=in_columns & (within < C * RANK), other=0.0)
        places = tl.where(js < JP, js, js + DP)  # Z_0 left of X', the others right
        inside = in_rows[:, None] & in_columns[None, :]
        gated = rounded(total * (scale * gates)[None, :], OUT.dtype.element_ty)
        tl.store(out_rows + places[None, :], gated, mask=inside)
        low = rows * (N * JP) + js[None, :]
        if PRODUCTS is not None:
            tl.store(PRODUCTS + low, rounded(total, PRODUCTS.dtype.element_ty), mask=inside)
        if SAVED is not None:
            saved = tl.load(SAVED + low, mask=inside, other=0.0).to(tl.float32)
            tl.store(PARTIALS + offset(tl.program_id(0), N * JP) + js, tl.sum(saved * total, axis=0),
                     mask=in_columns)  # fmt: skip


_NVIDIA32 = [Config({"BR": 64, "BJ": 64, "BK": 16}, warps=4, stages=2)]
SHRINK = Kernel(
    shrink_kernel,
    {
        "sm_80": {2: [Config({"BR": 64, "BJ": 128, "BK": 64}, warps=8, stages=3)], 4: _NVIDIA32},
        "sm_90": {
            2: [
                Config({"BR": 128, "BJ": 128, "BK": 64}, warps=8, stages=3),  # A is read half as often
                Config({"BR": 64, "BJ": 128, "BK": 64}, warps=4, stages=3),  # for few rows a candidate
            ],
            4: _NVIDIA32,
        },
        "gfx942": {
            2: [Config({"BR": 64, "BJ": 128, "BK": 64}, warps=4, stages=2)],
            4: [Config({"BR": 64, "BJ": 64, "BK": 32}, warps=4, stages=2)],
        },
    },
    is_product=True,
)


def shrink(
    x: Tensor,
    A: Tensor,
    coefficients: Tensor,
    rank: int,
    consumers: int,
    scale: float,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    products: Tensor | None = None,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        x: [R, d], elements of a row side by side; R is a multiple of M.
        A: [n * padded(C * r), d] in the dtype of the result, any strides.
        coefficients: [M, C].
        products: where X' A^T goes, contiguous [R, n * padded(C * r)], any dtype.
        saved: what X' A^T is multiplied by and summed with, contiguous, of that shape.

    Returns:
        The wide buffer [R, layout.width] in A's dtype; with ``saved`` also the sums over each candidate's
        rows, [M, n * padded(C * r)] float32, in two stages of fixed order.
    """
    require_available(x.device)
    (rows, features), (candidates, adapters) = x.shape, coefficients.shape
    layout = WideLayout(features, consumers, adapters * rank)
    out = torch.empty(rows, layout.width, dtype=A.dtype, device=x.device)
    key = f"d={features} j={len(A)}"
    per_candidate = rows // max(candidates, 1)
    tiles = cdiv(per_candidate, SHRINK.config(A, key).blocks["BR"])
    partials = None
    if saved is not None:
        partials = torch.empty(candidates * tiles, len(A), dtype=torch.float32, device=x.device)
    SHRINK(
        (candidates * tiles,),
        like=A,
        key=key,
        constexprs={"C": adapters, "RANK": rank, "JP": layout.gated, "N": consumers},
        X=x, A=A, U=coefficients.float().contiguous(), G=norm_weight, OUT=out, PRODUCTS=products, SAVED=saved,
        PARTIALS=partials, T=per_candidate, D=features, DP=padded(features), tiles=max(tiles, 1), scale=scale,
        eps=eps, x_row=x.stride(0), a_row=A.stride(0), a_column=A.stride(1), out_row=out.stride(0),
    )  # fmt: skip
    return out, None if partials is None else partials.view(candidates, tiles, len(A)).sum(dim=1)


def require_rows(x: Tensor, coefficients: Tensor, adapters: int) -> None:
    """ValueError naming what does not fit rows of x [..., d] in M equal groups and coefficients [M, C]."""
    if coefficients.dim() != 2 or coefficients.shape[1] != adapters:
        raise ValueError(f"coefficients must be [M, {adapters}], got {list(coefficients.shape)}")
    rows = x.shape[:-1].numel()
    if len(coefficients) == 0 or rows % len(coefficients) != 0:
        raise ValueError(f"coefficients: {rows} rows of x are not {len(coefficients)} equal groups")


def require_dtype(dtype: torch.dtype, name: str) -> None:
    """ValueError where kernels do not compute in this dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {dtype}")


@torch.library.custom_op("opmix_kernels::norm_shrink_gate", mutates_args=())
def _operation(
    x: Tensor,
    A: Tensor,
    coefficients: Tensor,
    scale: float,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    weight = None if norm_weight is None else norm_weight.contiguous()
    out, _ = shrink(as_rows(x), padded_rows(A.to(out_dtype)), coefficients, A.shape[2], len(A), scale,
                    norm_weight=weight, eps=eps)  # fmt: skip
    return out


@_operation.register_fake
def _(x, A, coefficients, scale, norm_weight, eps, out_dtype):
    layout = WideLayout(x.shape[-1], A.shape[0], A.shape[1] * A.shape[2])
    # numel() would fix it: torch.compile would compile again for each number of rows
    return x.new_empty((prod(x.shape[:-1]), layout.width), dtype=out_dtype)


def norm_shrink_gate(
    x: Tensor,
    A: Tensor,
    coefficients: Tensor,
    *,
    scale: float,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalised and gated low-rank activations side by side (formula above); forward only.

    With ``layout = WideLayout(d, n, C * r)``, consumer i's output is
    ``F.linear(wide[:, layout.span(i)], layout.matrix(i, weight_i, B_i), bias_i)``. The scale is in Z.

    Args:
        x: [..., d], R rows, M equal groups one after the other.
        A: [n, C, r, d] of the n linear layers that read x; cast to ``out_dtype`` where it differs.
        coefficients: [M, C], float32; any value, also 0.
        scale: s.
        norm_weight: g [d] of the RMSNorm before the layers; None: x is copied. The norm is computed in
            float32 and rounded to x's dtype before g, like LlamaRMSNorm's; the product is rounded to
            ``out_dtype``.
        eps: of the norm, added to the mean square.
        out_dtype: of the buffer and of the products; x's if None. x may be a float32 residual stream beside
            16-bit layers.

    Returns:
        [R, layout.width], padding columns 0. Z comes from X' as rounded.

    Raises:
        ValueError: shapes or dtypes that do not fit, or inputs that require gradients.
        RuntimeError: no GPU, outside of Triton's interpreter.
    """
    if A.dim() != 4 or A.shape[3] != x.shape[-1]:
        raise ValueError(f"A must be [n, C, r, {x.shape[-1]}], got {list(A.shape)}")
    if norm_weight is not None and norm_weight.shape != x.shape[-1:]:
        raise ValueError(f"norm_weight must be [{x.shape[-1]}], got {list(norm_weight.shape)}")
    require_rows(x, coefficients, A.shape[1])
    require_dtype(x.dtype, "x")
    require_dtype(out_dtype or x.dtype, "out_dtype")
    inputs = {"x": x, "A": A, "coefficients": coefficients, "norm_weight": norm_weight}
    for name, tensor in inputs.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires gradients, which norm_shrink_gate has not: gated_lowrank_linear"
            )
    wide: Tensor = _operation(x, A, coefficients, scale, norm_weight, eps, out_dtype or x.dtype)
    return wide


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device: q, k, v after a norm,
    from a residual stream of the same dtype and of float32, and one layer without a norm."""
    with torch.device("meta"):
        A, U = torch.empty(3, 7, 16, 2048, dtype=dtype), torch.empty(64, 7)
        for stream in dict.fromkeys((dtype, torch.float32)):
            x, g = torch.empty(65536, 2048, dtype=stream), torch.empty(2048, dtype=stream)
            shrink(x, padded_rows(A), U, 16, 3, 2.0, norm_weight=g, eps=1e-6)
            shrink(x, padded_rows(A[:1]), U, 16, 1, 2.0)
