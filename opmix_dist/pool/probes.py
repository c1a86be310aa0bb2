"""Training the probes: one LoRA adapter per component, jointly on one frozen base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from opmix_dist.pool.errors import SearchError
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
) -> tuple[JointAdapters, dict[str, list[float]]]:
    """Train one adapter per entry of ``batches``, each as if it were alone.

    The loss is the sum over adapters of each one's own mean over its targets; A and B have no parameter in
    common, so each adapter sees its own gradient only. AdamW is elementwise and clipping goes by each
    adapter's own norm: the result equals separate runs to float tolerance.

    Args:
        batches: component to an endless iterator of b samples of T tokens, the same b and T for all.
        base_lr: the trainer's base learning rate; probes use ``lr_multiplier`` times it, constant.
        seeds: component to the seed of its initial A and its dropout.
        compute: dtype of the matrix products, by autocast in plain torch, and whether Triton kernels do them.

    Returns:
        The adapters, injected in ``model``, and each component's training loss per step (nats per token).

    Raises:
        SearchError: naming the probe and the step whose loss is NaN or inf, or whose samples have no target.
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
    device = next(model.parameters()).device
    curves: dict[str, list[float]] = {name: [] for name in names}
    model.train()
    with adapters.computing(compute) if compute.kernels else nullcontext(), adapters.training():
        for step in range(config.steps):
            adapters.dropout_step = step
            # a base with dropout of its own draws from the global generator: repeatable, and restored after
            torch.manual_seed(derive_seed(seeds[names[0]], "base dropout", step))
            batch = TokenBatch.cat([next(batches[name]) for name in names])  # K * b samples
            targets = _targets(batch, names, step).to(device)
            with _forward_arithmetic(compute, device):
                sums = sample_losses(model, batch.to(device))  # [K * b]
            means = sums.view(len(names), -1).sum(dim=1) / targets  # [K]
            means.sum().backward()
            # reading the losses waits for a GPU: only now, when it has all its work
            _record(curves, names, means.tolist(), step)
            adapters.clip_gradients(config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(step + 1)
    return adapters, curves


def _forward_arithmetic(compute: Compute, device: torch.device) -> AbstractContextManager[object]:
    """Autocast for plain torch in 16 bits. Where kernels compute, the model is set up for it as a whole."""
    if compute.kernels or compute.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, compute.dtype)


def _targets(batch: TokenBatch, names: list[str], step: int) -> Tensor:
    """Targets of each component's samples, [K]."""
    targets = batch.targets.view(len(names), -1).sum(dim=1)
    for name, count in zip(names, targets.tolist(), strict=True):
        if count == 0:
            raise SearchError(
                f"probe `{name}` has no token that counts in the loss at step {step + 1}: raise "
                "search.probes.batch_size"
            )
    return targets


def _record(curves: dict[str, list[float]], names: list[str], losses: list[float], step: int) -> None:
    for name, loss in zip(names, losses, strict=True):
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
