"""A real engine over a linear model with Gaussian noise: loss 1/2 (w . x - y)^2, one target per sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opmix_dist.config import EngineConfig, RunConfig, check_config
from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import Engine, Replica
from opmix_dist.engines.single import SingleEngine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.ledger import Ledger
from opmix_dist.methods.base import MethodAround
from opmix_dist.models.flops import count_flops
from opmix_dist.models.source import ModelSource
from tests.helpers import tiny_llama_config
from tests.train.jobs import tiny_config


@dataclass(frozen=True)
class Points(TokenBatch):
    """Points x [B, d] with values y [B]; tokens stand for nothing."""

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    y: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Points:
        mask = torch.tensor([[False, True]]).repeat(len(x), 1)
        return cls(torch.zeros(len(x), 2, dtype=torch.int64), mask, None, x.double(), y.double())


class LinearEngine(SingleEngine):
    """Float64, with the passes, hooks, clipping and AdamW of every engine."""

    def __init__(self, w: list[float]) -> None:
        self.world = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))
        self.config, self.max_grad_norm, self.adapters = EngineConfig(), 1e9, None
        self.replica = Replica(0, 1)
        self.model: Any = nn.Linear(len(w), 1, bias=False, dtype=torch.float64)
        self.model.weight.data = torch.tensor([w], dtype=torch.float64)
        self.shapes = {"weight": self.model.weight.shape}
        self.flops = count_flops(ModelSource(tiny_llama_config()).build(), 16)
        self._trained_parameters = [self.model.weight]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def _losses(self, batch: TokenBatch) -> Tensor:
        assert isinstance(batch, Points)
        return 0.5 * (self.model(batch.x)[:, 0] - batch.y).square()

    @property
    def w(self) -> Tensor:
        return self.model.weight.detach()[0].clone()


def config_of(data: Path, run: Path, method: dict[str, Any], **sections: Any) -> RunConfig:
    return check_config(tiny_config(data, run, method=method, **sections))


def around(engine: Engine, config: RunConfig, **others: Any) -> MethodAround:
    """Of an engine that stands alone; ``others`` are fields."""
    given: dict[str, Any] = {
        "source": ModelSource(tiny_llama_config()),
        "catalogue": Catalogue.open(config.data.root, config.data.domains),
        "history": {},
    }
    return MethodAround(
        run=RunDir(config.run_dir), config=config, world=engine.world, engine=engine, ledger=Ledger(1),
        **given | others,
    )  # fmt: skip
