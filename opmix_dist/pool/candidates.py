"""Evaluating candidate mixtures on paired held-out tokens: the plain-torch EvaluateCandidates.

The contract: a base model, adapters, coefficients U [M, C] and held-out tokens of D domains give losses
[M, D]. Every candidate sees the same tokens, so differences between candidates are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import mean_losses_per_sample, sample_losses

Method = Literal["lowrank", "merge"]


@dataclass(frozen=True)
class CandidateLosses:
    """Per candidate and domain [M, D] float64: mean loss (nats per token) and its standard error over the
    held-out samples; and the predicted tokens per domain [D]."""

    loss: np.ndarray
    stderr: np.ndarray
    tokens: np.ndarray


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
    tokens: Tensor,
    domain_ids: Tensor,
    num_domains: int,
    *,
    method: Method,
    batch_size: int,
    joint: int = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> CandidateLosses:
    """Losses of the simulated models W(u_m) for every row u_m of ``coefficients``.

    Args:
        coefficients: U [M, C]; a row of zeros is the base itself.
        tokens, domain_ids: held-out samples [N, T] int64 and the domain of each [N].
        method: ``lowrank`` adds gated low-rank terms for ``joint`` candidates in one pass; ``merge`` merges
            the full deltas of one candidate after the other, in memory.
        batch_size: samples per forward pass and candidate.
    """
    adapters.model.eval()
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    run = _lowrank if method == "lowrank" else _merged
    losses = run(adapters, U, tokens, batch_size, joint, on_progress)  # [M, N]
    return _by_domain(losses.numpy(), domain_ids.numpy(), num_domains, tokens.shape[1] - 1)


def _merged(
    adapters: JointAdapters, U: Tensor, tokens: Tensor, batch_size: int, joint: int, tick: Callable[[], None]
) -> Tensor:
    rows = []
    for u in U:
        with adapters.merged(u.to(tokens.device)):
            rows.append(mean_losses_per_sample(adapters.model, tokens, batch_size))
        tick()
    return torch.stack(rows) if rows else torch.zeros(0, len(tokens), dtype=torch.float64)


def _lowrank(
    adapters: JointAdapters, U: Tensor, tokens: Tensor, batch_size: int, joint: int, tick: Callable[[], None]
) -> Tensor:
    losses = torch.zeros(len(U), len(tokens), dtype=torch.float64)
    device = adapters.parameters()[0].device
    for first in range(0, len(U), joint):
        group = U[first : first + joint]
        with adapters.simulating(group):
            for start in range(0, len(tokens), batch_size):
                part = tokens[start : start + batch_size].to(device)
                sums = sample_losses(adapters.model, part.repeat(len(group), 1))  # [m * b]
                losses[first : first + joint, start : start + len(part)] = (
                    sums.double().cpu().view(len(group), -1)
                )
        for _ in group:
            tick()
    return losses / (tokens.shape[1] - 1)


def _by_domain(losses: np.ndarray, domain_ids: np.ndarray, num_domains: int, targets: int) -> CandidateLosses:
    """Means and standard errors over each domain's samples: [M, N] to [M, D]."""
    counts = np.bincount(domain_ids, minlength=num_domains)
    member = np.eye(num_domains)[domain_ids]  # [N, D]
    mean = losses @ member / counts
    squares = (losses - mean[:, domain_ids]) ** 2 @ member
    stderr = np.sqrt(squares / np.maximum(counts - 1, 1) / counts)
    return CandidateLosses(mean, stderr, counts * targets)
