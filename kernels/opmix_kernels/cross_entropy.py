"""loss_i = log sum_v exp(h_i . E_v) - h_i . E_{t_i}: LM head and cross-entropy without logits in memory.

Forward: one program computes one tile of logits [BR rows, BV words], as float32, and keeps of each row the
largest one, in units of log 2 as a = largest / log 2, and z = sum 2^(logit / log 2 - a), plus the target's
logit where the tile has it. A second kernel combines the tiles of a row in their order: A = max a,
logsumexp = log 2 (A + log2 sum z 2^(a - A)). What a row gives does not depend on the rows beside it.
Backward, to h only: rows in chunks; a kernel computes the logits once more and writes softmax - onehot of a
chunk in the dtype of h, then one library GEMM with E, then the rows are multiplied by the losses' gradients.

Tiny example with h = 1, E = (0, log 4), target 1, each word a tile: (a, z) are (0, 1) and (2, 1); A = 2,
logsumexp = log 2 (2 + log2(1/4 + 1)) = log 5, loss = log 5 - log 4 = 0.223;
gradient = (1/5) 0 + (4/5 - 1) log 4 = -0.277.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import cross_entropy

from opmix_kernels.language import dot, offset, rounded
from opmix_kernels.runtime import Config, Kernel, Tiled, architecture_of, as_rows, cdiv, require_available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTIALS_BYTES = 768 << 20
"""Scratch of the forward: 8 bytes per row and tile of words; more rows are taken in chunks."""
PROBABILITIES_BYTES = 512 << 20
"""Scratch of the backward: softmax - onehot of a chunk of rows."""
CHUNK_MULTIPLE = 128
"""Rows of a chunk are a multiple of this: whole tiles."""
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The same in plain torch, logits in memory, in the dtype of ``hidden``; in float64 the yardstick of the
    tests. Targets outside of the vocabulary are an error here."""
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.to(hidden.dtype).T
    losses = cross_entropy(logits, targets.reshape(-1), ignore_index=ignore_index, reduction="none")
    return losses.view(targets.shape)


@triton.jit
def _tile_of_program(R, V, BR: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """Blocks of rows and of words that this program computes. GROUP blocks of rows pass over all words
    together: their hidden states stay in the L2 cache, and E is read from memory once per group."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(R, BR)
    in_group = GROUP * tl.cdiv(V, BV)
    first = program // in_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def _logits(
    H, E, R, V, D, h_row, e_row, row_block, word_block,
    TILED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """float32 [BR, BV]; rows and words that do not exist are 0."""
    total = tl.zeros((BR, BV), dtype=tl.float32)
    if TILED:
        for start in range(0, D, BD):
            total = dot(H.load([row_block * BR, start]), E.load([word_block * BV, start]).T, total)
    else:
        rows, words = row_block * BR + tl.arange(0, BR), word_block * BV + tl.arange(0, BV)
        ks = tl.arange(0, BD)
        h_at = H + offset(rows, h_row)[:, None] + ks[None, :]
        e_at = E + offset(words, e_row)[None, :] + ks[:, None]
        for start in range(0, D, BD):
            in_d = start + ks < D
            h = tl.load(h_at + start, mask=(rows < R)[:, None] & in_d[None, :], other=0.0)
            e = tl.load(e_at + start, mask=(words < V)[None, :] & in_d[:, None], other=0.0)
            total = dot(h, e, total)
    return total


@triton.jit
def partials_kernel(
    H, E, TARGETS, LARGEST, SUMS, CHOSEN, R, V, D, h_row, e_row,
    TILED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """LARGEST (a) and SUMS (z) [tiles of words, R]; CHOSEN [R], the targets' logits."""
    row_block, word_block = _tile_of_program(R, V, BR, BV, GROUP)
    logits = _logits(H, E, R, V, D, h_row, e_row, row_block, word_block, TILED, BR, BV, BD)
    first = word_block * BV
    if first + BV > V:
        logits = tl.where((first + tl.arange(0, BV) < V)[None, :], logits, float("-inf"))
    # a is rounded once, and the same a goes into the powers: that rounding cancels
    largest = tl.max(logits, axis=1) * _LOG2E
    # a tile of -inf only sums to 0, and not to 2^(-inf + inf)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    sums = tl.sum(tl.exp2(logits * _LOG2E - base[:, None]), axis=1)
    rows = row_block * BR + tl.arange(0, BR)
    in_rows = rows < R
    at = offset(word_block, R) + rows
    tl.store(LARGEST + at, largest, mask=in_rows)
    tl.store(SUMS + at, sums, mask=in_rows)
    target = tl.load(TARGETS + rows, mask=in_rows, other=-1)
    here = (target >= first) & (target < tl.minimum(first + BV, V))
    if tl.max(here.to(tl.int32), axis=0) > 0:  # few tiles have a target
        is_target = tl.arange(0, BV)[None, :] == (target - first).to(tl.int32)[:, None]
        tl.store(CHOSEN + rows, tl.sum(tl.where(is_target, logits, 0.0), axis=1), mask=here)


@triton.jit
def combine_kernel(
    LARGEST, SUMS, CHOSEN, TARGETS, LOSSES, LSE, R, V, TILES, ignore_index,
    BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """LOSSES and LSE [R] from the partial results of the tiles: 0 in ignored rows, NaN where the target is no
    word."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    in_rows = rows < R
    columns = tl.minimum(rows, R - 1)  # rows that do not exist read the last one: never -inf - -inf
    largest = tl.full((BR,), float("-inf"), dtype=tl.float32)
    for start in range(0, TILES, BT):
        tiles = start + tl.arange(0, BT)
        at = offset(tiles, R)[:, None] + columns[None, :]
        a = tl.load(LARGEST + at, mask=(tiles < TILES)[:, None], other=float("-inf"))
        largest = tl.maximum(largest, tl.max(a, axis=0))
    total = tl.zeros((BR,), dtype=tl.float32)
    for start in range(0, TILES, BT):
        tiles = start + tl.arange(0, BT)
        at = offset(tiles, R)[:, None] + columns[None, :]
        a = tl.load(LARGEST + at, mask=(tiles < TILES)[:, None], other=float("-inf"))
        z = tl.load(SUMS + at, mask=(tiles < TILES)[:, None], other=0.0)
        total += tl.sum(z * tl.exp2(a - largest[None, :]), axis=0)
    target = tl.load(TARGETS + rows, mask=in_rows, other=-1)
    is_word = (target >= 0) & (target < V)
    lse = tl.where(is_word, (largest + tl.log2(total)) * _LN2, float("nan"))
    chosen = tl.load(CHOSEN + rows, mask=is_word, other=0.0)  # no tile has written the others
    ignored = target == ignore_index
    tl.store(LSE + rows, tl.where(ignored, 0.0, lse), mask=in_rows)
    tl.store(LOSSES + rows, tl.where(ignored, 0.0, lse - chosen), mask=in_rows)


@triton.jit
def probabilities_kernel(
    H, E, TARGETS, LSE, OUT, R, V, D, h_row, e_row, out_row, ignore_index,
    TILED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT [R, V] = softmax - onehot, 0 in ignored rows."""
    row_block, word_block = _tile_of_program(R, V, BR, BV, GROUP)
    logits = _logits(H, E, R, V, D, h_row, e_row, row_block, word_block, TILED, BR, BV, BD)
    first = word_block * BV
    rows, words = row_block * BR + tl.arange(0, BR), first + tl.arange(0, BV)
    in_rows = rows < R
    target = tl.load(TARGETS + rows, mask=in_rows, other=-1)
    lse = tl.load(LSE + rows, mask=in_rows, other=0.0) * _LOG2E
    values = tl.exp2(logits * _LOG2E - lse[:, None])
    values = tl.where(words[None, :] == target.to(tl.int32)[:, None], values - 1.0, values)
    values = tl.where((target == ignore_index)[:, None], 0.0, values)
    at = OUT + offset(rows, out_row)[:, None] + words[None, :]
    tl.store(at, rounded(values, OUT.dtype.element_ty), mask=in_rows[:, None] & (words < V)[None, :])


def _config(rows: int, words: int, width: int, warps: int, stages: int, group: int = 16) -> Config:
    return Config({"BR": rows, "BV": words, "BD": width, "GROUP": group}, warps, stages)


# two blocks on a multiprocessor, one of which multiplies while the other takes powers
_AMPERE = [_config(128, 128, 32, 8, 4), _config(128, 256, 32, 8, 4), _config(128, 128, 64, 8, 3)]
_PLAIN = {
    "sm_80": {2: _AMPERE, 4: [_config(64, 64, 32, 4, 2)]},
    # matrices that descriptors cannot read
    "sm_90": {2: [_config(128, 128, 64, 8, 3)], 4: [_config(64, 64, 32, 4, 2)]},
    "gfx942": {
        2: [_config(128, 128, 64, 8, 2), _config(256, 128, 64, 8, 2)],
        4: [_config(64, 64, 32, 4, 2)],
    },
}
_TILED = {"sm_90": {2: [_config(128, 256, 64, 8, 4), _config(128, 128, 64, 8, 3)]}}
PARTIALS = Kernel(partials_kernel, _PLAIN, is_product=True)
PARTIALS_TILED = Kernel(partials_kernel, _TILED, is_product=True, name="partials_kernel_tiled")
PROBABILITIES = Kernel(probabilities_kernel, _PLAIN, is_product=True)
PROBABILITIES_TILED = Kernel(probabilities_kernel, _TILED, is_product=True, name="probabilities_kernel_tiled")
COMBINE = Kernel(
    combine_kernel,
    {a: {4: [Config({"BR": 32, "BT": 64})]} for a in ("sm_80", "sm_90", "gfx942")},
    is_product=False,
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Losses of the next token, -log softmax(weight hidden)[target], without logits in memory.

    The softmax is float32 from the accumulators on, whatever the dtypes; hidden is cast to the weight's
    dtype for the products. A row's loss is bit for bit the same whatever rows are beside it. Ignored rows
    have loss 0 and gradient 0. A logit that is NaN or +inf makes its row's loss NaN, as in ``cross_entropy``.

    Differentiable in ``hidden`` only. There softmax - onehot is rounded to the weight's dtype before its
    product with the weight, and so is the product; what the losses' gradients multiply is float32. In all
    the gradient is within 0.3% (bfloat16) or 0.04% (float16) of that of float64, root mean square.

    R rows cost 2 R V d FLOPs forward and 4 R V d backward. Scratch: :func:`forward_scratch_bytes`, and
    ``PROBABILITIES_BYTES`` backward.

    Args:
        hidden: [..., d].
        weight: [V, d], float32, bfloat16 or float16: of the LM head.
        targets: [...] int64. One that is neither ``ignore_index`` nor in 0..V-1 makes the loss and the
            gradient of its row NaN: to raise, the host would have to wait for the device.

    Returns:
        float32 [...].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; gradients are recorded and the weight requires one.
    """
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}, not [V, d] in float32, bfloat16 or float16"
        )
    if hidden.shape[-1:] != weight.shape[1:] or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, not floating [..., {weight.shape[1]}]"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {list(targets.shape)} {targets.dtype}, not int64 {list(hidden.shape[:-1])}"
        )
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight requires a gradient, and is a constant here")
    rows = hidden.reshape(-1, hidden.shape[-1])
    losses, _ = _losses(rows, weight, targets.reshape(-1), ignore_index)
    return losses.view(targets.shape)


def losses_and_lse(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps [R] of hidden [R, d]."""
    require_available(hidden.device)
    hidden, weight, targets = as_rows(hidden.to(weight.dtype)), as_rows(weight), targets.contiguous()
    count, words = len(hidden), len(weight)
    kernel, operands = _operands(PARTIALS, PARTIALS_TILED, hidden, weight)
    blocks = kernel.config(weight, operands["key"]).blocks
    tiles, at_once = cdiv(words, blocks["BV"]), forward_chunk(count, words, blocks["BV"])
    largest, sums = (hidden.new_empty(tiles * at_once, dtype=torch.float32) for _ in range(2))
    losses, lse, chosen = (hidden.new_empty(count, dtype=torch.float32) for _ in range(3))
    for rows in _chunks(count, at_once):
        size = rows.stop - rows.start
        kernel, operands = _operands(PARTIALS, PARTIALS_TILED, hidden[rows], weight)
        partials: dict[str, Any] = {"LARGEST": largest, "SUMS": sums, "CHOSEN": chosen[rows]}
        kernel(**operands, **partials, TARGETS=targets[rows])
        COMBINE(
            (cdiv(size, COMBINE.config(losses).blocks["BR"]),), like=losses, constexprs={}, **partials,
            TARGETS=targets[rows], LOSSES=losses[rows], LSE=lse[rows],
            R=size, V=words, TILES=tiles, ignore_index=ignore_index,
        )  # fmt: skip
    return losses, lse


def hidden_gradient(
    gradient: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """[R, d] in the dtype of hidden, from the losses' gradients and the logsumexps, each float32 [R]."""
    require_available(hidden.device)
    dtype, hidden = hidden.dtype, as_rows(hidden.to(weight.dtype))
    weight, targets = as_rows(weight), targets.contiguous()
    count, words = len(hidden), len(weight)
    at_once = backward_chunk(count, words, weight.element_size())
    padded = hidden.new_empty(at_once, _padded(words))
    padded[:, words:] = 0.0  # the CPU's product in bfloat16 reads beyond a row's end: NaN there would spread
    product = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for rows in _chunks(count, at_once):
        kernel, operands = _operands(PROBABILITIES, PROBABILITIES_TILED, hidden[rows], weight)
        out = padded[: rows.stop - rows.start, :words]
        kernel(
            **operands, TARGETS=targets[rows], LSE=lse[rows],
            OUT=out, out_row=out.stride(0), ignore_index=ignore_index,
        )  # fmt: skip
        torch.mm(out, weight, out=product[rows])
    # after the product, so that small losses do not vanish, nor large ones overflow, in 16 bits
    factors = gradient.masked_fill(targets == ignore_index, 0.0)[:, None]
    result = product if dtype == product.dtype else torch.empty_like(product, dtype=dtype)
    return torch.mul(product, factors, out=result)


def _operands(plain: Kernel, tiled: Kernel, hidden: Tensor, weight: Tensor) -> tuple[Kernel, dict[str, Any]]:
    """The kernel that can read these matrices, and its arguments that both passes have."""
    by_tiles = (
        architecture_of(weight.device) in tiled.shipped
        and weight.element_size() == 2
        and all(_describable(matrix) for matrix in (hidden, weight))
    )
    count, words = len(hidden), len(weight)
    arguments: dict[str, Any] = {
        "grid": lambda b: (cdiv(count, b["BR"]) * cdiv(words, b["BV"]),),
        "like": weight,
        "key": f"V={words} d={weight.shape[1]}",
        "constexprs": {"TILED": by_tiles},
        "H": Tiled(hidden, ("BR", "BD")) if by_tiles else hidden,
        "E": Tiled(weight, ("BV", "BD")) if by_tiles else weight,
        "R": count, "V": words, "D": weight.shape[1], "h_row": hidden.stride(0), "e_row": weight.stride(0),
    }  # fmt: skip
    return tiled if by_tiles else plain, arguments


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can be made of it: it and its rows begin at multiples of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and matrix.stride(0) >= matrix.shape[1]


def forward_chunk(rows: int, words: int, tile: int) -> int:
    """Rows that the forward takes at once, with tiles of so many words."""
    return _chunk(rows, PARTIALS_BYTES // (8 * cdiv(words, tile)))


def forward_scratch_bytes(rows: int, words: int, tile: int) -> int:
    """Memory that the forward takes and gives back: partial results, and the targets' logits."""
    return 8 * cdiv(words, tile) * forward_chunk(rows, words, tile) + 4 * rows


def backward_chunk(rows: int, words: int, itemsize: int) -> int:
    """Rows whose softmax - onehot the backward holds at once."""
    return _chunk(rows, PROBABILITIES_BYTES // (_padded(words) * itemsize))


def _chunk(rows: int, fitting: int) -> int:
    return min(rows, max(1, fitting // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def _padded(words: int) -> int:
    """Row stride of the backward's scratch: rows that begin at 128 bytes, whatever the vocabulary."""
    return cdiv(words, 64) * 64


def _chunks(rows: int, at_once: int) -> Iterator[slice]:
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once or 1))


_losses = torch.library.custom_op("opmix_kernels::linear_cross_entropy", losses_and_lse, mutates_args=())
_hidden_gradient = torch.library.custom_op(
    "opmix_kernels::linear_cross_entropy_backward", hidden_gradient, mutates_args=()
)


@_losses.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]  # len() would fix it: torch.compile would compile again for each number of rows
    losses, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return losses, lse


@_hidden_gradient.register_fake
def _(
    gradient: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    return _hidden_gradient(gradient, *ctx.saved_tensors, ctx.ignore_index), None, None, None


_losses.register_autograd(_backward, setup_context=_setup_context)


def examples(dtype: torch.dtype) -> None:
    """Launches that ahead-of-time compilation covers, on tensors of the meta device."""
    with torch.device("meta"):
        weight, targets = torch.empty(128_256, 2048, dtype=dtype), torch.empty(65_536, dtype=torch.int64)
        lse = torch.empty(65_536)
        hidden = torch.empty(65_536, 2048, dtype=dtype)
        misaligned = torch.empty(65_536, 2049, dtype=dtype)[:, :2048]
        for rows in (hidden, misaligned) if dtype.itemsize == 2 else (hidden,):
            losses_and_lse(rows, weight, targets, -100)
            hidden_gradient(lse[:2048], rows[:2048], weight, targets[:2048], lse[:2048], -100)
