"""Memory aware synapses (Aljundi et al. 2018, arXiv 1711.09601): what the model's outputs are sensitive to.

The importance of a parameter is the mean over samples of |d ||f(x)||^2 / d theta|, where ||f(x)||^2 is the
squared norm of the logits, averaged over the places that predict a target. Labels play no part. Importances
of earlier runs are added, and all of the penalty pulls towards this run's start, as in the paper.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.errors import UserError
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.ewc import sums_of_samples
from opmix_dist.methods.importance import ImportanceMethod
from opmix_dist.models.loss import target_logits


class MAS(ImportanceMethod):
    decay = 1.0

    def __init__(self, around: MethodAround) -> None:
        self.settings = around.config.method.mas
        if around.config.engine.fsdp.tensor_parallel > 1:
            raise UserError(
                "method.name mas reads whole logits, and engine.fsdp.tensor_parallel divides the head: set "
                "that to 1"
            )
        super().__init__(around)

    def measure(self, samples: TokenBatch) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(part) for name, part in self.engine.parts().items()}
        for slopes in self.slopes(samples, lambda row: squared_norms):
            for name, slope in slopes.items():
                found[name].add_(slope.abs())
        return {name: total / len(samples) for name, total in found.items()}


def squared_norms(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean of ||f||^2 over the places that predict a target, of each sample [B]."""
    logits = target_logits(cast(PreTrainedModel, model), batch)
    squares = logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum(dim=1)  # [R]
    return sums_of_samples(squares, batch) / batch.targets.clamp(min=1)
