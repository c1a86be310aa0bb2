"""Two models on the same held-out tokens: losses of each sample, and how far the distributions are apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.chunked_head import NO_TARGET
from opmix_dist.models.loss import losses_of_logits, sample_losses, uses_flash_attention
from opmix_dist.pool.stream import parts_of, parts_on
from opmix_dist.pool.team import Team

POSITIONS = 1024
"""Of which divergences are computed at a time: each takes some numbers for every token of the vocabulary."""


class _Kept:
    """Losses from logits, which are kept."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.logits, self.targets = logits, targets
        return losses_of_logits(logits, targets)


@torch.no_grad()
def divergence(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """KL(first || second) of next-token distributions, summed over each sample's targets, nats.

    Args:
        first, second: logits [B, T, V]. targets: [B, T] or ``NO_TARGET`` where there is none.

    Returns:
        [B] float64.
    """
    found = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    rows, columns = torch.where(targets != NO_TARGET)
    for start in range(0, len(rows), POSITIONS):
        at = rows[start : start + POSITIONS], columns[start : start + POSITIONS]
        p, q = (F.log_softmax(logits[at].float(), dim=-1) for logits in (first, second))
        found[at] = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).double()
    return found.sum(dim=1)


@torch.no_grad()
def compare(
    real: PreTrainedModel,
    simulated: PreTrainedModel,
    heldout: TokenBatch,
    *,
    batch_size: int,
    wants_divergence: bool,
    team: Team,
    dtype: torch.dtype,
) -> Tensor:
    """Collective over the team, whose ranks share the samples out. Sums over each sample's targets: of the
    real model's losses, the simulated one's, and KL(real || simulated) or 0, [N, 3] float64 on every rank.

    Args:
        heldout: N samples. dtype: of the products where flash attention needs 16 bits.
    """
    device = next(cast(nn.Module, real).parameters()).device
    parts = parts_of(np.arange(len(heldout)), batch_size)
    found = torch.zeros(len(heldout), 3, dtype=torch.float64)
    dealt: Sequence[int] = team.deal(len(parts))
    with _products(real, device, dtype):
        for turn, (rows, batch) in enumerate(parts_on(device, heldout, [parts[i] for i in dealt])):
            one, other = _Kept(), _Kept()
            sums = [
                sample_losses(cast(nn.Module, model), batch, from_logits=kept).double()
                for model, kept in ((real, one), (simulated, other))
            ]
            apart = torch.zeros_like(sums[0])
            if wants_divergence:
                apart = divergence(one.logits, other.logits, one.targets)
            if team.counts(turn, len(parts)):
                found[torch.from_numpy(rows)] = torch.stack([*sums, apart], dim=1).cpu()
    return team.sum(found)


def _products(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> AbstractContextManager[object]:
    """Models differ by little, hence float32; but flash attention's kernels take none."""
    if not uses_flash_attention(cast(nn.Module, model)):
        return nullcontext()
    return torch.autocast(device.type, dtype)
