"""What kernels do the same way everywhere, for every bfloat16 there is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opmix_kernels.language import rounded
from tests.kernels.checking import DEVICE

N = 4096


@triton.jit
def copy_kernel(X, OUT, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(OUT + index, rounded(tl.load(X + index).to(tl.float32), OUT.dtype.element_ty))


def copied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype)
    copy_kernel[(len(x) // N,)](x, out, N=N)
    return out


def test_bfloat16_loads_and_rounds_as_torch_does() -> None:
    every = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(torch.bfloat16)
    tiny = every.abs() < torch.finfo(torch.bfloat16).tiny  # which the interpreter takes for 0 when it loads
    numbers = torch.where(every.isnan() | tiny, 0, every)
    assert torch.equal(copied(numbers, torch.float32), numbers.float())
    assert torch.equal(copied(numbers, torch.bfloat16).view(torch.int16), numbers.view(torch.int16))
    assert copied(every, torch.bfloat16).isnan().equal(every.isnan())


def test_float32_rounds_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    upper = torch.arange(0, 2**16, 8, device=DEVICE) << 16  # signs, exponents, and the last bits that stay
    for lower in (0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = torch.cat((upper + lower, upper + 0x10000 + lower)).to(torch.int32)
        x = bits.view(torch.float32)
        assert torch.equal(copied(x, torch.bfloat16).nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
        assert copied(x, torch.bfloat16).isnan().equal(x.isnan())
