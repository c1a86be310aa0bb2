"""LM head and cross-entropy in chunks of tokens: losses and gradients without the logits of all tokens.

loss_i = log sum_v exp(h_i . w_v) - h_i . w_{t_i}. The backward pass computes a chunk's logits once more and
turns them into softmax - onehot where they lie, so that R rows cost 8 R V d FLOPs in all instead of 6 R V d,
and no more than one chunk's logits are in memory: [rows, V] in float32, and once more in the dtype of the
products where that is another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from opmix_dist.models.families import family_of
from opmix_dist.models.heads import replaced_forward

log = logging.getLogger(__name__)

NO_TARGET = -100
"""What is no token: a row without a target has loss 0 and gradient 0."""
_CHUNKS = 8
"""That whole logits of the largest size would make."""


@dataclass(frozen=True)
class ChunkedHead:
    """The head of a model whose logits are the head's product and nothing else.

    It computes where the model calls it: what gathers parameters around that call (FSDP2's root, ZeRO stage
    3) does so for it too, and the model returns losses in place of logits.
    """

    head: nn.Linear
    vocab_size: int
    max_bytes: int
    """Most that the float32 logits of a forward pass may take whole. Chunks are of an eighth: they cost a
    product more and time in small operations, which whole logits of a usual size are spared."""
    compiled: bool = False
    """By torch.compile: a chunk's logits are read and written fewer times."""

    def needed(self, tokens: int) -> bool:
        """Whether the logits of ``tokens`` tokens are more than may be whole."""
        return 4 * self.vocab_size * tokens > self.max_bytes

    @property
    def rows(self) -> int:
        """Tokens of a chunk."""
        return max(1, self.max_bytes // _CHUNKS // (4 * self.vocab_size))

    @contextmanager
    def giving_losses(self, targets: Tensor) -> Iterator[None]:
        """The head gives each token's loss inside.

        Args:
            targets: [B, T] int64, or ``NO_TARGET``, of the tokens that the model is called with.
        """

        def losses(hidden: Tensor) -> Tensor:
            # flash attention's models see all samples as one
            own = targets.view(hidden.shape[:-1])
            return token_losses(hidden, self.head.weight, own, rows=self.rows, compiled=self.compiled)

        with replaced_forward(self.head, losses):
            yield


def chunked_head(
    model: PreTrainedModel, max_bytes: int | None, *, compiled: bool = False
) -> ChunkedHead | None:
    """None: logits are always whole, as ``max_bytes`` None asks for, or because this is no class that is
    known to do nothing to its logits.

    Args:
        model: as transformers made it: sharding makes classes of its own.
    """
    if max_bytes is None:
        return None
    if family_of(model) is None:
        _tell_whole(type(model).__name__)
        return None
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return ChunkedHead(head, head.out_features, max_bytes, compiled)


@cache
def _tell_whole(architecture: str) -> None:
    log.info(
        "engine.logits_memory: %s may do more to its logits than its LM head says, so they are whole",
        architecture,
    )


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int, compiled: bool = False
) -> Tensor:
    """Cross-entropy of each token, in nats.

    The products are of the dtype that they have in the model's own head: autocast's, or that of ``hidden``.
    From the logits on all is float32, or float64 of float64; the gradient to the weight is summed over chunks
    in it.

    Args:
        hidden: [..., d].
        weight: [V, d].
        targets: [...] int64 in 0..V-1, or ``NO_TARGET``.
        rows: tokens of a chunk.
        compiled: as of :class:`ChunkedHead`.

    Returns:
        [...], no view: FSDP2 warns of models that return one.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _TokenLosses.apply(hidden, weight, targets, dtype, rows, compiled)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        rows: int,
        compiled: bool,
    ) -> Tensor:
        ctx.dtype, ctx.rows, ctx.compiled = dtype, rows, compiled
        ctx.save_for_backward(hidden, weight, targets)
        result = hidden.new_empty(targets.shape, dtype=_wide(dtype))
        hidden, targets, losses, operand = *_flat(hidden, targets), result.view(-1), weight.to(dtype)
        ctx.normalisers = normalisers = torch.empty_like(losses)
        of_chunk = _chosen(_chunk_losses, compiled)
        for part in _chunks(len(hidden), rows):
            losses[part], normalisers[part] = of_chunk(hidden[part], operand, targets[part])
        losses.masked_fill_(targets == NO_TARGET, 0.0)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        whole, weight, targets = ctx.saved_tensors
        normalisers, operand = ctx.normalisers, weight.to(ctx.dtype)
        hidden, targets = _flat(whole, targets)
        factors = gradient.reshape(-1).masked_fill(targets == NO_TARGET, 0.0)
        to_hidden, to_weight, *_ = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=normalisers.dtype) if to_weight else None
        of_chunk = _chosen(_chunk_slopes, ctx.compiled)
        for part in _chunks(len(hidden), ctx.rows):
            slopes = of_chunk(hidden[part], operand, targets[part], normalisers[part], factors[part])
            if hidden_gradient is not None:
                hidden_gradient[part] = slopes @ operand
            if weight_gradient is not None:
                weight_gradient += slopes.T @ hidden[part].to(ctx.dtype)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.view(whole.shape)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None


def _chunk_losses(hidden: Tensor, operand: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps [rows]; the losses of rows without a target mean nothing."""
    logits = _logits(hidden, operand)
    largest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, _existing(targets)) - largest
    sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True).log_()
    # the losses before the largest comes back: they may be small beside it
    return (sums - chosen).squeeze(1), (sums + largest).squeeze(1)


def _chunk_slopes(
    hidden: Tensor, operand: Tensor, targets: Tensor, normalisers: Tensor, factors: Tensor
) -> Tensor:
    """Gradient of the logits, [rows, V] in the dtype of the products: the losses' gradients [rows] times
    softmax - onehot."""
    slopes = _logits(hidden, operand).sub_(normalisers.unsqueeze(1)).exp_()
    chosen = _existing(targets)
    slopes.scatter_(1, chosen, slopes.gather(1, chosen) - 1.0)
    return slopes.mul_(factors.unsqueeze(1)).to(operand.dtype)


def _chosen(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _flat(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[R, d] and [R]."""
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def _logits(hidden: Tensor, operand: Tensor) -> Tensor:
    """Of a chunk, in a tensor of their own that may be changed: [rows, V]."""
    hidden, wide = hidden.to(operand.dtype), _wide(operand.dtype)
    if hidden.is_cuda and operand.dtype != wide:
        return torch.mm(hidden, operand.T, out_dtype=wide)  # not rounded on the way
    return (hidden @ operand.T).to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _existing(targets: Tensor) -> Tensor:
    """[rows, 1], with some token where there is no target."""
    return targets.clamp(min=0).unsqueeze(1)


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
