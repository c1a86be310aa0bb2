"""Memory of a search on one rank: the model, its probes, its candidates, by running their passes.

Triton kernels, which ``search.kernels: auto`` takes on a GPU, need a GPU. Where they would compute, the
passes here are those of plain torch in the same arithmetic, with what kernels do not hold left out: masks of
dropout, which they draw again, and logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.config import RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.held import HeldCounter
from opmix_dist.models.chunked_head import token_losses
from opmix_dist.models.compute import Compute
from opmix_dist.models.families import family_of
from opmix_dist.models.flops import count_flops
from opmix_dist.models.heads import fusing_head
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.live import LiveBytes
from opmix_dist.plan.question import DataSizes
from opmix_dist.plan.unallocated import CPU, mode_of, pretended, samples, unallocated_model
from opmix_dist.pool.candidates import Method, cheaper_method
from opmix_dist.pool.plan import GROUPS, JOINT, TOKENS_AT_ONCE
from opmix_dist.pool.probes import StepGradients
from opmix_dist.pool.team import Team
from opmix_dist.search.simplex import Components

CHUNK_ROWS = 256
"""Tokens whose logits stand in for a kernel's scratch memory."""


@dataclass(frozen=True)
class ProbeMemory:
    """Bytes on one rank while a group of probes is trained.

    model: frozen parameters in float32, whole or this rank's shard. adapters: A and B of the group, their
    gradients and AdamW's two moments. passes: most that a pass has live besides: activations, logits, the
    base's weights in the dtype of the products.
    """

    jointly: int
    samples: int
    """In a pass, of each probe."""
    model: int
    adapters: int
    passes: int

    @property
    def total(self) -> int:
        return self.model + self.adapters + self.passes


@dataclass(frozen=True)
class CandidateMemory:
    """Bytes on one rank while candidates are simulated, ``joint`` of them with ``samples`` each in a pass;
    parts as of :class:`ProbeMemory`, with all adapters and no moments."""

    method: Method
    joint: int
    samples: int
    gradients: bool
    model: int
    adapters: int
    passes: int

    @property
    def total(self) -> int:
        return self.model + self.adapters + self.passes


def components(config: RunConfig, domains: int) -> list[str]:
    """What a search has a probe for."""
    names = [f"domain {i}" for i in range(domains)]
    shares = np.full(domains, 1 / domains)
    if joining := len(config.search.new_domains):
        old, new = names[joining:], names[:joining]
        return list(Components.for_new_domains(old, np.full(len(old), 1 / len(old)), new).names)
    return list(Components.for_rebalance(names, shares, config.search.probes.domain_share).names)


def groups_of_probes(config: RunConfig, names: list[str]) -> list[list[str]]:
    """As :class:`opmix_dist.pool.probe_groups.ProbeGroups` has them."""
    count = -(-len(names) // config.search.probes.max_joint)
    return [names[i::count] for i in range(count)]


def probe_memory(
    source: ModelSource, config: RunConfig, *, names: list[str], sequence_length: int
) -> ProbeMemory:
    """Of the largest group of the probes ``names``. A step of two passes has all that one of more has."""
    settings, ranks = config.search.probes, config.pool.ranks_per_model
    size = min(settings.passes, 2) * settings.samples_per_pass
    settings = settings.model_copy(update={"batch_size": size, "micro_batch_size": settings.samples_per_pass})
    group = groups_of_probes(config, names)[0]
    dtype = getattr(torch, config.engine.param_dtype)
    with _prepared(source, ranks) as (model, held):
        kernels = _has_kernels(config)
        adapters = _adapters(config, model, group, dropout=0.0 if kernels else settings.dropout)
        # kernels compute as the model that is set up for the dtype does, not by autocast
        autocasts = not kernels and ranks == 1
        gradients = StepGradients(
            adapters, settings, dtype if autocasts else torch.float32, Team(sharded=ranks > 1)
        )
        rows = [samples(size, sequence_length) for _ in group]
        targets = torch.stack([batch.targets.sum() for batch in rows])
        cast(nn.Module, model).train()
        with LiveBytes() as live, nullcontext() if autocasts else _computing(config, adapters, dtype):
            with adapters.training():
                gradients.add_up(rows, targets, 0)
        numbers = sum(parameter.numel() for parameter in adapters.parameters())
    # gradients of the adapters are among what the passes leave
    return ProbeMemory(
        jointly=len(group),
        samples=settings.samples_per_pass,
        model=held,
        adapters=4 * 4 * numbers,
        passes=max(0, live.peak - 4 * numbers),
    )


def candidate_memory(
    source: ModelSource, config: RunConfig, *, names: list[str], data: DataSizes, room: int
) -> CandidateMemory:
    """Of passes of as many samples as a GPU gains by and as fit into ``room`` bytes, or of one each, which
    may not fit either."""
    settings, ranks = config.search.candidates, config.pool.ranks_per_model
    length, rows = data.sequence_length, most_rows(data.sequence_length)
    number = data.domains * settings.samples_per_domain
    dtype = config.engine.param_dtype if settings.dtype == "auto" else settings.dtype
    flops = count_flops(source.build(), length, config.search.probes.rank)
    method = _method(config, cheaper_method(flops, len(names), number * length))
    with _prepared(source, ranks) as (model, held):
        adapters = _adapters(config, model, names)
        numbers = sum(parameter.numel() for parameter in adapters.parameters())
        while True:
            joint, batch = _pass(config, method, number, length, rows)
            with LiveBytes() as live, _computing(config, adapters, getattr(torch, dtype)):
                if config.search.wants_gradients:
                    _with_gradients(adapters, samples(batch, length))
                else:
                    _simulated(adapters, samples(batch * joint, length), joint, method)
            found = CandidateMemory(
                method=method,
                joint=joint,
                samples=batch,
                gradients=config.search.wants_gradients,
                model=held,
                adapters=4 * numbers,
                passes=live.peak,
            )
            if rows == 1 or found.total <= room:
                return found
            rows //= 2


def most_rows(sequence_length: int) -> int:
    """Samples in a pass on a GPU from which more gain nothing."""
    return max(1, TOKENS_AT_ONCE // sequence_length)


def _pass(config: RunConfig, method: Method, number: int, length: int, rows: int) -> tuple[int, int]:
    """Candidates in a pass and samples of each where ``rows`` samples fit, as
    :class:`opmix_dist.pool.plan.Planner` chooses them on a GPU.

    Args:
        number: of held-out samples.
    """
    settings = config.search.candidates
    if method == "merge" or config.search.wants_gradients:
        joint = 1
    elif isinstance(settings.joint, int):
        joint = settings.joint
    else:
        most = max(JOINT, most_rows(length) // number)
        joint = max(1, min(most, -(-settings.count // GROUPS), rows))
    wanted = settings.batch_size
    return joint, min(number, wanted if isinstance(wanted, int) else max(1, rows // joint))


def _method(config: RunConfig, cheaper: Method) -> Method:
    wanted = config.search.candidates.method
    if wanted != "auto":
        return wanted
    return "lowrank" if config.search.wants_gradients else cheaper


def _simulated(adapters: JointAdapters, part: TokenBatch, joint: int, method: Method) -> None:
    U = torch.full((joint, len(adapters.names)), 1 / len(adapters.names), dtype=torch.float64)
    with torch.no_grad(), adapters.merged(U[0]) if method == "merge" else adapters.simulating(U):
        sample_losses(adapters.model, part)


def _with_gradients(adapters: JointAdapters, part: TokenBatch) -> None:
    gates = torch.full((len(part), len(adapters.names)), 1 / len(adapters.names)).requires_grad_()
    with adapters.simulating(gates):
        torch.autograd.grad(sample_losses(adapters.model, part).sum(), gates)


def _adapters(
    config: RunConfig, model: PreTrainedModel, names: list[str], *, dropout: float = 0.0
) -> JointAdapters:
    probes = config.search.probes
    return JointAdapters(
        model, names, rank=probes.rank, alpha=probes.alpha, dropout=dropout, seeds=[0] * len(names)
    )


def _has_kernels(config: RunConfig) -> bool:
    """On a GPU that they are made for; they read whole weights."""
    return config.search.kernels != "torch" and config.pool.ranks_per_model == 1


@contextmanager
def _computing(config: RunConfig, adapters: JointAdapters, dtype: torch.dtype) -> Iterator[None]:
    """As ``dtype`` asks for, without whole logits where kernels would compute them."""
    model, family = adapters.model, family_of(adapters.model)
    with adapters.computing(Compute(dtype)):
        if family is None or not _has_kernels(config):
            yield
            return
        head = cast(nn.Linear, model.get_output_embeddings())
        weight = head.weight.detach().to(dtype)

        def losses(hidden: Tensor, targets: Tensor) -> Tensor:
            return token_losses(hidden.to(dtype), weight, targets, rows=CHUNK_ROWS).sum(dim=1)

        with fusing_head(model, model.get_submodule(family.backbone), losses):
            yield


@contextmanager
def _prepared(source: ModelSource, ranks: int) -> Iterator[tuple[PreTrainedModel, int]]:
    """The pool's model, without memory, and the bytes that a rank would hold of it."""
    around: AbstractContextManager[object] = pretended(ranks) if ranks > 1 else nullcontext()
    with around:
        model = unallocated_model(source, ranks)
        held = HeldCounter(CPU).count(cast(nn.Module, model).parameters())
        with mode_of(model):
            yield model, held
