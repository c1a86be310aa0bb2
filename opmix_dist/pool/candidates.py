"""Evaluating candidate mixtures on paired held-out tokens: the plain-torch EvaluateCandidates.

The contract: a base model, adapters, coefficients U [M, C] and held-out tokens of D domains give losses
[M, D]. Every candidate sees the same tokens, so differences between candidates are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import DomainLosses, losses_by_domain, sample_loss_sums, sample_losses

Method = Literal["lowrank", "merge"]


def cheaper_method(flops: FlopCounts, num_adapters: int, tokens: int) -> Method:
    """Merging costs the same for any number of tokens, low-rank terms cost per token; compare FLOPs.

    Args:
        tokens: held-out tokens per candidate.
    """
    extra_lowrank = num_adapters * flops.lora_per_adapter * tokens
    return "merge" if num_adapters * flops.merge_per_adapter < extra_lowrank else "lowrank"


@torch.no_grad()
def evaluate_candidates(
    adapters: JointAdapters,
    coefficients: np.ndarray,
    heldout: TokenBatch,
    domain_ids: Tensor,
    num_domains: int,
    *,
    method: Method,
    batch_size: int,
    joint: int = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> DomainLosses:
    """Losses [M, D] of the simulated models W(u_m) for every row u_m of ``coefficients``.

    Args:
        coefficients: U [M, C]; a row of zeros is the base itself.
        heldout, domain_ids: N held-out samples and the domain of each [N].
        method: ``lowrank`` adds gated low-rank terms for ``joint`` candidates in one pass; ``merge`` merges
            the full deltas of one candidate after the other, in memory.
        batch_size: samples per forward pass and candidate.
    """
    adapters.model.eval()
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    run = _lowrank if method == "lowrank" else _merged
    sums = run(adapters, U, heldout, batch_size, joint, on_progress)  # [M, N]
    return losses_by_domain(sums.numpy(), heldout.targets.numpy(), domain_ids.numpy(), num_domains)


def _merged(
    adapters: JointAdapters,
    U: Tensor,
    heldout: TokenBatch,
    batch_size: int,
    joint: int,
    tick: Callable[[], None],
) -> Tensor:
    rows = []
    for u in U:
        with adapters.merged(u):
            rows.append(sample_loss_sums(adapters.model, heldout, batch_size))
        tick()
    return torch.stack(rows) if rows else torch.zeros(0, len(heldout), dtype=torch.float64)


def _lowrank(
    adapters: JointAdapters,
    U: Tensor,
    heldout: TokenBatch,
    batch_size: int,
    joint: int,
    tick: Callable[[], None],
) -> Tensor:
    """``joint`` candidates at a time; each part of the samples is there once for every one of them."""
    sums = torch.zeros(len(U), len(heldout), dtype=torch.float64)
    device = adapters.parameters()[0].device
    for first in range(0, len(U), joint):
        group = U[first : first + joint]
        with adapters.simulating(group):
            for start in range(0, len(heldout), batch_size):
                part = heldout[start : start + batch_size]
                found = sample_losses(adapters.model, part.to(device).repeat(len(group)))  # [m * b]
                sums[first : first + joint, start : start + len(part)] = (
                    found.double().cpu().view(len(group), -1)
                )
        for _ in group:
            tick()
    return sums
