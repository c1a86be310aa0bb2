"""From comparisons to validation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opmix_dist.data.loader import EvalSet
from opmix_dist.exchange.schemas import Mixture, PhaseCost, SearchRequest
from opmix_dist.models.loss import losses_by_domain
from opmix_dist.pool.calibration import Calibration
from opmix_dist.search.problem import Problem
from opmix_dist.search.simplex import OLD
from opmix_dist.search_config import InterpolationName
from opmix_dist.validate import calibration
from opmix_dist.validate.config import ValidateConfig
from opmix_dist.validate.design import Point, same_mixture
from opmix_dist.validate.measures import Agreement, Tried, rank_of, regret
from opmix_dist.validate.real import Recipe
from opmix_dist.validate.records import (
    CalibrationResult,
    Comparison,
    Losses,
    PointResult,
    SimulatorResult,
    Sources,
    Validation,
)

PROBES, FULL, SNAPSHOT = "probes", "full", "snapshot"


@dataclass(frozen=True)
class Measured:
    """compared: of each simulator, P points and S seeds, [P][S]; abouts: what each simulator is, in words.

    ``snapshot`` is one of the simulators, the others simulate.
    """

    points: Sequence[Point]
    compared: Mapping[str, Sequence[Sequence[Comparison]]]
    abouts: Mapping[str, str]
    heldout: EvalSet


class _Numbers:
    """Arrays of what was measured: losses and divergences [P, D] by simulator, real losses [P, S, D]."""

    def __init__(self, measured: Measured, num_domains: int) -> None:
        batch, ids = measured.heldout.batch, measured.heldout.domain_ids.numpy()
        targets = batch.targets.numpy()

        def losses(rows: Sequence[Sequence[Comparison]], what: str) -> np.ndarray:
            """[P, S, D]."""
            sums = np.array([[getattr(one, what) for one in row] for row in rows])  # [P, S, N]
            return losses_by_domain(sums, targets, ids, num_domains).loss

        self.real_by_seed = losses(measured.compared[SNAPSHOT], "real")
        self.real = self.real_by_seed.mean(axis=1)
        found = {name: losses(rows, "simulated").mean(axis=1) for name, rows in measured.compared.items()}
        self.snapshot = found.pop(SNAPSHOT)[0]
        self.simulated = found
        self.divergence = {
            name: losses(rows, "divergence").mean(axis=1)
            for name, rows in measured.compared.items()
            if rows[0][0].divergence is not None
        }


def validation(
    request: SearchRequest,
    problem: Problem,
    measured: Measured,
    recipe: Recipe,
    settings: ValidateConfig,
    *,
    interpolation: InterpolationName,
    probe_tokens: int,
    tokens: int,
    costs: dict[str, PhaseCost],
) -> tuple[Validation, Calibration]:
    """The record, and the correction that it chose.

    Args:
        interpolation: of the search. tokens: of a real run; probe_tokens: of a probe.
    """
    domains, points = request.domains, measured.points
    numbers = _Numbers(measured, len(domains))
    tried = _tried(points, numbers)
    single = np.flatnonzero(tried.single)
    judged = calibration.judged(tried, numbers.simulated[PROBES], problem, domains)
    found = [_simulated_by(interpolation, one) for one in judged]
    chosen = calibration.choose(found, settings.calibration, len(single))
    values = problem.value(tried.real[single])
    proposal = next(i for i, point in enumerate(points) if point.kind == "proposal")
    place = int(np.flatnonzero(tried.mixtures[single] == tried.mixtures[proposal])[0])
    both = [tried.old, proposal]
    gains = [problem.value(losses[both]) for losses in (tried.real, numbers.simulated[PROBES])]
    record = Validation(
        search=request.search,
        domains=domains,
        components=request.components,
        objective=problem.objective,
        steps=recipe.steps,
        tokens=tokens,
        probe_tokens=probe_tokens,
        start=settings.real.start,
        seeds=settings.real.seeds,
        samples=len(measured.heldout.batch),
        snapshot=_named(domains, numbers.snapshot),
        mixtures=len(single),
        points=[_point(request, measured, numbers, i) for i in range(len(points))],
        simulators=[
            _simulator(name, measured, numbers, tried, problem, domains) for name in numbers.simulated
        ],
        proposal_regret=regret(place, values),
        proposal_rank=rank_of(place, values),
        proposal_gain=float(gains[0][0] - gains[0][1]),
        simulated_gain=float(gains[1][0] - gains[1][1]),
        sources=_sources(points, numbers, tried),
        calibrations=found,
        chosen=chosen.calibration.method,
        costs=costs,
    )
    return record, chosen.calibration


def _simulated_by(interpolation: InterpolationName, found: CalibrationResult) -> CalibrationResult:
    rule = found.calibration.model_copy(update={"interpolation": interpolation})
    return found.model_copy(update={"calibration": rule})


def _tried(points: Sequence[Point], numbers: _Numbers) -> Tried:
    mixtures = np.zeros(len(points), dtype=np.int64)
    single = np.full(len(points), False)
    for number, group in enumerate(same_mixture(points)):
        mixtures[group], single[group[0]] = number, True
    return Tried(
        candidates=np.stack([point.u for point in points]),
        mixtures=mixtures,
        single=single,
        real=numbers.real,
        snapshot=numbers.snapshot,
        old=next(i for i, point in enumerate(points) if point.kind == "component" and point.name == OLD),
    )


def _point(request: SearchRequest, measured: Measured, numbers: _Numbers, i: int) -> PointResult:
    point, domains = measured.points[i], request.domains
    mixture: Mixture = _named(domains, point.x)
    return PointResult(
        name=point.name,
        kind=point.kind,
        u=_named(request.components, point.u),
        x=mixture,
        real=_named(domains, numbers.real[i]),
        simulated={name: _named(domains, found[i]) for name, found in numbers.simulated.items()},
        divergence={name: _named(domains, found[i]) for name, found in numbers.divergence.items()},
    )


def _simulator(
    name: str,
    measured: Measured,
    numbers: _Numbers,
    tried: Tried,
    problem: Problem,
    domains: Sequence[str],
) -> SimulatorResult:
    rows = tried.single
    found = Agreement.of(numbers.simulated[name][rows], tried.real[rows], problem)
    apart = numbers.divergence.get(name)
    return SimulatorResult(
        name=name,
        about=measured.abouts[name],
        gap=_named(domains, found.mean_gap),
        largest_gap=_named(domains, found.largest_gap),
        spearman=dict(zip(domains, found.spearman, strict=True)),
        spearman_objective=found.spearman_objective,
        slope=dict(zip(domains, found.slope, strict=True)),
        mean_gap=float(found.mean_gap.mean()),
        regret=found.regret,
        divergence=None if apart is None else float(apart[rows].mean()),
    )


def _sources(points: Sequence[Point], numbers: _Numbers, tried: Tried) -> Sources:
    rows, probes, full = tried.single, numbers.simulated[PROBES], numbers.simulated.get(FULL)
    alone = np.array([point.kind == "component" for point in points])
    averages = [i for i, point in enumerate(points) if point.kind == "average"]

    def bonus(simulated: np.ndarray) -> dict[str, float]:
        """Above 0: the average is better than ``old`` alone."""
        means = simulated.mean(axis=1)
        return {points[i].name: float(means[tried.old] - means[i]) for i in averages}

    several = numbers.real_by_seed.shape[1] > 1
    deviations = numbers.real_by_seed.mean(axis=2)[rows].std(axis=1, ddof=1) if several else None
    return Sources(
        gap=float((probes - tried.real)[rows].mean()),
        lora=None if full is None else float((probes - full)[rows].mean()),
        averaging=None if full is None else float((full - tried.real)[rows].mean()),
        at_components=float((probes - tried.real)[alone].mean()) if alone.sum() > 1 else None,
        bonus=bonus(probes),
        bonus_full={} if full is None else bonus(full),
        noise=None if deviations is None else float(np.sqrt((deviations**2).mean())),
    )


def _named(names: Sequence[str], values: np.ndarray) -> Losses:
    return dict(zip(names, values.tolist(), strict=True))
