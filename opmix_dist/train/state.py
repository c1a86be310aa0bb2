"""What a trainer carries from step to step besides the engine: small, JSON, saved by every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from opmix_dist.exchange.schemas import Mixture, PhaseCost, Record

STATE_FILE = "trainer.json"
"""In the folder of a checkpoint."""


class TrainerState(Record):
    step: int = Field(0, ge=0)
    """Finished optimiser steps; the next step has this number."""
    mixture_version: int = Field(0, ge=0)
    weights: Mixture
    domain_tokens: dict[str, int]
    loader: dict[str, Any] = Field(default_factory=dict)
    costs: dict[str, PhaseCost] = Field(default_factory=dict)
    content: dict[str, str]
    """content_sha256 of each domain."""
    engine: str = ""
    """:attr:`~opmix_dist.engines.base.Engine.layout` of the one that trained."""
    optimizer: str = "AdamW"
    """Whose state the checkpoint holds."""
    recent_losses: list[float] = Field(default_factory=list)
    """Of the last steps on this mixture, at most ``train.spike_window``: what a spike stands out from."""
    recent_grad_norms: list[float] = Field(default_factory=list)
    """The same of the gradients' norms."""
    world_size: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)

    def join(self, names: Iterable[str]) -> None:
        """Domains that are new: they join with the first mixture that gives them a weight."""
        for name in names:
            self.domain_tokens.setdefault(name, 0)
            self.weights.setdefault(name, 0.0)

    @property
    def tokens(self) -> int:
        return sum(self.domain_tokens.values())
