"""The data of a run: which domains it reads, at which weights, and how much of each it has drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opmix_dist.config import DataConfig
from opmix_dist.data.build import open_data
from opmix_dist.data.caps import EpochCaps
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.seeds import derive_seed
from opmix_dist.train.state import STATE_FILE, TrainerState


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn of one domain up to its newest checkpoint."""

    samples: int
    epochs: float
    share: float
    """Of all samples that were drawn; 0 when there are none."""


@dataclass(frozen=True)
class RunData:
    """A run's mixture and its past, by domain."""

    weights: dict[str, float]
    """Of the newest decision; a domain that is not named weighs 0."""
    step: int | None
    """Of the newest checkpoint; None: there is none, and nothing is known to be drawn."""
    drawn: dict[str, Drawn]
    allowed: dict[str, int]
    """Samples that ``data.max_epochs`` lets the run draw, of the domains that have a cap."""


def is_run(path: Path) -> bool:
    return RunDir(path).config_file.is_file()


def run_domains(run: RunDir, config: DataConfig) -> list[str] | None:
    """Those of the configuration and those that joined later, in that order; None: all of the folder."""
    if config.domains is None:
        return None
    joined = [name for record in run.mixtures() for name in record.weights]
    return list(dict.fromkeys([*config.domains, *joined]))


def open_run_data(run: RunDir, config: DataConfig, domains: Sequence[str] | None = None) -> Catalogue:
    """The catalogue that a run reads.

    Args:
        config: the run's, or with another root or cache.
        domains: names; None takes those of the run.

    Raises:
        UserError: the data cannot be opened.
    """
    return open_data(config, run_domains(run, config) if domains is None else domains)


def read_run_data(run: RunDir, catalogue: Catalogue) -> RunData:
    """Weights and counts of the run's domains.

    Raises:
        UserError: a file of the run is invalid, or its state is one of other data.
    """
    records = run.mixtures()
    weights = records[-1].weights if records else {}
    allowed = _allowed(run.config().data, catalogue)
    step = max(run.complete_checkpoints(), default=None)
    if step is None:
        return RunData(weights, None, {}, allowed)
    state = read_record(run.checkpoint(step) / STATE_FILE, TrainerState)
    return RunData(weights or state.weights, step, _drawn(run, catalogue, state), allowed)


def _allowed(config: DataConfig, catalogue: Catalogue) -> dict[str, int]:
    capped = config.epochs_by_domain(catalogue.names)
    caps = EpochCaps(catalogue.names, catalogue.samples("train"), capped, on_exhausted=config.on_exhausted)
    by_name = zip(catalogue.names, caps.samples.tolist(), strict=True)
    return {name: int(samples) for name, samples in by_name if math.isfinite(samples)}


def _drawn(run: RunDir, catalogue: Catalogue, state: TrainerState) -> dict[str, Drawn]:
    config = run.config()
    sizes = {
        name: ShardedSplit(catalogue.split_dir(name, "train"), catalogue.store).shard_sizes
        for name in catalogue.names
    }
    if missing := sorted(name for name, weight in state.weights.items() if weight and name not in sizes):
        raise UserError(f"{catalogue.root} has no domain {missing[0]!r}, which the run draws: restore it")
    sampler = MixtureSampler(
        sizes,
        {name: weight for name, weight in state.weights.items() if name in sizes},
        global_batch_size=state.global_batch_size,
        seed=derive_seed(config.seed, "data"),
        shuffle_block=config.data.shuffle_block,
    )
    sampler.load_state_dict(state.loader)
    counts, epochs = sampler.position.drawn, sampler.epochs()
    total = max(1, int(counts.sum()))
    return {
        name: Drawn(int(counts[i]), float(epochs[i]), int(counts[i]) / total)
        for i, name in enumerate(sampler.names)
    }
