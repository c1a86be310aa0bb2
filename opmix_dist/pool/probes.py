"""Training the probes: one LoRA adapter per component, jointly on one frozen base.

A step's samples go through the model in passes of ``micro_batch_size`` of each probe. The passes are dealt
out to the ranks of a team; every rank adds their gradients up in the passes' order and makes the same step.
So the probes do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import CURVE_FILE
from opmix_dist.models.compute import FLOAT32, Compute
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from opmix_dist.models.sharding import is_sharded
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.team import ALONE, Team
from opmix_dist.search_config import ProbeConfig
from opmix_dist.seeds import derive_seed


def train_probes(
    model: PreTrainedModel,
    batches: Mapping[str, Iterator[TokenBatch]],
    config: ProbeConfig,
    *,
    base_lr: float,
    betas: tuple[float, float],
    seeds: Mapping[str, int],
    on_step: Callable[[int], None] = lambda step: None,
    compute: Compute = FLOAT32,
    team: Team = ALONE,
) -> tuple[JointAdapters, dict[str, list[float]]]:
    """Train one adapter per entry of ``batches``, each as if it were alone. Collective over ``team``.

    The loss is the sum over adapters of each one's own mean over its targets; A and B have no parameter in
    common, so each adapter sees its own gradient only. AdamW is elementwise and clipping goes by each
    adapter's own norm: the result equals separate runs to float tolerance.

    Args:
        batches: component to an endless iterator of b samples of T tokens, the same b and T for all, and the
            same samples on all ranks of the team.
        base_lr: the trainer's base learning rate; probes use ``lr_multiplier`` times it, constant.
        seeds: component to the seed of its initial A and its dropout.
        compute: dtype of the matrix products, by autocast in plain torch where the model is whole, and
            whether Triton kernels do them.

    Returns:
        The adapters, injected in ``model``, and each component's training loss per step (nats per token).

    Raises:
        SearchError: naming the probe and the step whose loss is NaN or inf, or whose samples have no target;
            of a team, whatever else can be agreed on.
        UserError: kernels cannot run where the model is.
    """
    names = list(batches)
    adapters = JointAdapters(
        model,
        names,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        seeds=[seeds[name] for name in names],
    )
    optimizer = torch.optim.AdamW(
        adapters.parameters(),
        lr=base_lr * config.lr_multiplier,
        betas=betas,
        weight_decay=config.weight_decay,
    )
    curves: dict[str, list[float]] = {name: [] for name in names}
    autocasts = not compute.kernels and not is_sharded(model)
    gradients = StepGradients(adapters, config, compute.dtype if autocasts else torch.float32, team)
    model.train()
    with nullcontext() if autocasts else adapters.computing(compute), adapters.training():
        for step in range(config.steps):
            samples, targets = team.together(partial(_read, batches, step))
            sums = gradients.add_up(samples, targets, step)
            # reading the losses waits for a GPU: only now, when it has all its work
            _record(curves, (sums / targets.to(sums.device)).tolist(), step)
            adapters.clip_gradients(config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            team.together(partial(on_step, step + 1))
    return adapters, curves


@dataclass(frozen=True)
class StepGradients:
    """Gradients of steps, pass by pass.

    autocast: dtype of the products in plain torch; float32 where the model is set up as a whole.
    """

    adapters: JointAdapters
    config: ProbeConfig
    autocast: torch.dtype
    team: Team

    def add_up(self, samples: Sequence[TokenBatch], targets: Tensor, step: int) -> Tensor:
        """Collective over the team. Leave the gradients of a step in the adapters' parameters.

        Args:
            samples: b of each of K adapters.
            targets: of all samples of each adapter [K].

        Returns:
            Each adapter's sum of losses [K], nats.
        """
        team, passes = self.team, self.config.passes
        total: Tensor | None = None
        for turn, place in enumerate(team.deal(passes)):
            found = team.compute(partial(self._pass, samples, targets, step * passes + place, place))
            for one in team.each(found, min(team.size, passes - turn * team.size)):
                total = one if total is None else total.add_(one)
        assert total is not None
        return self._take(total)

    def _pass(self, samples: Sequence[TokenBatch], targets: Tensor, number: int, place: int) -> Tensor:
        """Sums of losses and gradients of the pass at ``place`` of its step, one behind the other [K + n]."""
        adapters, size = self.adapters, self.config.samples_per_pass
        device = adapters.parameters()[0].device
        adapters.dropout_step = number
        # a base with dropout of its own draws from the global generator: repeatable, and restored after
        torch.manual_seed(derive_seed(adapters.seeds[0], "base dropout", number))
        rows = slice(place * size, (place + 1) * size)
        batch = TokenBatch.cat([one[rows] for one in samples]).to(device)  # K * size samples
        with _autocast(device, self.autocast):
            losses = sample_losses(adapters.model, batch)
        sums = losses.view(len(samples), -1).sum(dim=1)  # [K]
        (sums / targets.to(device)).sum().backward()
        gradients = [_taken(parameter) for parameter in adapters.parameters()]
        return torch.cat([sums.detach().to(gradients[0].dtype), *gradients])

    def _take(self, total: Tensor) -> Tensor:
        """Give the parameters their gradients; what is left are sums of losses [K]."""
        parameters = self.adapters.parameters()
        sizes = [len(total) - sum(p.numel() for p in parameters), *(p.numel() for p in parameters)]
        sums, *gradients = total.split(sizes)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return sums


def _taken(parameter: Tensor) -> Tensor:
    """Its gradient [n], which it then has no more."""
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.flatten(), None
    return gradient


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _read(batches: Mapping[str, Iterator[TokenBatch]], step: int) -> tuple[list[TokenBatch], Tensor]:
    """The samples of a step of each component, and their targets [K]."""
    found = [next(stream) for stream in batches.values()]
    targets = torch.stack([batch.targets.sum() for batch in found])
    for name, count in zip(batches, targets.tolist(), strict=True):
        if count == 0:
            raise SearchError(
                f"probe `{name}` has no token that counts in the loss at step {step + 1}: raise "
                "search.probes.batch_size"
            )
    return found, targets


def _record(curves: dict[str, list[float]], losses: list[float], step: int) -> None:
    """Losses are the same on all ranks of a team, and so is what they raise."""
    for name, loss in zip(curves, losses, strict=True):
        if not math.isfinite(loss):
            raise SearchError(
                f"probe `{name}` has loss {loss} at step {step + 1}: lower search.probes.lr_multiplier"
            )
        curves[name].append(loss)


def save_probe(
    adapters: JointAdapters,
    name: str,
    curve: list[float],
    folder: Path,
    snapshot: str,
    group_seconds: float,
) -> None:
    """Adapter in PEFT's format, its training curve, and last the marker that makes it count.

    The marker notes the seconds that training the adapter's whole group took, for the ledger.
    """
    files.remove_folder(folder)
    adapters.save_peft(adapters.names.index(name), folder, snapshot)
    files.rewrite_jsonl(folder / CURVE_FILE, ({"step": i, "loss": loss} for i, loss in enumerate(curve, 1)))
    files.mark_complete(folder, {"component": name, "steps": len(curve), "group_seconds": group_seconds})
