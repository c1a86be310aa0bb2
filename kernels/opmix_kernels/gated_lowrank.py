"""A linear layer of M candidate mixtures at once, differentiable in x, the coefficients, A and B.

    y = W x + s * B diag(repeat(u_m, r)) A x + bias        rows of x grouped by candidate m

(OP-Mix, arXiv 2605.15220; full deltas are summed.) With P = X A^T, Q = G B, and g = s * repeat(u_m, r) by
columns:

    forward      [g P | X] [B | W]^T       the producer's buffer, one library product
    dX         = [g Q | G] [A; W]          the same kernel on the gradient G of y, one library product
    du_mc      = s * sum over m's rows t and adapter c's columns j of P_tj Q_tj
    dA         = (g Q)^T X,   dB = G^T (g P)

so no coefficient is divided by. Sums for du are made by the kernel that writes [g Q | G], from its float32
Q, in a fixed order without atomics: first over the rows of each tile, then over tiles, then over columns.

Tiny example with all sizes 1: x = 2, W = 1, A = 3, B = 5, u = 0.5, s = 10: P = 6 and
y = 2 + 10 * 0.5 * 5 * 6 = 152; for G = 1: Q = 5, dx = 1 + 10 * 0.5 * 5 * 3 = 76, du = 10 * 6 * 5 = 300,
dA = 25 * 2 = 50, dB = 30.

FLOPs for R rows and J = C * r: forward 2 R (d_in + J) d_out + 2 R J d_in, of which W x is 2 R d_in d_out;
dX the same with d_in and d_out exchanged; du 2 R J; dA and dB 2 R J d_in and 2 R J d_out. Elements that move
beside those of the library products: forward, x read and written once, and R J written if P is kept; dX and
du, G read and written once, and R J read.

Memory between forward and backward: P [R, padded J] in the compute dtype where the coefficients, A or B need
gradients, and x itself only where A does. P takes J / d_in of x's memory, and x is not read again for du. The
stack of the matrices is kept too: without a prepared one, a copy of W for every call in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opmix_kernels.runtime import as_rows, own_dtypes
from opmix_kernels.shrink import require_dtype, require_rows, shrink
from opmix_kernels.wide import LowRankStack, require_layer, stacked_columns


def reference(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`gated_lowrank_linear` in plain differentiable torch, in the weight's dtype; float64 arguments
    give the yardstick of the tests."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    gates = (scale * coefficients).repeat_interleave(A.shape[1], dim=1)  # [M, J]
    gates = gates.repeat_interleave(len(rows) // len(gates), dim=0).to(weight.dtype)  # [R, J]
    low = gates * (rows @ A.flatten(0, 1).to(weight.dtype).T)
    y = rows @ weight.T + low @ stacked_columns(B).to(weight.dtype).T
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], len(weight))


@torch.library.custom_op("opmix_kernels::gated_lowrank_linear", mutates_args=())
def _forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    storage: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y [R, d_out] for x [R, d_in], and P [R, padded J] where it is to be kept, else [0, padded J]. A and B
    give shapes only: their values are in the storage of a LowRankStack."""
    stack = _stack(storage, A, B)
    products = x.new_empty((len(x) if keep else 0, stack.inner.gated), dtype=stack.dtype)
    wide, _ = shrink(x, stack.down, coefficients, stack.rank, 1, scale, products=products if keep else None)
    matrix = stack.forward_matrix.T
    with own_dtypes(x.device):
        y = torch.mm(wide, matrix) if bias is None else torch.addmm(bias, wide, matrix)
    return y, products


@_forward.register_fake
def _(x, A, B, coefficients, storage, bias, scale, keep):
    stack = _stack(storage, A, B)
    y = storage.new_empty(x.shape[0], stack.out_features)
    return y, storage.new_empty(x.shape[0] if keep else 0, stack.inner.gated)


@torch.library.custom_op("opmix_kernels::gated_lowrank_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, storage: Tensor, products: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[g Q | G] of the gradient G [R, d_out], and du [M, C] float32 where P was kept, else [0, C]."""
    stack = _stack(storage, A, B)
    kept = len(products) == len(grad)
    wide, sums = shrink(as_rows(grad), stack.up, coefficients, stack.rank, 1, scale,
                        saved=products if kept else None)  # fmt: skip
    if sums is None:
        return wide, coefficients.new_empty((0, stack.adapters), dtype=torch.float32)
    by_adapter = sums[:, : stack.outer.columns].view(len(sums), stack.adapters, stack.rank)
    return wide, scale * by_adapter.sum(dim=2)


@_backward.register_fake
def _(grad, A, B, coefficients, storage, products, scale):
    stack = _stack(storage, A, B)
    kept = products.shape[0] == grad.shape[0]
    sums = coefficients.new_empty((coefficients.shape[0] if kept else 0, stack.adapters), dtype=torch.float32)
    return storage.new_empty(grad.shape[0], stack.outer.width), sums


def _stack(storage: Tensor, A: Tensor, B: Tensor) -> LowRankStack:
    return LowRankStack(storage, A.shape[1], A.shape[0], A.shape[2], B.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, coefficients, storage, _, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if A.requires_grad else None, A, B, coefficients, storage, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, coefficients, storage, products = ctx.saved_tensors
    stack = _stack(storage, A, B)
    wanted_x, wanted_a, wanted_b, wanted_u = ctx.needs_input_grad[:4]
    wide, sums = _backward(grad, A, B, coefficients, storage, products, ctx.scale)
    dx = da = db = None
    if wanted_x:
        dx = (wide @ stack.backward_matrix).to(ctx.x_dtype)
    if wanted_a:
        da = (wide[:, stack.outer.z(0)].T @ x.to(stack.dtype)).view_as(A).to(A.dtype)
    if wanted_b:
        gates = (ctx.scale * coefficients.float()).repeat_interleave(stack.rank, dim=1)[:, None]  # [M, 1, J]
        low = products[:, : stack.inner.columns].view(len(gates), -1, stack.inner.columns)
        gated = (gates * low).to(stack.dtype).flatten(0, 1)
        db = (grad.T @ gated).view(len(grad.T), stack.adapters, stack.rank).permute(1, 0, 2).to(B.dtype)
    return dx, da, db, sums.to(coefficients.dtype) if wanted_u else None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def gated_lowrank_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    coefficients: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    prepared: LowRankStack | None = None,
) -> Tensor:
    """One linear layer for M candidates (formulas, costs and memory above).

    Args:
        x: [..., d_in], M equal groups of rows one after the other; rounded to the compute dtype. Infinite
            elements give NaN where C * r is no multiple of 16: padding multiplies them by 0.
        weight: W [d_out, d_in], a constant; its dtype is the compute dtype.
        A: [C, r, d_in], e.g. float32 beside a 16-bit weight; rounded to the compute dtype.
        B: [C, d_out, r], likewise.
        coefficients: U [M, C] float32; any value, also 0.
        scale: s.
        bias: [d_out], a constant.
        prepared: LowRankStack.build(weight, A, B), made once where the layer is used often; without it, W is
            copied on every call. A and B are then constants: their values are the stack's.

    Returns:
        [..., d_out] in the compute dtype. Gradients come in the dtype of what they belong to, rounded to the
        compute dtype but those of the coefficients, which are summed in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or gradients of constants.
        RuntimeError: no GPU, outside of Triton's interpreter.
    """
    require_layer(weight, A, B)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}], got {list(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}")
    require_rows(x, coefficients, len(A))
    require_dtype(x.dtype, "x")
    stack = prepared or LowRankStack.build(weight, A, B)
    require_dtype(stack.dtype, "weight")
    _require_fitting(stack, weight, A)
    constants = {"weight": weight, "bias": bias} | ({} if prepared is None else {"A": A, "B": B})
    for name, tensor in constants.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires gradients, and is a constant here: detach it")
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (A, B, coefficients))
    y, _ = _forward(as_rows(x), A, B, coefficients, stack.storage,
                    None if bias is None else bias.to(stack.dtype), scale, keep)  # fmt: skip
    return y.view(*x.shape[:-1], len(weight))


def _require_fitting(stack: LowRankStack, weight: Tensor, A: Tensor) -> None:
    """ValueError for a stack of another layer."""
    fits = (stack.out_features, stack.in_features) == weight.shape and (
        stack.adapters,
        stack.rank,
    ) == A.shape[:2]
    if not fits:
        raise ValueError(
            f"prepared: a stack of [{stack.out_features}, {stack.in_features}] and {stack.adapters} adapters "
            f"of rank {stack.rank} is not of weight {list(weight.shape)} and A {list(A.shape)}"
        )


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device: forward and backward
    where the coefficients need gradients, 64 samples of 1,024 tokens with coefficients of their own."""
    with torch.device("meta"):
        A, B, U = torch.empty(7, 16, 2048), torch.empty(7, 5632, 16), torch.empty(64, 7)
        storage = LowRankStack.build(torch.empty(5632, 2048, dtype=dtype), A, B).storage
        x, grad = torch.empty(65536, 2048, dtype=dtype), torch.empty(65536, 5632, dtype=dtype)
        stack = _stack(storage, A, B)
        products = torch.empty(65536, stack.inner.gated, dtype=dtype)
        shrink(x, stack.down, U, 16, 1, 2.0, products=products)
        shrink(grad, stack.up, U, 16, 1, 2.0, saved=products)
