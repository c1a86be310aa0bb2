"""The settings of ``opmix validate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from opmix_dist.config import ScheduleConfig
from opmix_dist.search_config import Count, InterpolationName, ProbeConfig
from opmix_dist.settings import Section, check_settings, read_settings

VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]
RESERVED = ("snapshot", "probes", "full")
"""Simulators that are there without being asked for."""


class DesignConfig(Section):
    mixtures: int = Field(
        8, ge=0, description="points of a scrambled Sobol sequence over the components' coefficients"
    )
    seed: int = Field(0, ge=0, description="of that sequence")
    components: bool = Field(True, description="train on each component's own mixture too, `old` among them")
    averages: bool = Field(
        True, description="simulate `old`'s mixture by averages of the domains' probes too (rebalance)"
    )


class RealConfig(Section):
    start: Literal["snapshot", "checkpoint"] = Field(
        "snapshot",
        description="snapshot: fresh moments, data order and schedule as set here; checkpoint: moments, data "
        "order, batch and learning rates of the run itself, from its checkpoint at the search's step",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="of the data order; each mixture is trained once for each"
    )
    steps: Count | None = Field(None, description="of a real run; null: as many tokens as a probe has read")
    batch_size: Count | None = Field(None, description="samples per step; null: search.probes.batch_size")
    micro_batch_size: Count | None = Field(
        None, description="samples per forward pass; null: train.micro_batch_size where it divides, else all"
    )
    lr_multiplier: float = Field(1.0, gt=0, description="learning rate over optimizer.lr")
    schedule: ScheduleConfig = ScheduleConfig(name="constant")

    @model_validator(mode="after")
    def _consistent(self) -> RealConfig:
        if len({*self.seeds}) != len(self.seeds):
            raise ValueError("real.seeds must differ")
        if self.start == "checkpoint":
            if len(self.seeds) > 1:
                raise ValueError(
                    "real.seeds: with real.start checkpoint there is one data order, give one seed"
                )
            if self.batch_size is not None or self.micro_batch_size is not None or self.lr_multiplier != 1:
                raise ValueError(
                    "real.start checkpoint takes batch and learning rates of the run: leave real.batch_size, "
                    "real.micro_batch_size and real.lr_multiplier out"
                )
        return self


class VariantConfig(Section):
    """Another way to simulate the same search: other probes, or its own put together in another way. What is
    null is as in the search."""

    steps: Count | None = Field(None, description="optimiser steps of each probe")
    rank: Count | None = Field(None, description="LoRA rank; alpha follows, so that alpha / rank stays")
    lr_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="probe learning rate over optimizer.lr"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout on each adapter's input"
    )
    interpolation: InterpolationName | None = Field(
        None, description="as of search.candidates.interpolation; alone, it takes the search's own probes"
    )

    def probes(self, of_search: ProbeConfig) -> ProbeConfig:
        """The search's settings with what is set here in their place."""
        changed = {
            name: value
            for name, value in self.model_dump(exclude={"interpolation"}).items()
            if value is not None
        }
        if self.rank is not None:
            changed["alpha"] = max(1, round(of_search.alpha * self.rank / of_search.rank))
        return ProbeConfig(**{**of_search.model_dump(), **changed})


class ValidateConfig(Section):
    search: str | None = Field(None, description="search to validate, such as 0001; null: the last finished")
    folder: str | None = Field(None, description="folder of the results; null: RUN/validation/SEARCH")
    design: DesignConfig = DesignConfig()
    real: RealConfig = RealConfig()
    full_parameters: bool = Field(
        True,
        description="simulate with full-parameter deltas of the components' real runs too: what is left of "
        "the gap then is that of averaging, and not of LoRA",
    )
    sweep: dict[VariantName, VariantConfig] = Field(
        default_factory=dict, description="other probes to compare, by a name of yours"
    )
    evaluation_batch_size: int = Field(8, ge=1, description="held-out samples per forward pass")
    kl: bool = Field(True, description="compare token distributions, not only losses")
    calibration: Literal["best", "none", "shift", "slope", "affine", "averaging"] = Field(
        "best", description="correction to write; best: of the least cross-validated error of differences"
    )
    ranks_per_model: int = Field(
        1, ge=1, description="1: mixtures are dealt out to the ranks; all ranks: the run's engine on all"
    )
    keep_models: bool = Field(False, description="keep the models of the real runs when all is compared")

    @model_validator(mode="after")
    def _names(self) -> ValidateConfig:
        for name in self.sweep:
            if name in RESERVED:
                raise ValueError(f"sweep.{name}: the name is taken, choose another")
        if self.full_parameters and not self.design.components:
            raise ValueError("full_parameters needs the components' real runs: set design.components")
        return self


def load_validate_config(path: Path | None, overrides: Sequence[str] = ()) -> ValidateConfig:
    """Read a YAML file, if any, apply dotted overrides and check; UserError as ``check_settings``."""
    return check_settings(ValidateConfig, read_settings(path, overrides))
