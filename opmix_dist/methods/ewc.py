"""Elastic weight consolidation (Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural
networks, arXiv 1612.00796, equation 3), with a diagonal Fisher information.

F = sum_i g_i^2 / sum_i n_i over samples i of the old data with n_i targets, where g_i is the gradient of the
log-likelihood of all targets of the sample: information per token, as the loss is nats per token. Given
N_old tokens were read before and N_new will be, lambda = N_old / N_new weighs both as the paper's posterior
does.

Of several earlier runs each has a penalty of its own, around its own end, which together are one quadratic;
or, online (Schwarz et al. 2018, Progress & Compress, arXiv 1805.06370), one around the last end, with earlier
information times ``decay``.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.base import BatchLoss
from opmix_dist.errors import UserError
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.importance import ImportanceMethod
from opmix_dist.models.loss import target_logits
from opmix_dist.seeds import derive_seed


class EWC(ImportanceMethod):
    def __init__(self, around: MethodAround) -> None:
        self.config = self.settings = around.config.method.ewc
        self.decay = self.config.decay
        if self.config.fisher == "sampled" and around.config.engine.fsdp.tensor_parallel > 1:
            raise UserError(
                "method.ewc.fisher sampled reads whole logits, and engine.fsdp.tensor_parallel divides the "
                "head: set it to 1, or fisher to empirical"
            )
        super().__init__(around)

    @property
    def _kept_settings(self) -> dict[str, str]:
        return {"fisher": self.config.fisher}

    def measure(self, samples: TokenBatch) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(part) for name, part in self.engine.parts().items()}
        for slopes in self.slopes(samples, self._loss):
            for name, slope in slopes.items():
                found[name].addcmul_(slope, slope)
        total = int(samples.targets.sum())
        return {name: squares / total for name, squares in found.items()}

    def _loss(self, row: int) -> BatchLoss | None:
        """Minus the log-likelihood of the labels of a sample."""
        if self.config.fisher == "empirical":
            return None
        return partial(sampled_losses, seed=derive_seed(self.around.config.seed, "fisher", row))


def sampled_losses(model: nn.Module, batch: TokenBatch, *, seed: int) -> Tensor:
    """Sums [B] of the cross-entropies of labels that the model itself samples at each target's place."""
    logits = target_logits(cast(PreTrainedModel, model), batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [R, V]
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels = torch.multinomial(logits.detach().softmax(dim=1), 1, generator=generator)[:, 0]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return sums_of_samples(losses, batch)


def sums_of_samples(values: Tensor, batch: TokenBatch) -> Tensor:
    """Of each target's value [R], sample after sample: [B]."""
    rows = torch.repeat_interleave(batch.targets)
    return values.new_zeros(len(batch)).index_add(0, rows, values)
