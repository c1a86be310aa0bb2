"""What is fitted and what is asked for, from the tables and the settings: arrays in one order of domains."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from opmix_dist.errors import UserError
from opmix_dist.fit.config import FitConfig
from opmix_dist.fit.tables import Swarm, Table, join, read_table
from opmix_dist.search.proposal import repetition_caps

SUM_TOLERANCE = 0.01
"""On shares that people wrote down; what is off by less is divided out."""


@dataclass(frozen=True)
class Inputs:
    """fitted, held_out: runs to fit, and runs to test the fit, where some are held out.

    prior: [X], a mixture; current: [X], the mixture in use, where it is known; omega: weights of the losses
    [D], None: 1/D each; floors, caps: [X]; reference: losses of the current model [D], where they were given;
    max_increase: [D], inf where a loss may rise freely.
    """

    fitted: Swarm
    held_out: Swarm | None
    prior: np.ndarray
    current: np.ndarray | None
    omega: np.ndarray | None
    floors: np.ndarray
    caps: np.ndarray
    reference: np.ndarray | None
    max_increase: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        return self.fitted.domains

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.fitted.metrics


def read_inputs(config: FitConfig) -> Inputs:
    """Read both tables and bring the settings into their order.

    Raises:
        UserError: as ``read_table`` and ``join``; settings that name no domain or metric of the tables, that
            leave one out, or are no mixture; more runs held out than there are.
    """
    columns = config.columns.resolved()
    ratios = read_table(Path(config.swarm.ratios), run_column=columns.run, prefix=columns.ratio_prefix)
    metrics = read_table(
        Path(config.swarm.metrics),
        run_column=columns.run,
        prefix=columns.metric_prefix,
        suffix=columns.metric_suffix,
    )
    swarm = join(ratios, choose_metrics(metrics, config))
    fitted, held_out = split(swarm, config)
    notes = list(swarm.notes)
    return Inputs(
        fitted,
        held_out,
        prior=_prior(config, swarm.domains, notes),
        current=_current(config, swarm.domains),
        omega=_omega(config, swarm.metrics, metrics.names, notes),
        floors=_by_name(config.bounds.floors, swarm.domains, "bounds.floors", "domain", 0.0),
        caps=_caps(config, swarm.domains),
        reference=_reference(config, swarm.metrics),
        max_increase=_max_increase(config, swarm.metrics),
        notes=tuple(notes),
    )


def choose_metrics(table: Table, config: FitConfig) -> Table:
    """The columns that count, or their means by family.

    Dropped ones are in no mean: unlike in olmix, which drops after it has taken the means.
    """
    families = config.eval.families()
    for family, names in families.items():
        for name in names:
            _require_known(name, table.names, f"eval.tasks.{family}", f"column of {table.path}")
    dropped = set(config.filtering.drop_metrics)
    known = {*table.names, *families}
    notes = [
        f"filtering.drop_metrics: {name} is no metric of {table.path}"
        for name in config.filtering.drop_metrics
        if name not in known
    ]
    listed = [name for names in families.values() for name in names] or table.names
    columns = {name: table.column(name) for name in listed if name not in dropped}
    if config.regression.aggregate_task_families and not families:
        notes.append("regression.aggregate_task_families: eval.tasks names no family, so each metric counts")
    elif config.regression.aggregate_task_families:
        columns = {
            family: np.mean([columns[name] for name in names if name in columns], axis=0)
            for family, names in families.items()
            if family not in dropped and any(name in columns for name in names)
        }
    if sum(name.startswith("mmlu_") for name in columns) > 1 and "mmlu_stem" not in table.names:
        notes.append("each MMLU subject counts as a metric of its own; olmix merges them into 4 first")
    if not columns:
        raise UserError("filtering.drop_metrics leaves no metric to fit")
    return table.with_columns(columns, notes)


def split(swarm: Swarm, config: FitConfig) -> tuple[Swarm, Swarm | None]:
    """Runs to fit and runs that are held out; drawn as olmix draws them, by scikit-learn and the seed."""
    settings, rows = config.regression, np.arange(len(swarm.runs))
    held_out = None
    if settings.n_test:
        if settings.n_test >= len(rows):
            raise UserError(f"regression.n_test holds {settings.n_test} runs out, and there are {len(rows)}")
        rows, test = train_test_split(rows, test_size=settings.n_test / len(rows), random_state=settings.seed)
        held_out = _rows(swarm, test)
    share = settings.train_split
    if share != 1 and share != len(rows):
        if share > len(rows):
            raise UserError(f"regression.train_split is {share:g}, and there are {len(rows)} runs to fit")
        size = int(share) if share > 1 else share
        rows, _ = train_test_split(rows, train_size=size, random_state=settings.seed)
    return _rows(swarm, rows), held_out


def _rows(swarm: Swarm, rows: np.ndarray) -> Swarm:
    runs = tuple(swarm.runs[row] for row in rows)
    return Swarm(runs, swarm.domains, swarm.metrics, swarm.ratios[rows], swarm.losses[rows])


def _prior(config: FitConfig, domains: tuple[str, ...], notes: list[str]) -> np.ndarray:
    sizes = config.priors.relative_sizes
    if sizes is None:
        return np.full(len(domains), 1 / len(domains))
    prior = np.array([_share_of(name, sizes, "priors.relative_sizes") for name in domains])
    foreign = [name for name in sizes if name not in domains]
    if foreign:
        notes.append(f"priors.relative_sizes: left out, as no domain of the ratios: {', '.join(foreign)}")
    if not prior.sum():
        raise UserError("priors.relative_sizes are all 0")
    if abs(prior.sum() - 1) > SUM_TOLERANCE:
        notes.append(f"priors.relative_sizes sum to {prior.sum():.4g}: each was divided by that")
    prior /= prior.sum()
    if config.proposer.type == "simulation" and config.proposer.temperature is not None:
        prior = prior**config.proposer.temperature
        prior /= prior.sum()
    return prior


def _current(config: FitConfig, domains: tuple[str, ...]) -> np.ndarray | None:
    if config.current is None:
        return None
    current = _by_name(config.current, domains, "current", "domain", 0.0)
    if abs(current.sum() - 1) > SUM_TOLERANCE:
        raise UserError(f"the shares of the current mixture sum to {current.sum():.4g}, not to 1")
    return current / current.sum()


def _omega(
    config: FitConfig, metrics: tuple[str, ...], columns: tuple[str, ...], notes: list[str]
) -> np.ndarray | None:
    """As olmix's exact proposer takes them: 1 where none is given, and not divided by their sum."""
    weights = config.filtering.obj_weights
    if not weights:
        return None
    for name in weights:
        _require_known(name, {*metrics, *columns}, "filtering.obj_weights", "metric")
    omega = np.array([weights.get(name, 1.0) for name in metrics])
    if abs(omega.sum() - 1) > SUM_TOLERANCE:
        notes.append(
            f"the weights of the {len(metrics)} metrics sum to {omega.sum():.4g} (filtering.obj_weights, and "
            "1 for each that it leaves out): the KL term weighs as much less as that is above 1"
        )
    return omega


def _caps(config: FitConfig, domains: tuple[str, ...]) -> np.ndarray:
    """Of the bounds and of the tokens, the lower [X]."""
    caps = _by_name(config.bounds.caps, domains, "bounds.caps", "domain", 1.0)
    constraints, counts = config.constraints, config.priors.token_counts
    if constraints.enabled and constraints.target_tokens is not None and counts is not None:
        tokens = np.array([_share_of(name, counts, "priors.token_counts") for name in domains])
        repeated = repetition_caps(tokens, constraints.repetition_factor, constraints.target_tokens)
        caps = np.minimum(caps, repeated)
    return caps


def _reference(config: FitConfig, metrics: tuple[str, ...]) -> np.ndarray | None:
    given = config.objective.reference
    if given is None:
        return None
    for name in given:
        _require_known(name, metrics, "objective.reference", "metric")
    return np.array([_share_of(name, given, "objective.reference") for name in metrics])


def _max_increase(config: FitConfig, metrics: tuple[str, ...]) -> np.ndarray | None:
    given = config.objective.max_increase
    if given is None:
        return None
    if isinstance(given, dict):
        return _by_name(given, metrics, "objective.max_increase", "metric", np.inf)
    return np.full(len(metrics), given)


def _by_name(
    values: Mapping[str, float], names: tuple[str, ...], key: str, what: str, default: float
) -> np.ndarray:
    for name in values:
        _require_known(name, names, key, what)
    return np.array([values.get(name, default) for name in names], dtype=np.float64)


def _share_of(name: str, values: Mapping[str, float], key: str) -> float:
    if name not in values:
        raise UserError(f"{key} has no value for `{name}`: it names {_nearest(name, values)}")
    return float(values[name])


def _require_known(name: str, known: Collection[str], key: str, what: str) -> None:
    if name not in known:
        raise UserError(f"{key} names `{name}`, which is no {what}: the nearest is {_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"`{found[0]}`" if found else "none"
