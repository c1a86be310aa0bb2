"""Next-token cross-entropy, float32 from the logits on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sample_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Sum of the next-token cross-entropies of each sample, in nats.

    Args:
        tokens: [B, T] int64; positions 1..T-1 are predicted from what comes before.

    Returns:
        [B] float32 sums over T - 1 targets.
    """
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    targets = tokens[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).sum(dim=1)


def num_targets(tokens: Tensor) -> int:
    """Predicted positions in [B, T] tokens: B * (T - 1)."""
    return tokens.shape[0] * (tokens.shape[1] - 1)


@torch.no_grad()
def mean_losses_per_sample(model: nn.Module, tokens: Tensor, batch_size: int) -> Tensor:
    """Mean next-token loss of each held-out sample: [N, T] to [N] float64 on the CPU, nats per token."""
    device = next(model.parameters()).device
    parts = [sample_losses(model, part.to(device)).double().cpu() for part in tokens.split(batch_size)]
    return torch.cat(parts) / (tokens.shape[1] - 1)
