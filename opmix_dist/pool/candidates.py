"""Evaluating candidate mixtures on paired held-out tokens: the plain-torch EvaluateCandidates.

The contract: a base model, adapters, coefficients U [M, C] and held-out tokens of D domains give losses
[M, D], and on request their exact gradients [M, D, C]. Every candidate sees the same tokens, so differences
between candidates are paired. The tokens stream in micro-batches, which are dealt out to the ranks of a team;
results stay on the device until a group of candidates is done, or looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import DomainLosses, losses_by_domain, sample_losses
from opmix_dist.pool.stream import parts_of, parts_on
from opmix_dist.pool.team import ALONE, Team

Method = Literal["lowrank", "merge"]
Progress = Callable[[int], None]
"""Told how many samples, each counted once for every candidate, were done or need no more be done."""


@dataclass(frozen=True)
class Simulated:
    """sums: of the losses of each sample's targets [M, N] float64, nats; 0 of samples that a candidate was
    stopped before. seen: [M, N] bool, the samples that a candidate was evaluated on."""

    sums: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class SimulatedGradients:
    """losses: of M candidates over D domains; gradients: dL_i / du_k [M, D, C] float64, in nats per token and
    unit of u_k, of losses as functions of all of R^C: not projected onto the simplex; sums: of the losses of
    each sample's targets [M, N] float64, nats."""

    losses: DomainLosses
    gradients: np.ndarray
    sums: np.ndarray


class Stopping(Protocol):
    """Which candidates need no more samples."""

    def looks(self, batch_size: int) -> Sequence[int]:
        """Numbers of samples after which ``keeps`` is to be asked, ascending multiples of ``batch_size``."""

    def keeps(self, sums: np.ndarray, seen: np.ndarray, num_looks: int) -> np.ndarray:
        """Which candidates go on [m] bool, of sums and seen [m, N]."""


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
    on_progress: Progress = lambda samples: None,
) -> DomainLosses:
    """Losses [M, D] of the simulated models; arguments as of :func:`simulate_sums`.

    Args:
        domain_ids: domain of each of the N held-out samples [N].
    """
    found = simulate_sums(
        adapters,
        coefficients,
        heldout,
        method=method,
        batch_size=batch_size,
        joint=joint,
        on_progress=on_progress,
    )
    return losses_by_domain(found.sums, heldout.targets.numpy(), domain_ids.numpy(), num_domains)


@torch.no_grad()
def simulate_sums(
    adapters: JointAdapters,
    coefficients: np.ndarray,
    heldout: TokenBatch,
    *,
    method: Method,
    batch_size: int,
    joint: int = 1,
    order: np.ndarray | None = None,
    stopping: Stopping | None = None,
    team: Team = ALONE,
    on_progress: Progress = lambda samples: None,
) -> Simulated:
    """Losses of each held-out sample, of the simulated models W(u_m) of all rows u_m of ``coefficients``.

    Args:
        coefficients: U [M, C]; a row of zeros is the base itself.
        heldout: N samples.
        method: ``lowrank`` adds gated low-rank terms for ``joint`` candidates in one pass; ``merge`` merges
            the full deltas of one candidate after the other, in memory.
        batch_size: samples per forward pass and candidate.
        order: of the samples in the stream [N]; None: as they lie.
        stopping: None: every candidate sees all samples. What is stopped leaves its group, so that the shapes
            of the products change at looks only.
        team: all its ranks call this, with the same arguments, and get the same.
        on_progress: told of the samples that the whole team has done.

    Raises:
        AgreedError: it failed on one rank of a team.
    """
    adapters.model.eval()
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    stream = _Stream(
        adapters,
        heldout,
        np.arange(len(heldout)) if order is None else order,
        batch_size,
        stopping,
        team,
        on_progress,
    )
    found = list(stream.joint(U, joint) if method == "lowrank" else stream.merged(U))
    if not found:
        return Simulated(np.zeros((0, len(heldout))), np.zeros((0, len(heldout)), dtype=bool))
    return Simulated(np.concatenate([one.sums for one in found]), np.concatenate([one.seen for one in found]))


@dataclass(frozen=True)
class _Stream:
    """The samples, for one group of candidates after the other."""

    adapters: JointAdapters
    heldout: TokenBatch
    order: np.ndarray
    batch_size: int
    stopping: Stopping | None
    team: Team
    tick: Progress

    def joint(self, U: Tensor, joint: int) -> Iterator[Simulated]:
        """``joint`` candidates at a time; each part of the samples is there once for every one of them."""
        for first in range(0, len(U), joint):
            yield self._group(U[first : first + joint], self.adapters.simulating)

    def merged(self, U: Tensor) -> Iterator[Simulated]:
        for u in U:
            with self.adapters.merged(u):
                yield self._group(u[None], lambda alive: nullcontext())

    def _group(self, U: Tensor, entered: Callable[[Tensor], AbstractContextManager[None]]) -> Simulated:
        """``entered``: the context that simulates the rows of U that are left."""
        count = len(self.order)
        sums, seen = np.zeros((len(U), count)), np.zeros((len(U), count), dtype=bool)
        looks = list(self.stopping.looks(self.batch_size)) if self.stopping else []
        alive, start = np.arange(len(U)), 0
        for end in (*looks, count):
            rows = self.order[start:end]
            with entered(U[torch.from_numpy(alive)]):
                sums[np.ix_(alive, rows)] = self._losses(rows, len(alive))
            seen[np.ix_(alive, rows)] = True
            start = end
            if self.stopping and end < count:
                keeps = self.stopping.keeps(sums[alive], seen[alive], len(looks))
                self.tick(int((~keeps).sum()) * (count - end))
                alive = alive[keeps]
                if not alive.size:
                    break
        return Simulated(sums, seen)

    def _losses(self, rows: np.ndarray, candidates: int) -> np.ndarray:
        """[m, n] float64, of the n samples of ``rows``."""

        def losses(part: TokenBatch) -> Tensor:
            found = sample_losses(self.adapters.model, part.repeat(candidates))  # [m * b]
            return found.double().view(candidates, -1).T

        def done(samples: int) -> None:
            self.tick(candidates * samples)

        parts = parts_of(rows, self.batch_size)
        return _over_parts(self.adapters, self.heldout, parts, losses, self.team, done).T


def _over_parts(
    adapters: JointAdapters,
    samples: TokenBatch,
    parts: Sequence[np.ndarray],
    measure: Callable[[TokenBatch], Tensor],
    team: Team,
    tick: Progress,
) -> np.ndarray:
    """Collective over the team. What is measured of the samples of ``parts``, in their order: [n, width].

    Args:
        measure: of the samples of a part, [b, width] float64.
        tick: told how many samples all ranks together have done.
    """
    device = adapters.parameters()[0].device
    sizes = [len(part) for part in parts]
    places = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    dealt = team.deal(len(parts))

    def mine() -> Tensor:
        found = []
        for turn, (_, part) in enumerate(parts_on(device, samples, [parts[i] for i in dealt])):
            found.append(measure(part))
            tick(sum(sizes[turn * team.size : (turn + 1) * team.size]))
        measured = torch.cat(found).cpu().split([sizes[i] for i in dealt])
        values = torch.zeros(sum(sizes), measured[0].shape[1], dtype=torch.float64)
        for turn, (i, one) in enumerate(zip(dealt, measured, strict=True)):
            if team.counts(turn, len(parts)):
                values[places[i]] = one
        return values

    return team.sum(team.compute(mine)).numpy()


def simulate_with_gradients(
    adapters: JointAdapters,
    coefficients: np.ndarray,
    heldout: TokenBatch,
    domain_ids: Tensor,
    num_domains: int,
    *,
    batch_size: int,
    team: Team = ALONE,
    on_progress: Progress = lambda samples: None,
) -> SimulatedGradients:
    """Losses [M, D] as of :func:`evaluate_candidates`, and their exact gradients by back-propagation.

    Every sample gets coefficients of its own, all equal to its candidate's. Its loss depends on no others, so
    one backward pass over a part gives each sample its own gradient, whichever domains the part mixes; they
    are summed by domain in float64. Nothing else gets a gradient, and no graph outlives
    its part. Some 3 times the cost of the losses alone.

    Args:
        batch_size: samples per forward and backward pass; a graph holds the activations of this many.
        team, on_progress: as of :func:`simulate_sums`.

    Raises:
        AgreedError: it failed on one rank of a team.
    """
    adapters.model.eval()
    device = adapters.parameters()[0].device
    U = torch.as_tensor(coefficients, dtype=torch.float64)
    sums = np.zeros((len(U), len(heldout)))
    slopes = np.zeros((*sums.shape, U.shape[1]))
    parts = parts_of(np.arange(len(heldout)), batch_size)
    for m, u in enumerate(U):
        measure = partial(_differentiated, adapters, u.to(device))
        found = _over_parts(adapters, heldout, parts, measure, team, on_progress)
        sums[m], slopes[m] = found[:, 0], found[:, 1:]
    losses = losses_by_domain(sums, heldout.targets.numpy(), domain_ids.numpy(), num_domains)
    gradients = np.zeros((len(U), num_domains, U.shape[1]))
    np.add.at(gradients.swapaxes(0, 1), domain_ids.numpy(), slopes.swapaxes(0, 1))
    return SimulatedGradients(losses, gradients / np.maximum(losses.targets, 1)[:, None], sums)


def _differentiated(adapters: JointAdapters, u: Tensor, part: TokenBatch) -> Tensor:
    """Loss sums of the samples under u [C], and the gradient of each with respect to u, side by side:
    [b, 1 + C] float64."""
    gates = u.expand(len(part), -1).clone().requires_grad_()
    with torch.enable_grad(), adapters.simulating(gates):
        found = sample_losses(adapters.model, part)
        (slopes,) = torch.autograd.grad(found.sum(), gates)
    return torch.cat([found.detach().double()[:, None], slopes.double()], dim=1)
