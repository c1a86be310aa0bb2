"""Stochastic rounding of float32 to bfloat16: up or down with probabilities that make the mean exact.

Tiny example: 1 + 1/512 lies a quarter of the way from 1 to the next bfloat16, 1 + 1/128; it becomes that
one with probability 1/4, and 1 otherwise.

16 random bits are added to the 16 bits that bfloat16 cuts off, whose carry is the rounding up. They come from
Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of a seed and the
element's place, so that they depend on no tile size: one call gives eight neighbours in a row theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.dropout import philox, sixteen_bits
from opmix_kernels.language import halves

GROUP = 8
"""Elements of a row that share one call."""


def reference(x: Tensor, seed: int) -> Tensor:
    """float32 x [..., D] stochastically rounded to bfloat16, bit for bit as the kernels do; infinities stay,
    NaN stays NaN, and what is finite stays finite."""
    flat = x.reshape(-1, x.shape[-1])
    groups = triton.cdiv(flat.shape[-1], GROUP)
    counter = torch.arange(len(flat) * groups, device=x.device).reshape(len(flat), groups)
    zero = torch.zeros_like(counter)
    key = torch.tensor(seed, device=x.device)
    noise = sixteen_bits(philox((counter & 0xFFFFFFFF, counter >> 32, zero, zero), key))
    noise = noise[:, : flat.shape[-1]]
    bits = (flat.view(torch.int32).to(torch.int64) + noise) & ~0xFFFF
    moved = bits.to(torch.int32).view(torch.float32)
    cut = (flat.view(torch.int32) & ~0xFFFF).view(torch.float32)
    result = torch.where(moved.isfinite(), moved, cut)
    return torch.where(flat.isfinite(), result, flat).to(torch.bfloat16).reshape(x.shape)


@triton.jit
def stochastically_rounded(x, seed, rows, first_column, D, BD: tl.constexpr):
    """float32 x [BN, BD] with values that are representable in bfloat16.

    Args:
        rows: [BN], int64: rows of x among all rows of what is rounded.
        first_column: of x among the D columns; a multiple of 8.
    """
    groups = first_column // 8 + tl.arange(0, BD // 8)
    counter = rows[:, None] * tl.cdiv(D, 8) + groups[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), low * 0, low * 0)
    bits = x.to(tl.uint32, bitcast=True)
    exponent: tl.constexpr = 0x7F800000
    moved = (bits + halves(w0, w1, w2, w3)) & 0xFFFF0000
    # what is finite stays finite: the largest numbers are cut off and not rounded up
    moved = tl.where((moved & exponent) == exponent, bits & 0xFFFF0000, moved)
    moved = tl.where((bits & exponent) == exponent, bits, moved)
    return moved.to(tl.float32, bitcast=True)
