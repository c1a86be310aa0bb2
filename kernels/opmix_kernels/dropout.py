"""Dropout whose mask is computed from counters, wherever it is needed, and never stored.

Element (row t of adapter k's group, column c) of step n is kept where a 16-bit number is at least
``threshold`` = round(2^16 p). The number is one of the eight in a call of Philox-4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the adapter's seed and counter =
(c // 8, t, n mod 2^32, n div 2^32). A call for each element would take as long as the layer's own product.

So a mask depends on seed, step, row within the group, and column; not on the other adapters, the size of
tiles, or the GPU. :func:`keep_mask` gives the same bits in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.language import halves

COLUMNS_PER_CALL = 8
_LEVELS = 1 << 16
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def threshold_of(p: float) -> int:
    """Of 2^16 equally likely numbers, how many drop an element: p is rounded to a multiple of 2^-16.

    Raises:
        ValueError: p is below 0, or so close to 1 that nothing would be kept.
    """
    threshold = round(p * _LEVELS)
    if not 0 <= threshold < _LEVELS:
        raise ValueError(f"dropout is {p}: it must be at least 0 and below 1")
    return threshold


def inverse_keep_rate(threshold: int) -> float:
    """What kept elements are multiplied by, so that the mean stays exactly: 1 / (1 - threshold / 2^16)."""
    return _LEVELS / (_LEVELS - threshold)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four numbers below 2^32 for each counter.

    Args:
        counter: four int64 tensors of numbers below 2^32, which broadcast together.
        seed: int64, broadcasts with them: its lower and upper 32 bits are the key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps beyond 2^63; all 64 bits are right as they are
        c0, c1 = (odd >> 32) & _WORD ^ c1 ^ k0, odd & _WORD
        c2, c3 = (even >> 32) & _WORD ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def sixteen_bits(words: tuple[Tensor, ...]) -> Tensor:
    """Four blocks [..., K] of words as numbers below 2^16 [..., 8 K], in the order of
    :func:`opmix_kernels.language.halves`."""
    stacked = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    return torch.stack((stacked & 0xFFFF, stacked >> 16), dim=-1).flatten(-3)


def keep_mask(seeds: Tensor, step: int | Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements stay: bool [K, rows, columns] for groups of ``rows`` rows.

    Args:
        seeds: int64 [K].
        step: int or int64 scalar on the device of the seeds.
    """
    device = seeds.device
    step = torch.as_tensor(step, device=device)
    blocks = torch.arange(triton.cdiv(columns, COLUMNS_PER_CALL), device=device)
    counter = (blocks, torch.arange(rows, device=device)[:, None], step & _WORD, (step >> 32) & _WORD)
    numbers = sixteen_bits(philox(counter, seeds[:, None, None]))  # [K, rows, 8 blocks]
    return numbers[..., :columns] >= threshold_of(p)


@triton.jit
def kept(seed, step, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Mask [len(rows), COLUMNS] of these rows within their group; first_column is a multiple of 8."""
    blocks = first_column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = tl.philox(
        seed, blocks[None, :], rows[:, None], step.to(tl.uint32), (step >> 32).to(tl.uint32)
    )
    return halves(w0, w1, w2, w3) >= threshold


@dataclass(frozen=True)
class Dropout:
    """What kernels get of a dropout; all None and 0 where there is none."""

    threshold: int = 0
    seeds: Tensor | None = None
    """int64 [K]."""
    step: Tensor | None = None
    """int64 [] or [1]."""

    @property
    def inverse(self) -> float:
        return inverse_keep_rate(self.threshold)

    def arguments(self) -> dict[str, Any]:
        return {"SEEDS": self.seeds, "STEP": self.step, "threshold": self.threshold}


NO_DROPOUT = Dropout()
