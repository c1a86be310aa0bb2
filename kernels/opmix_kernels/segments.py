"""out_ms = sum of losses_mt over the t whose segment is s, in float64 and in a fixed order.

The positions are sorted by segment once (stable, so that each segment keeps the order of t); one program then
adds the losses of one candidate m and one segment s: T + S steps per candidate however many segments there
are, and nothing that depends on the candidates beside it. No atomics.

Tiny example: losses (1, 2, 4), segments (1, 0, 1), S = 3: sums (2, 5, 0).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.language import offset
from opmix_kernels.runtime import Config, Kernel, require_available

DTYPES = (torch.float32, torch.float64)


def reference(losses: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """The same in plain torch, with M T S numbers in memory."""
    belongs = segments[:, None] == torch.arange(num_segments, device=segments.device)
    return torch.where(belongs, losses.double()[:, :, None], 0.0).sum(1)


@triton.jit
def segment_sums_kernel(LOSSES, ORDER, FIRST, OUT, S, losses_row, losses_column, BT: tl.constexpr):
    """OUT [M, S] of LOSSES [M, T]; segment s has the positions ORDER[FIRST[s] : FIRST[s + 1]]."""
    m, s = tl.program_id(0) // S, tl.program_id(0) % S
    first, end = tl.load(FIRST + s), tl.load(FIRST + s + 1)
    totals = tl.zeros((BT,), dtype=tl.float64)
    for start in range(first, end, BT):
        ks = start + tl.arange(0, BT)
        positions = tl.load(ORDER + ks, mask=ks < end, other=0)
        losses = tl.load(
            LOSSES + offset(m, losses_row) + offset(positions, losses_column), mask=ks < end, other=0.0
        )
        totals += losses.to(tl.float64)
    tl.store(OUT + tl.program_id(0).to(tl.int64), tl.sum(totals, axis=0))


_BLOCK = Config({"BT": 512}, warps=4, stages=2)
SEGMENT_SUMS = Kernel(
    segment_sums_kernel, {a: {4: [_BLOCK]} for a in ("sm_80", "sm_90", "gfx942")}, is_product=False
)


def segment_sums(losses: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Sums of each candidate's losses over each segment: a domain, or a sample.

    Bit for bit the same for a candidate whatever candidates are beside it. Differentiable in ``losses``.
    About 12 bytes of reads and one float64 addition per loss, beside sorting T positions once.

    Args:
        losses: [M, T], float32 or float64.
        segments: [T] int64; positions whose segment is outside of 0..S-1 are left out.
        num_segments: S.

    Returns:
        float64 [M, S]; 0 for a segment without positions.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if losses.dim() != 2 or losses.dtype not in DTYPES:
        raise ValueError(f"losses is {list(losses.shape)} {losses.dtype}, not [M, T] in float32 or float64")
    if segments.shape != losses.shape[1:] or segments.dtype != torch.int64:
        raise ValueError(
            f"segments is {list(segments.shape)} {segments.dtype}, not int64 [{losses.shape[1]}]"
        )
    if segments.device != losses.device:
        raise ValueError(f"segments is on {segments.device}, losses on {losses.device}")
    if num_segments < 0:
        raise ValueError(f"num_segments is {num_segments}, not at least 0")
    return _sums(losses, segments, num_segments)


def sums(losses: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Arguments as of :func:`segment_sums`."""
    require_available(losses.device)
    ordered, order = torch.sort(segments, stable=True)
    bounds = torch.arange(num_segments + 1, device=segments.device)
    out = losses.new_empty(len(losses), num_segments, dtype=torch.float64)
    SEGMENT_SUMS(
        (out.numel(),), like=losses, constexprs={},
        LOSSES=losses, ORDER=order, FIRST=torch.searchsorted(ordered, bounds), OUT=out,
        S=num_segments, losses_row=losses.stride(0), losses_column=losses.stride(1),
    )  # fmt: skip
    return out


def spread(gradient: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """[M, T] of gradient [M, S]: each position has that of its segment, 0 where it is in none."""
    inside = (segments >= 0) & (segments < num_segments)
    columns = torch.cat([gradient, gradient.new_zeros(len(gradient), 1)], 1)  # one that is there for any S
    return columns[:, torch.where(inside, segments, num_segments)]


_sums = torch.library.custom_op("opmix_kernels::segment_sums", sums, mutates_args=())


@_sums.register_fake
def _(losses: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    return losses.new_empty(losses.shape[0], num_segments, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    losses, segments, ctx.num_segments = inputs
    ctx.dtype = losses.dtype
    ctx.save_for_backward(segments)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (segments,) = ctx.saved_tensors
    return spread(gradient, segments, ctx.num_segments).to(ctx.dtype), None, None


_sums.register_autograd(_backward, setup_context=_setup_context)


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device: losses are float32."""
    if dtype == torch.float32:
        with torch.device("meta"):
            sums(torch.empty(64, 32_768), torch.empty(32_768, dtype=torch.int64), 20)
