"""Evaluating candidate mixtures on paired held-out tokens: the plain-torch EvaluateCandidates.

The contract: a base model, adapters, coefficients U [M, C] and held-out tokens of D domains give losses
[M, D], and on request their exact gradients [M, D, C]. Every candidate sees the same tokens, so differences
between candidates are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import DomainLosses, losses_by_domain, sample_loss_sums, sample_losses

Method = Literal["lowrank", "merge"]


@dataclass(frozen=True)
class SimulatedGradients:
    """losses: of M candidates over D domains; gradients: dL_i / du_k [M, D, C] float64, in nats per token and
    unit of u_k, of losses as functions of all of R^C: not projected onto the simplex; sums: of the losses of
    each sample's targets [M, N] float64, nats."""

    losses: DomainLosses
    gradients: np.ndarray
    sums: np.ndarray


def cheaper_method(flops: FlopCounts, num_adapters: int, tokens: int) -> Method:
    """Merging costs the same for any number of tokens, low-rank terms cost per token; compare FLOPs.

    Args:
        tokens: held-out tokens per candidate.
    """
    extra_lowrank = num_adapters * flops.lora_per_adapter * tokens
    return "merge" if num_adapters * flops.merge_per_adapter < extra_lowrank else "lowrank"


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
    """Losses [M, D] of the simulated models; arguments as of :func:`simulate_sums`.

    Args:
        domain_ids: domain of each of the N held-out samples [N].
    """
    sums = simulate_sums(
        adapters,
        coefficients,
        heldout,
        method=method,
        batch_size=batch_size,
        joint=joint,
        on_progress=on_progress,
    )
    return losses_by_domain(sums, heldout.targets.numpy(), domain_ids.numpy(), num_domains)


@torch.no_grad()
def simulate_sums(
    adapters: JointAdapters,
    coefficients: np.ndarray,
    heldout: TokenBatch,
    *,
    method: Method,
    batch_size: int,
    joint: int = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Loss of each held-out sample, summed over its targets [M, N] float64, of the simulated models W(u_m) of
    all rows u_m of ``coefficients``.

    Args:
        coefficients: U [M, C]; a row of zeros is the base itself.
        heldout: N samples.
        method: ``lowrank`` adds gated low-rank terms for ``joint`` candidates in one pass; ``merge`` merges
            the full deltas of one candidate after the other, in memory.
        batch_size: samples per forward pass and candidate.
    """
    adapters.model.eval()
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    run = _lowrank if method == "lowrank" else _merged
    return run(adapters, U, heldout, batch_size, joint, on_progress).numpy()


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


def simulate_with_gradients(
    adapters: JointAdapters,
    coefficients: np.ndarray,
    heldout: TokenBatch,
    domain_ids: Tensor,
    num_domains: int,
    *,
    batch_size: int,
    on_progress: Callable[[], None] = lambda: None,
) -> SimulatedGradients:
    """Losses [M, D] as of :func:`evaluate_candidates`, and their exact gradients by back-propagation.

    Every sample gets coefficients of its own, all equal to its candidate's. Its loss depends on no others, so
    one backward pass over a part gives each sample its own gradient, whichever domains the part mixes; they
    are summed by domain in float64. Nothing else gets a gradient, and no graph outlives
    its part. Some 3 times the cost of the losses alone.

    Args:
        batch_size: samples per forward and backward pass; a graph holds the activations of this many.
    """
    adapters.model.eval()
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    sums = torch.zeros(len(U), len(heldout), dtype=torch.float64)
    slopes = torch.zeros(*sums.shape, U.shape[1], dtype=torch.float64)
    for m, u in enumerate(U):
        for start in range(0, len(heldout), batch_size):
            part = heldout[start : start + batch_size]
            rows = slice(start, start + len(part))
            sums[m, rows], slopes[m, rows] = _differentiated(adapters, u, part)
        on_progress()
    losses = losses_by_domain(sums.numpy(), heldout.targets.numpy(), domain_ids.numpy(), num_domains)
    gradients = np.zeros((len(U), num_domains, U.shape[1]))
    np.add.at(gradients.swapaxes(0, 1), domain_ids.numpy(), slopes.numpy().swapaxes(0, 1))
    return SimulatedGradients(losses, gradients / np.maximum(losses.targets, 1)[:, None], sums.numpy())


def _differentiated(adapters: JointAdapters, u: Tensor, part: TokenBatch) -> tuple[Tensor, Tensor]:
    """Loss sums [b] of the samples under u [C], and the gradient of each with respect to u [b, C]."""
    device = adapters.parameters()[0].device
    gates = u.expand(len(part), -1).clone().requires_grad_()
    with torch.enable_grad(), adapters.simulating(gates):
        found = sample_losses(adapters.model, part.to(device))
        (slopes,) = torch.autograd.grad(found.sum(), gates)
    return found.detach().cpu(), slopes
