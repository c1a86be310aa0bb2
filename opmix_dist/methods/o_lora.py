"""O-LoRA (Wang et al. 2023, Orthogonal subspace learning for language model continual learning, arXiv
2310.14152): each run trains an adapter whose A is pushed to be orthogonal to those of the runs before it.

Earlier adapters are merged into the weights that the run starts from; of each, A [r', d_in] is kept. With
their rows together as P [R, d_in], the penalty of a layer is lambda * sum_ij |(P A^T)_ij|, or of the squares.
Rows of A are penalised one by one, so a rank needs those of its own part only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.history import start_run
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.method_config import LoRAConfig, OLoRAConfig
from opmix_dist.methods.base import Method, MethodAround, StepWork
from opmix_dist.models.peft_files import read_peft

log = logging.getLogger(__name__)


class OLoRA(Method):
    def __init__(self, around: MethodAround) -> None:
        """
        Raises:
            UserError: no ``model.lora``, or an earlier adapter that does not fit the model.
        """
        super().__init__(around)
        if around.config.model.lora is None:
            raise UserError("method.name o_lora trains adapters: set model.lora, or method.name to another")
        assert isinstance(around.engine, SingleEngine)
        self.config, self.engine = around.config.method.o_lora, around.engine
        self.earlier = self._read_earlier()
        self._values: Tensor | None = None
        """Penalty on this rank's part of each parameter at the last step, [P]."""

    def prepare(self, step: int, microbatches: Sequence[TokenBatch]) -> StepWork:
        self._step = step
        return StepWork(microbatches, adjust=self._add_penalty if self.earlier else None)

    def numbers(self) -> dict[str, float]:
        """Every ``train.log_interval_steps``, as it takes a collective."""
        if self._values is None or (self._step + 1) % self.around.config.train.log_interval_steps:
            return {}
        return {"penalty": float(self.engine.sum_parts(self._values))}

    def _add_penalty(self, gradients: dict[str, Tensor]) -> None:
        with self.around.ledger.timed("penalty"):
            values, flops = [], 0.0
            for name, part in self.engine.parts().items():
                value = part.new_zeros(())
                if name in self.earlier:
                    P = self.earlier[name]
                    value, slope = overlap(P, part, self.config)
                    gradients[name].add_(slope)
                    flops += 4.0 * len(P) * self.engine.trained[name].numel()  # P A^T, and its gradient
                values.append(value)
            self._values = torch.stack(values)
        self.around.ledger.add("penalty", flops=flops)

    def _read_earlier(self) -> dict[str, Tensor]:
        """P of each adapted layer, by the name of its A."""
        adapters = self.engine.adapters
        assert adapters is not None
        found: dict[str, list[Tensor]] = {}
        for run, lora in adapted_runs(self.around):
            shapes = {
                name: (
                    torch.Size([lora.rank, layer.in_features]),
                    torch.Size([layer.out_features, lora.rank]),
                )
                for name, layer in adapters.layers.items()
            }
            for name, (A, _) in read_peft(run.adapter, shapes).items():
                found.setdefault(f"{name}.lora_A", []).append(A)
        if not found and self.around.world.is_leader:
            log.info("method.name o_lora: no run before this one has an adapter, so nothing is penalised")
        parts = self.engine.parts()
        return {name: torch.cat(As).to(parts[name]) for name, As in found.items()}


def adapted_runs(around: MethodAround) -> Iterator[tuple[RunDir, LoRAConfig]]:
    """The runs that this one came from, the last first, back to one that trained all parameters: directions
    from before it have no meaning for what it has made of them.

    Raises:
        UserError: a run that is not there, or whose adapter was never finished.
    """
    run = start_run(around.config)
    while run is not None:
        config = run.config()
        if config.model.lora is None:
            return
        files.require_complete(run.adapter, "the adapter")
        yield run, config.model.lora
        run = start_run(config)


def overlap(P: Tensor, A: Tensor, config: OLoRAConfig) -> tuple[Tensor, Tensor]:
    """The penalty on rows of A [r, d_in] and its gradient [r, d_in], given P [R, d_in]."""
    products = P @ A.T  # [R, r]
    if config.overlap == "absolute":
        return config.strength * products.abs().sum(), config.strength * (products.sign().T @ P)
    return config.strength * products.square().sum(), 2 * config.strength * (products.T @ P)
