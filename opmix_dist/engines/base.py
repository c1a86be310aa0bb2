"""The Engine interface: what the training loop may ask of whatever holds the model.

Public methods check and document; subclasses implement the underscored ones, so that no engine can forget
a check.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.models.flops import FlopCounts


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is NaN or inf; nothing was applied to the parameters."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step measured.

    sample_losses: [b] float64 on the CPU, this rank's samples in order: nats summed over each one's targets.
    targets: [b] int64 on the CPU, their number; 0 where a sample has none.
    grad_norm: global L2 norm of the gradient before clipping.
    """

    sample_losses: Tensor
    targets: Tensor
    grad_norm: float


class Engine(ABC):
    """Holds model and optimiser over the trainer ranks of ``world``.

    Every method is collective: all trainer ranks call it, in the same order, at the same step.
    """

    world: World
    flops: FlopCounts
    num_parameters: int

    def train_step(self, microbatches: Sequence[TokenBatch], *, lr: float) -> StepResult:
        """One optimiser step on the global batch, of which this rank holds ``microbatches``.

        The gradient is that of the mean loss over all targets of the global batch, however it is divided
        over ranks and micro-batches: samples, micro-batches and ranks may have few of them, or none.

        Args:
            microbatches: b samples of T tokens each, on the CPU; the same number of them on every rank.
            lr: learning rate of this step.

        Raises:
            NonFiniteError: on every rank alike; the parameters are as before the step.
            UserError: on every rank alike; the global batch has no target, and so no mean loss.
        """
        targets = torch.cat([part.targets for part in microbatches])
        total = int(self.world.sum(targets.sum()))
        if total == 0:
            raise UserError(
                "no sample of the global batch has a token that counts in the loss: raise "
                "train.global_batch_size, or prepare the data without such samples"
            )
        result = self._train_step(microbatches, targets, total, lr)
        if not math.isfinite(result.grad_norm):
            raise NonFiniteError(f"the gradient norm is {result.grad_norm}")
        return result

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        """Loss of each held-out sample, summed over its targets: N samples (the same on all ranks) to [N]
        float64, on every rank.

        Rows are divided over ranks in contiguous, equal parts (short parts repeat rows, because sharded
        engines need the same number of forward passes everywhere); sums over ranks put them together.
        """
        losses = torch.zeros(len(batch), dtype=torch.float64)
        share = math.ceil(len(batch) / self.world.size)
        start = self.world.rank * share
        rows = torch.arange(start, start + share).clamp(max=len(batch) - 1)
        mine = self._evaluate(batch[rows], batch_size)
        valid = slice(start, min(start + share, len(batch)))
        losses[valid] = mine[: max(0, valid.stop - valid.start)]
        return self.world.sum(losses)

    @abstractmethod
    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        """``targets`` [b] are those of this rank's samples, ``total`` is their sum over the global batch."""

    @abstractmethod
    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser state in the form that torch DCP saves, resharding included."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, after DCP has filled it."""

    @abstractmethod
    def full_parameters(self) -> dict[str, Tensor] | None:
        """All parameters on the CPU in float32, by HF name, on the leader; None on the others."""

    @abstractmethod
    def save_hf(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads. Leader only, no collective:
        may run in a thread while training goes on, because ``parameters`` are a copy."""
