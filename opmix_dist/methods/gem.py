"""Gradient episodic memory: steps that raise the loss of no old domain's memory, to first order.

GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840) has a constraint for each memory; averaged GEM (Chaudhry et
al. 2019, arXiv 1812.00420) one, for their mean. The gradient of a memory is that of its mean loss per target.
What is projected is the gradient before clipping; AdamW's moments then average and scale it, so the
constraints hold for the gradient and not for every step of the optimiser.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.single import SingleEngine
from opmix_dist.methods.base import Method, MethodAround, StepWork
from opmix_dist.methods.old_data import old_domains, old_samples
from opmix_dist.methods.projection import dual
from opmix_dist.seeds import derive_seed

PHASE = "memory gradients"
Gradient = dict[str, Tensor]
"""This rank's part of each trained parameter's, by name."""


class GEM(Method):
    """Holds K gradients besides the step's own, or one for averaged GEM."""

    def __init__(self, around: MethodAround) -> None:
        """
        Raises:
            UserError: no old domains.
        """
        super().__init__(around)
        assert isinstance(around.engine, SingleEngine)
        self.config, self.engine = around.config.method.gem, around.engine
        self.domains = old_domains(around, self.config.domains)
        self._violated = 0

    def begin(self, step: int) -> None:
        self.memory = old_samples(self.around, self.domains, self.config.samples_per_domain)

    def prepare(self, step: int, microbatches: Sequence[TokenBatch]) -> StepWork:
        self.around.world.enter(PHASE, step)
        with self.around.ledger.timed(PHASE):
            self._gradients = [self._gradient(name, step) for name in self.domains]
            if self.config.projection == "a_gem":
                self._gradients = [mean_of(self._gradients)]
        self.around.world.enter("training", step)
        return StepWork(microbatches, adjust=self._project)

    def numbers(self) -> dict[str, float]:
        return {"violated": float(self._violated)}

    def _gradient(self, domain: str, step: int) -> Gradient:
        """Collective. Of the mean loss over the domain's memory, or over what this step draws of it."""
        batch, count = self.memory[domain], self.config.samples_per_step
        if count is not None and count < len(batch):
            rng = np.random.default_rng(derive_seed(self.around.config.seed, "gem", domain, step))
            batch = batch[torch.from_numpy(np.sort(rng.permutation(len(batch))[:count]))]
        engine, size = self.engine, self.around.config.train.micro_batch_size
        share = own_share(batch, engine.replica.rank, engine.replica.size)
        tokens = share.tokens.numel() * engine.replica.size
        self.around.ledger.add(PHASE, flops=tokens * engine.train_flops, tokens=tokens)
        return engine.gradient(share.split(size), total=int(batch.targets.sum()))

    def _project(self, gradients: Gradient) -> None:
        with self.around.ledger.timed(PHASE):
            gram, dots = self._products(gradients)
            self._violated = int((dots < 0).sum())
            # what is not finite cannot be projected: the engine refuses the step
            if not (np.isfinite(gram).all() and np.isfinite(dots).all()):
                return
            # the leader's, so that no rank's last digit is another
            shared = self.around.world.share(dual(gram, dots, self.config.margin).tolist())
            for memory, weight in zip(self._gradients, shared, strict=True):
                if weight:
                    for name, slope in memory.items():
                        gradients[name].add_(slope, alpha=weight)

    def _products(self, gradients: Gradient) -> tuple[np.ndarray, np.ndarray]:
        """Collective. M M^T [K, K] and M g [K] of whole gradients, float64."""
        found = []
        for name, slope in gradients.items():
            M = torch.stack([memory[name].flatten() for memory in self._gradients]).double()  # [K, n]
            found.append(M @ torch.cat([M.T, slope.flatten()[:, None].double()], dim=1))
        sums = self.engine.sum_parts(torch.stack(found, dim=-1)).numpy()  # [K, K + 1]
        return sums[:, :-1], sums[:, -1]


def own_share(batch: TokenBatch, rank: int, replicas: int) -> TokenBatch:
    """This replica's rows: equal parts of all, the last of which may end in rows without targets, as all
    replicas make the same passes."""
    size = math.ceil(len(batch) / replicas)
    rows = torch.arange(rank * size, (rank + 1) * size)
    found = batch[rows.clamp(max=len(batch) - 1)]
    return dataclasses.replace(found, loss_mask=found.loss_mask & (rows < len(batch))[:, None])


def mean_of(gradients: Sequence[Gradient]) -> Gradient:
    return {name: torch.stack([g[name] for g in gradients]).mean(dim=0) for name in gradients[0]}
