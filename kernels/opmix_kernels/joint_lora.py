"""y = W x + b + s * B_k A_k dropout(x): several LoRA adapters trained together on one frozen linear layer.

Rows [R, d_in] are grouped by adapter; adapter k has A_k [r, d_in] and B_k [d_out, r] (LoRA, arXiv 2106.09685;
OP-Mix's probes, arXiv 2605.15220). Tiny example, r = 1 and one column: W = 1, s = 0.5, A = [2, 4], B = [3, 5]
for two adapters with one row of x = 1 each: y = [1 + 0.5 * 3 * 2, 1 + 0.5 * 5 * 4] = [4, 11].

With M the mask of dropout p, and alpha = s / (1 - p):

    h  = alpha (M * x) A_k^T       [R, r], kept for the backward pass
    y  = W x + b + h B_k^T
    g' = alpha g B_k               [R, r]
    dx = g W + M * (g' A_k),   dA_k = sum over the group of g'^T (M * x),   dB_k = sum over the group of g^T h

W's products are torch's; the rest is in :mod:`opmix_kernels.grouped`. With e bytes per element, beside the
2 R d_in d_out FLOPs of each of W's two products, the adapters take forward 2 R r (d_in + d_out) FLOPs and
e R (d_in + 2 d_out) bytes, backward 4 R r (d_in + d_out) FLOPs and e R (3 d_in + 2 d_out) bytes.

Not done: without dropout, ``norm_shrink_gate`` with unit vectors as coefficients gives [X | Z] whose product
with [W | s B]^T is the same y, which need not be read and written again. It costs 2 R d_out K r FLOPs where
the expansion here moves 2 e R d_out bytes: less time while K r is below e times the GPU's FLOPs per byte,
some 370 in 16 bits on an H200 (790 TFLOP/s, 4.3 TB/s), as long as the norm before it writes X anyway.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opmix_kernels.dropout import NO_DROPOUT, Dropout, inverse_keep_rate, keep_mask, threshold_of
from opmix_kernels.grouped import Groups, expand_, outer, shrink
from opmix_kernels.runtime import as_rows, cdiv, own_dtypes, require_available

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def joint_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
) -> Tensor:
    """W x + b + scale * B_k A_k dropout(x), [..., d_out] in the weight's dtype; formulas above.

    Differentiable in x, A and B; the gradients come in their dtypes, those of A and B rounded once, from
    float32 sums. An adapter's results are the same bits whichever others are beside it, except for what the
    library's product W x does with more rows.

    Works without a synchronisation, under torch.compile, and in CUDA graphs: a replay reads ``offsets``,
    ``seeds`` and ``step`` anew where they are tensors. An int ``step`` is frozen into a graph (and makes
    torch.compile compile again): give a tensor there, and add 1 to it in place.

    Args:
        x: [..., d_in]; its rows, in order, are grouped by adapter. Is cast to the weight's dtype.
        weight: [d_out, d_in], a constant, float32, float16 or bfloat16.
        A: [K, r, d_in], any floating dtype: the products are in the weight's.
        B: [K, d_out, r].
        bias: [d_out], a constant.
        offsets: int64 [K + 1] on x's device, ascending from 0 up to at most the number of rows: group k is
            rows offsets[k] to offsets[k + 1], perhaps none. Rows behind the last get W x + b. None: K equal
            groups.
        dropout: share of x's elements that the adapters do not see, to a multiple of 2^-16; the others are
            divided by the share that is kept.
        seeds: int64 [K] on x's device, of the adapters in this layer: two layers with the same seed would
            drop the same elements.
        step: int, or int64 scalar tensor on x's device, that makes another mask: a count of forward passes.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
        RuntimeError: tensors on a device where kernels cannot run.
    """
    _check(x, weight, A, B, bias, offsets)
    rows = as_rows(x.to(weight.dtype))
    threshold = threshold_of(dropout)
    if threshold == 0:
        seeds = counter = None
    elif seeds is None or seeds.shape != A.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 [{len(A)}] where dropout is not 0")
    else:
        counter = step if isinstance(step, Tensor) else torch.full((), step, device=x.device)
        if counter.dtype != torch.int64 or counter.numel() != 1:
            raise ValueError("step must be an int or one int64 number")
    y, _ = torch.ops.opmix_kernels.joint_lora_linear(
        rows, weight, bias, A, B, offsets, seeds, counter, scale, threshold
    )
    return y.view(*x.shape[:-1], len(weight))


def _check(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, offsets: Tensor | None
) -> None:
    """ValueError naming the first argument that does not fit the others."""
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"weight must be [d_out, d_in] in float32, float16 or bfloat16, not {weight.dtype}")
    d_out, d_in = weight.shape
    if A.dim() != 3 or A.shape[2] != d_in or 0 in A.shape:
        raise ValueError(f"A must be [K, r, {d_in}], not {list(A.shape)}")
    if B.shape != (A.shape[0], d_out, A.shape[1]):
        raise ValueError(f"B must be [{A.shape[0]}, {d_out}, {A.shape[1]}], not {list(B.shape)}")
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ValueError(f"x must be [..., {d_in}], not {list(x.shape)}")
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be [{d_out}], not {list(bias.shape)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are constants here: they must not require gradients")
    if offsets is None:
        if x.shape[:-1].numel() % len(A) != 0:
            raise ValueError(f"x has {x.shape[:-1].numel()} rows: not {len(A)} equal groups")
    elif offsets.shape != (len(A) + 1,) or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 [{len(A) + 1}]")


def reference(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
) -> Tensor:
    """:func:`joint_lora_linear` in plain torch, in the precision of the arguments and differentiable in all
    of them; the same elements are dropped. Reads the offsets on the host."""
    y = F.linear(x, weight, bias)
    flat, count = x.reshape(-1, x.shape[-1]), len(A)
    size = len(flat) // count
    bounds = [k * size for k in range(count + 1)] if offsets is None else offsets.tolist()
    added = []
    for k, (begin, end) in enumerate(pairwise(bounds)):
        group = flat[begin:end]
        if dropout:
            assert seeds is not None
            kept = keep_mask(seeds[k : k + 1], step, len(group), group.shape[1], dropout)[0]
            group = group * kept * inverse_keep_rate(threshold_of(dropout))
        added.append(scale * (group.to(A.dtype) @ A[k].T) @ B[k].T)
    nobodys = flat.new_zeros(len(flat) - bounds[-1], len(weight))
    return y + torch.cat([*added, nobodys]).view(y.shape)


def _padded(rank: int) -> int:
    """Multiple of 16, so that rows of h and of B begin where loads of 16 bytes may."""
    return cdiv(rank, 16) * 16


def _narrowing(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A in ``dtype`` [K, r', d_in], zeros behind its rows."""
    more = _padded(A.shape[1]) - A.shape[1]
    return F.pad(A.to(dtype), (0, 0, 0, more)) if more else A.to(dtype)  # by nothing pads with a copy


def _widening(B: Tensor, dtype: torch.dtype) -> Tensor:
    """B^T in ``dtype`` [K, r', d_out], zeros behind its rows."""
    return _narrowing(B.mT, dtype)


@torch.library.custom_op("opmix_kernels::joint_lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    seeds: Tensor | None,
    step: Tensor | None,
    scale: float,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """y [R, d_out] and h [R, r'] for rows x [R, d_in] of the weight's dtype, r' the rank as padded."""
    require_available(x.device)
    groups, dropped = Groups(len(A), offsets), Dropout(threshold, seeds, step)
    h = shrink(as_rows(x), _narrowing(A, x.dtype), groups, scale * dropped.inverse, dropped)
    with own_dtypes(x.device):
        y = F.linear(x, weight, bias)
    return expand_(y, h, _widening(B, x.dtype), groups), h


@_forward.register_fake
def _(x, weight, bias, A, B, offsets, seeds, step, scale, threshold):
    rows = x.shape[0]  # len() would fix it: torch.compile would compile again for each number of rows
    return x.new_empty(rows, weight.shape[0]), x.new_empty(rows, _padded(A.shape[1]))


@torch.library.custom_op("opmix_kernels::joint_lora_shrink_gradient", mutates_args=())
def _shrink_gradient(
    gradient: Tensor, B: Tensor, offsets: Tensor | None, scale: float, threshold: int
) -> Tensor:
    """g' [R, r'] of the gradient [R, d_out]."""
    alpha = scale * inverse_keep_rate(threshold)
    return shrink(as_rows(gradient), _widening(B, gradient.dtype), Groups(len(B), offsets), alpha)


@_shrink_gradient.register_fake
def _(gradient, B, offsets, scale, threshold):
    return gradient.new_empty(gradient.shape[0], _padded(B.shape[2]))


@torch.library.custom_op("opmix_kernels::joint_lora_input_gradient", mutates_args=())
def _input_gradient(
    gradient: Tensor,
    weight: Tensor,
    low: Tensor,
    A: Tensor,
    offsets: Tensor | None,
    seeds: Tensor | None,
    step: Tensor | None,
    threshold: int,
) -> Tensor:
    """dx [R, d_in] of the gradient [R, d_out] and low = g' [R, r']."""
    dropped = Dropout(threshold, seeds, step)
    with own_dtypes(gradient.device):
        dx = gradient @ weight
    return expand_(dx, low, _narrowing(A, gradient.dtype), Groups(len(A), offsets), dropped)


@_input_gradient.register_fake
def _(gradient, weight, low, A, offsets, seeds, step, threshold):
    return gradient.new_empty(gradient.shape[0], weight.shape[1])


@torch.library.custom_op("opmix_kernels::joint_lora_outer", mutates_args=())
def _outer(
    wide: Tensor,
    low: Tensor,
    like: Tensor,
    offsets: Tensor | None,
    seeds: Tensor | None,
    step: Tensor | None,
    threshold: int,
    transposed: bool,
) -> Tensor:
    """Gradient of A [K, r, d_in] (transposed) or of B [K, d_out, r], whichever ``like`` is."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    dropped = Dropout(threshold, seeds, step)
    groups = Groups(len(like), offsets)
    return outer(as_rows(wide), low, groups, out, transposed=transposed, dropout=dropped)


@_outer.register_fake
def _(wide, low, like, offsets, seeds, step, threshold, transposed):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, offsets, seeds, step, ctx.scale, ctx.threshold = inputs
    ctx.save_for_backward(x, weight, A, B, offsets, seeds, step, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, weight, A, B, offsets, seeds, step, h = ctx.saved_tensors
    dx = dA = dB = None
    if gradient is not None:
        op = torch.ops.opmix_kernels
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        if needs_b:
            dB = op.joint_lora_outer(gradient, h, B, offsets, None, None, 0, False)
        if needs_x or needs_a:
            low = op.joint_lora_shrink_gradient(gradient, B, offsets, ctx.scale, ctx.threshold)
        if needs_a:
            dA = op.joint_lora_outer(x, low, A, offsets, seeds, step, ctx.threshold, True)
        if needs_x:
            dx = op.joint_lora_input_gradient(gradient, weight, low, A, offsets, seeds, step, ctx.threshold)
    return dx, None, None, dA, dB, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device: forward and backward
    of 2048 to 8192 at rank 128 with offsets and dropout, and the same kernels without at rank 16."""
    with torch.device("meta"):
        count = 8
        x, y = torch.empty(65536, 2048, dtype=dtype), torch.empty(65536, 8192, dtype=dtype)
        A, B = torch.empty(count, 128, 2048, dtype=dtype), torch.empty(count, 8192, 128, dtype=dtype)
        offsets = torch.empty(count + 1, dtype=torch.int64)
        seeds, step = torch.empty(count, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    dropped, groups = Dropout(3277, seeds, step), Groups(count, offsets)
    h = shrink(x, A, groups, 2.0, dropped)
    expand_(y, h, B.mT, groups)
    shrink(y, B.mT, groups, 2.0)
    outer(y, h, groups, torch.empty_like(B), transposed=False)
    outer(x, h, groups, torch.empty_like(A), transposed=True, dropout=dropped)
    expand_(x, h, A, groups, dropped)
    thin, equal = A[:, :16], Groups(count)
    h = shrink(x, thin, equal, 2.0, NO_DROPOUT)
    expand_(x, h, thin, equal)
    outer(x, h, equal, torch.empty_like(thin), transposed=True)
