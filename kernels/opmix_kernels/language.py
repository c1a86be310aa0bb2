"""What every kernel does the same way: products, rounding, and going around Triton's interpreter in bfloat16.

The interpreter stores bfloat16 as 16-bit integers and, in some versions, multiplies, adds and compares their
bit patterns without an error; its casts truncate, and turn 0 into 1e-38. So kernels load as float32
(``.to(tl.float32)``), multiply matrices through :func:`dot`, and round through :func:`rounded` only.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: ``TRITON_INTERPRET=1`` when this module was imported."""


@triton.jit
def dot(a, b, acc):
    """acc + a b, acc float32. Products of float32 are float32 ones (no tf32)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in ``dtype``, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's cast truncates, and makes 1e-38 of 0
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        # NaN must not become infinity by the carry
        bits = tl.where(x == x, nearest, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: products of rows and strides pass 2^31."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def halves(w0, w1, w2, w3):
    """Four blocks [N, K] of 32-bit words as 16-bit numbers [N, 8 K]: neighbours in a row are the lower and
    the upper half of a word of w0, of w1, of w2, of w3."""
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16)
