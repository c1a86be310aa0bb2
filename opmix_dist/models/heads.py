"""The LM head in 16 bits with float32 logits, or with its cross-entropy and without logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

HiddenLosses = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [B, T, d] and targets [B, T] (-100: none) to each sample's sum of losses, [B] float64."""

_FUSED: WeakKeyDictionary[nn.Module, tuple[nn.Module, HiddenLosses]] = WeakKeyDictionary()


def fused_head(model: nn.Module) -> tuple[nn.Module, HiddenLosses] | None:
    """The model without its head, and what gives losses from its hidden states, where that is installed."""
    return _FUSED.get(model)


@contextmanager
def fusing_head(model: nn.Module, backbone: nn.Module, losses: HiddenLosses) -> Iterator[None]:
    """Losses of ``model`` are ``losses`` of its hidden states inside."""
    _FUSED[model] = backbone, losses
    try:
        yield
    finally:
        del _FUSED[model]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes ``forward`` inside; it stays the same module, under the same name."""
    assert "forward" not in vars(module), "replaced already"
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def float32_logits(head: nn.Linear, dtype: torch.dtype, *, keep: bool = True) -> Callable[[Tensor], Tensor]:
    """The head's product of operands in ``dtype``, not rounded to it: [..., d] to [..., V] float32.

    Args:
        keep: a copy of the weights in ``dtype``; false: of each pass, as sharded weights need.
    """

    def parts() -> tuple[Tensor, Tensor | None]:
        bias = None if head.bias is None else head.bias.detach().float()
        return head.weight.detach().to(dtype), bias

    kept = parts() if keep else None

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = kept or parts()
        rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _WideProduct.apply(rows, weight)
            logits = logits if bias is None else logits + bias
        return logits.view(*hidden.shape[:-1], -1)

    return forward


class _WideProduct(torch.autograd.Function):
    """x W^T in float32 of 16-bit x [R, d] and constant W [V, d]; the gradient to x is in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None
