"""The Engine interface: what the training loop may ask of whatever holds the model.

Public methods check and document; subclasses implement the underscored ones, so that no engine can forget
a check. Whatever leaves or enters an engine has Hugging Face names and whole shapes, or torch's own sharded
tensors of these: a checkpoint, a snapshot or an export does not tell which engine wrote it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from opmix_dist.config import EngineConfig, RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.held import HeldBytes
from opmix_dist.errors import UserError
from opmix_dist.faults.points import spoiled
from opmix_dist.models.flops import FlopCounts

Kind = Literal["parameter", "exp_avg", "exp_avg_sq"]
"""A parameter in float32, or one of AdamW's two moments of it."""
KINDS: tuple[Kind, ...] = ("parameter", "exp_avg", "exp_avg_sq")
BatchLoss = Callable[[nn.Module, TokenBatch], Tensor]
"""The model and samples on its device to each one's loss, summed over its targets, [B] with a gradient."""
AdjustGradients = Callable[[dict[str, Tensor]], None]
"""Changes a step's gradient in place, before it is clipped: this rank's part of each trained parameter's, by
name, which is that of the mean loss over all targets of the global batch. Collective."""


class BadStepError(RuntimeError):
    """A step that was not applied: parameters, moments and AdamW's step count are as before it.

    Args:
        losses: [b] float64 on the CPU, as :class:`StepResult` has them.
        targets: [b] int64 on the CPU.
    """

    def __init__(self, reason: str, losses: Tensor, targets: Tensor) -> None:
        super().__init__(reason)
        self.losses, self.targets = losses, targets


class NonFiniteError(BadStepError):
    """A loss or the gradient norm is NaN or inf."""


class LossSpikeError(BadStepError):
    """The loss is above the limit."""


class GradientSpikeError(BadStepError):
    """The gradient's norm is above the limit."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step measured.

    sample_losses: [b] float64 on the CPU, this replica's samples in order: nats summed over each one's
        targets. On ranks that do not count (:class:`Replica`) they may be zeros.
    targets: [b] int64 on the CPU, their number; 0 where a sample has none.
    grad_norm: global L2 norm of the gradient before clipping, on every rank.
    """

    sample_losses: Tensor
    targets: Tensor
    grad_norm: float


@dataclass(frozen=True)
class Replica:
    """The copy of the model that this rank holds, or a part of by tensor or pipeline parallelism.

    rank, size: among the replicas, which divide the global batch.
    counts: true on exactly one rank of each replica: the one whose losses enter sums over the global batch.
    """

    rank: int
    size: int
    counts: bool = True


class Engine(ABC):
    """Holds model and optimiser over the trainer ranks of ``world``.

    Every method is collective: all trainer ranks call it, in the same order, at the same step.

    shapes: of the parameters, by Hugging Face name; tied ones once, under the name that comes first.
    hf_config: of the model.
    optimizer_name: whose state it has; one that has another's starts with a checkpoint's parameters only.
    """

    optimizer_name = "AdamW"
    takes_methods = False
    """Whether :meth:`train_step` can be given another loss, and gradients be changed."""

    world: World
    config: EngineConfig
    replica: Replica
    flops: FlopCounts
    shapes: dict[str, torch.Size]
    hf_config: PretrainedConfig
    beside: Mapping[str, Tensor] = MappingProxyType({})
    """What a training method keeps from step to step, by name: saved with the state, and filled when one is
    loaded. On engines that take methods; DTensors, or whole tensors that are the same on all ranks."""
    _loss_limit: float = math.inf
    """Of the step under way, nats per target."""
    _norm_limit: float = math.inf
    """Of the step under way: of the gradient before it is clipped."""
    _batch_loss: BatchLoss | None = None
    """Of the passes under way; None: cross-entropy."""
    _adjust: AdjustGradients | None = None
    """Of the step under way."""

    @classmethod  # noqa: B027  (most engines have nothing to check)
    def check(cls, config: RunConfig, ranks: int) -> None:
        """Called before anything is built.

        Args:
            ranks: of the trainers.

        Raises:
            UserError: settings of the engine contradict others of the run.
        """

    @property
    @abstractmethod
    def layout(self) -> str:
        """Its name in the configuration and how it divides the model, for the log and for checkpoints."""

    @property
    def trained(self) -> dict[str, torch.Size]:
        """Shapes of the parameters that AdamW changes and checkpoints hold, by name: all of the model's, or
        adapters beside them."""
        return self.shapes

    @property
    def train_flops(self) -> float:
        """Model FLOPs of a training step, per token."""
        return self.flops.train()

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @abstractmethod
    def held_bytes(self) -> HeldBytes:
        """What this rank holds between steps, and gradients. Not collective."""

    def recomputed_flops(self, tokens: int) -> float:
        """FLOPs per token that a training step computes a second time, to hold less.

        Args:
            tokens: of a micro-batch.
        """
        return self.flops.recomputed(self.config.activation_checkpointing)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the replicas, on every rank."""
        return self.world.sum(values if self.replica.counts else torch.zeros_like(values))

    def train_step(
        self,
        microbatches: Sequence[TokenBatch],
        *,
        lr: float,
        loss_limit: float = math.inf,
        norm_limit: float = math.inf,
        loss: BatchLoss | None = None,
        adjust: AdjustGradients | None = None,
    ) -> StepResult:
        """One optimiser step on the global batch, of which this replica holds ``microbatches``.

        The gradient is that of the mean loss over all targets of the global batch, however it is divided
        over replicas and micro-batches: samples, micro-batches and replicas may have few of them, or none.

        Args:
            microbatches: b samples of T tokens each, on the CPU; the same number of them on every rank, and
                the same samples on all ranks of a replica.
            lr: learning rate of this step.
            loss_limit: the step is not applied where the mean loss over all targets is above it.
            norm_limit: the same for the global norm of the gradient before it is clipped.
            loss: in place of the cross-entropy, in units that are summed over targets like nats.
            adjust: changes the gradient.

        Raises:
            NonFiniteError, LossSpikeError, GradientSpikeError: on every rank alike; the parameters are as
                before the step.
            UserError: on every rank alike; the global batch has no target, and so no mean loss.
        """
        targets = torch.cat([part.targets for part in microbatches])
        total = int(self.sum(targets.sum()))
        if total == 0:
            raise UserError(
                "no sample of the global batch has a token that counts in the loss: raise "
                "train.global_batch_size, or prepare the data without such samples"
            )
        assert self.takes_methods or (loss is None and adjust is None), "RunConfig refuses such methods"
        self._loss_limit, self._norm_limit = loss_limit, norm_limit
        self._batch_loss, self._adjust = loss, adjust
        try:
            result = self._train_step(
                microbatches, targets, spoiled("train.gradient", total, step=lambda: self.optimizer_steps), lr
            )
        finally:
            self._batch_loss = self._adjust = None
        if not math.isfinite(result.grad_norm):
            raise NonFiniteError(f"the gradient norm is {result.grad_norm}", result.sample_losses, targets)
        if result.grad_norm > norm_limit:
            reason = f"the gradient norm is {result.grad_norm:.4g}, above the limit of {norm_limit:.4g}"
            raise GradientSpikeError(reason, result.sample_losses, targets)
        return result

    def _require_good(self, result: StepResult, checks: Tensor, total: float) -> None:
        """Engines call it when nothing of a step is applied, or was.

        Args:
            checks: :func:`loss_checks`, summed over the replicas, on the CPU.
            total: number of targets of the global batch.

        Raises:
            NonFiniteError, LossSpikeError: on every rank alike.
        """
        bad, nats = checks.tolist()
        if bad:
            reason = f"{bad:.0f} training samples of the global batch have a NaN or inf loss"
            raise NonFiniteError(reason, result.sample_losses, result.targets)
        if nats / total > self._loss_limit:
            reason = f"the loss is {nats / total:.4f}, above the limit of {self._loss_limit:.4f}"
            raise LossSpikeError(reason, result.sample_losses, result.targets)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        """Loss of each held-out sample, summed over its targets: N samples (the same on all ranks) to [N]
        float64, on every rank.

        Rows are divided over replicas in contiguous, equal parts (short parts repeat rows, because sharded
        engines need the same number of forward passes everywhere); sums over replicas put them together.
        """
        losses = torch.zeros(len(batch), dtype=torch.float64)
        share = math.ceil(len(batch) / self.replica.size)
        start = self.replica.rank * share
        rows = torch.arange(start, start + share).clamp(max=len(batch) - 1)
        mine = self._evaluate(batch[rows], batch_size)
        valid = slice(start, min(start + share, len(batch)))
        losses[valid] = mine[: max(0, valid.stop - valid.start)]
        return self.sum(losses)

    def share(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """This rank's share of the parameters: whole, copied to the CPU, by name, with adapters merged into
        them; every parameter is in the share of exactly one rank (:func:`owners`). No rank holds the whole
        model at any time."""
        mine = owners(self.shapes, self.world.size)
        return {
            name: tensor.detach().to("cpu", dtype, copy=True)
            for name, tensor in self._merged()
            if mine[name] == self.world.rank
        }

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters of the model in the order of ``shapes``, with adapters merged into them, one at a
        time, on every rank; float32, on any device. Not to be changed."""
        return self._merged()

    def state_dict(self) -> dict[str, Any]:
        """What torch DCP saves: ``{"parameter": {name: tensor}, "exp_avg": ..., "exp_avg_sq": ..., "step":
        [1] int64}``, and ``beside`` where there is any; tensors are DTensors, or whole and then on the rank
        of :func:`owners` only."""
        state: dict[str, Any] = {"step": torch.tensor([self.optimizer_steps])}
        if self.beside:
            state["beside"] = dict(self.beside)
        return state | {kind: self._state(kind) for kind in KINDS}

    def load_state(
        self, read: Callable[[dict[str, Any]], None], *, optimizer: bool = True, beside: bool = True
    ) -> None:
        """Take over a state of any engine.

        Args:
            read: fills tensors that have the places of :meth:`state_dict` from the checkpoint; collective.
                Asked for a part of the state at a time.
            optimizer: false: parameters only; AdamW starts anew.
            beside: false: what is ``beside`` stays as it is.
        """
        for kind in KINDS if optimizer else KINDS[:1]:
            self._load(kind, read)
        if optimizer:
            step = torch.zeros(1, dtype=torch.int64)
            read({"step": step})
            self.optimizer_steps = int(step)
        if self.beside and beside:
            read({"beside": dict(self.beside)})
        self._after_loading()

    def save_beside(self, folder: Path) -> None:  # noqa: B027  (most engines have no files of their own)
        """Write what the engine itself wants to have in the folder of a checkpoint: no resume reads it."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Steps that AdamW has made, for its bias correction."""

    @optimizer_steps.setter
    @abstractmethod
    def optimizer_steps(self, steps: int) -> None: ...

    @abstractmethod
    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        """``targets`` [b] are those of this replica's samples, ``total`` is their sum over the global
        batch."""

    @abstractmethod
    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        """Loss sums [N] float64 on the CPU of this replica's rows, where it counts."""

    @abstractmethod
    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of all trained parameters in the order of ``trained``, one at a time, on every rank;
        float32, on any device. A moment that AdamW has not made yet is zeros."""

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters of the model in the order of ``shapes``, as :meth:`_whole` gives them."""
        return self._whole("parameter")

    @abstractmethod
    def _set_whole(self, kind: Kind, name: str, tensor: Tensor) -> None:
        """Take this rank's part of a whole float32 tensor on the CPU."""

    def _state(self, kind: Kind) -> dict[str, Tensor]:
        """What DCP saves of all parameters; of engines whose tensors it can divide itself, these."""
        mine = owners(self.trained, self.world.size)
        whole = self._whole(kind)
        return {n: t.detach().cpu().clone() for n, t in whole if mine[n] == self.world.rank}

    def _load(self, kind: Kind, read: Callable[[dict[str, Any]], None]) -> None:
        """Fill all parameters' tensors by ``read``."""
        for names in _parts(self.trained):
            part = {name: torch.empty(self.trained[name]) for name in names}
            read({kind: part})
            for name, tensor in part.items():
                self._set_whole(kind, name, tensor)

    def _after_loading(self) -> None:  # noqa: B027  (most engines keep one copy)
        """All of :meth:`_set_whole` is done: copies in other dtypes may be made."""


def loss_checks(losses: Tensor) -> Tensor:
    """What is summed over replicas to know whether a step is good: of losses [b], how many are not finite,
    and the sum of the others, [2] float64."""
    finite = losses.isfinite()
    return torch.stack([(~finite).sum().double(), torch.where(finite, losses, 0).double().sum()])


def owners(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, int]:
    """Which rank holds which parameter in :meth:`Engine.share`: the one with the fewest numbers so far."""
    loads = [0] * ranks
    found = {}
    for name, shape in shapes.items():
        found[name] = loads.index(min(loads))
        loads[found[name]] += shape.numel()
    return found


_PART_NUMBERS = 1 << 28
"""Numbers of a checkpoint that are read at a time: 1 GiB of float32."""


def _parts(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() > _PART_NUMBERS:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel()
    yield names
