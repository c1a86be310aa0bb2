"""Masks from counters: the published Philox, the kernels' bits and torch's, and their statistics."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from opmix_kernels.dropout import inverse_keep_rate, keep_mask, kept, philox, threshold_of
from tests.kernels.checking import DEVICE


@triton.jit
def mask_kernel(OUT, SEED, STEP, first_row, threshold, width, BR: tl.constexpr, BC: tl.constexpr):
    rows = tl.arange(0, BR)
    start = tl.program_id(0) * BC
    keep = kept(tl.load(SEED), tl.load(STEP), first_row + rows, start, threshold, BC)
    where = OUT + rows[:, None] * width + (start + tl.arange(0, BC))[None, :]
    tl.store(where, keep.to(tl.int32))


def of_kernel(seed: int, step: int, first_row: int, p: float, rows: int, columns: int, tile: int) -> Tensor:
    """Mask [rows, columns], in tiles of ``tile`` columns."""
    out = torch.full((rows, columns), -1, dtype=torch.int32, device=DEVICE)
    numbers = [torch.tensor([x], device=DEVICE) for x in (seed, step)]
    mask_kernel[(columns // tile,)](
        out, *numbers, first_row, threshold_of(p), columns, BR=rows, BC=tile, num_warps=1
    )
    return out.bool() if bool((out >= 0).all()) else out


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # of the authors' Random123 library, kat_vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(x) for x in counter)
    seed = torch.tensor(key[0]) | (torch.tensor(key[1]) << 32)
    assert tuple(int(x) for x in philox((c0, c1, c2, c3), seed)) == expected


@pytest.mark.parametrize(
    ("seed", "step", "first_row"),
    [(0, 0, 0), (7, 3, 100_000), (-1, (1 << 33) + 5, 0), ((5 << 40) + 1, (1 << 31) + 1, 2**31 - 17)],
)
@pytest.mark.parametrize("tile", [8, 32])
def test_kernels_mask_is_torchs(seed: int, step: int, first_row: int, tile: int) -> None:
    found = of_kernel(seed, step, first_row, 0.3, rows=16, columns=64, tile=tile)
    blocks, rows = torch.arange(8), first_row + torch.arange(16)[:, None]
    words = philox((blocks, rows, torch.tensor(step % 2**32), torch.tensor(step >> 32)), torch.tensor(seed))
    for lane in range(8):  # column 8 b + lane has half lane % 2 of word lane // 2
        number = (words[lane // 2] >> 16 * (lane % 2)) & 0xFFFF
        assert torch.equal(found[:, lane::8].cpu(), number >= 0.3 * 2**16), lane
    if first_row == 0:
        seeds = torch.tensor([seed], device=DEVICE)
        assert torch.equal(found, keep_mask(seeds, step, 16, 64, 0.3)[0])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_kept(p: float) -> None:
    masks = keep_mask(torch.arange(4), 11, 500, 512, p).double()
    assert abs(masks.mean() - (1 - p)) < 4 * (p * (1 - p) / masks.numel()) ** 0.5
    lanes = masks.view(-1, 8)
    assert ((lanes.mean(dim=0) - (1 - p)).abs() < 4.5 * (p * (1 - p) / len(lanes)) ** 0.5).all()
    assert abs(masks.mean() * inverse_keep_rate(threshold_of(p)) - 1) < 0.02


def test_masks_are_unrelated() -> None:
    """Neighbours within a row, rows, adapters, steps, and steps that differ in the upper half."""
    masks = keep_mask(torch.tensor([1, 2]), 5, 256, 512, 0.5).double() - 0.5
    later = keep_mask(torch.tensor([1, 2]), 6, 256, 512, 0.5).double() - 0.5
    far = keep_mask(torch.tensor([1, 2]), 5 + (1 << 32), 256, 512, 0.5).double() - 0.5
    pairs = {
        "columns": (masks[..., 1:], masks[..., :-1]),
        "calls": (masks[..., 8:], masks[..., :-8]),
        "rows": (masks[:, 1:], masks[:, :-1]),
        "adapters": (masks[0], masks[1]),
        "steps": (masks, later),
        "far steps": (masks, far),
    }
    for name, (a, b) in pairs.items():
        correlation = 4 * (a * b).mean()  # of +-1/2: deviates by 1 / sqrt(n) where they are independent
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, name


def test_a_mask_is_part_of_the_larger_one_and_of_any_company() -> None:
    whole = keep_mask(torch.tensor([3, 1, 4]), 2, 20, 45, 0.4)
    assert torch.equal(whole[1:2, :7, :19], keep_mask(torch.tensor([1]), torch.tensor(2), 7, 19, 0.4))


def test_probabilities_that_are_none() -> None:
    assert threshold_of(0.05) == 3277
    assert inverse_keep_rate(0) == 1
    assert inverse_keep_rate(1 << 15) == 2
    for p in (-0.1, 1.0, 1 - 1e-9, float("nan")):
        with pytest.raises(ValueError, match="dropout|NaN"):
            threshold_of(p)
