"""A finished search, or an output folder of ``opmix fit``, with its laws fitted again as it fitted them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from opmix_dist.errors import UserError
from opmix_dist.exchange.files import read_json
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import Finite, SearchRequest, SearchStage
from opmix_dist.exchange.units import Units
from opmix_dist.fit.analysis import analyse
from opmix_dist.fit.config import load_fit_config
from opmix_dist.fit.outputs import PROPOSAL, SETTINGS
from opmix_dist.pool.requests import staying
from opmix_dist.pool.solving import search_problem
from opmix_dist.report.reading import Candidates, SearchView, read_search
from opmix_dist.report.what_if import Searched
from opmix_dist.search.bootstrap import bootstrap
from opmix_dist.search.laws import Law, LawFit, Observations, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal, SolverError
from opmix_dist.search_config import LawConfig
from opmix_dist.seeds import derive_seed

RESAMPLED = 100
"""Laws behind the intervals, where the search itself made none."""
SAME = 1e-4
"""By how much a loss of a law that is fitted again may differ: more is another law."""

NO_LAWS = (
    "this search descended along gradients without laws: these were fitted to what it evaluated on its way, "
    "and know little of mixtures away from it"
)


def read_searched(
    place: Path, search: str | None = None, confidence: float | None = None, resampled: int | None = None
) -> Searched:
    """What ``place`` found.

    Args:
        search: name of one of a run's searches; None: the last that proposed.
        confidence: of the intervals; None: as the search's own.
        resampled: laws behind the intervals, at least 2; None: as many as the search's own, or RESAMPLED.

    Raises:
        UserError: ``place`` holds no finished search and no fit, or what it holds is invalid; names the file.
    """
    run = RunDir(place)
    if run.config_file.is_file():
        return _of_run(run, search, confidence, resampled)
    if search is not None:
        raise UserError(f"{place} is no run directory: --search names a search of one")
    if (place / SETTINGS).is_file():
        return _of_fit(place, confidence, resampled)
    raise UserError(f"{place} is neither a run directory nor an output folder of `opmix fit`")


def _of_run(run: RunDir, name: str | None, confidence: float | None, resampled: int | None) -> Searched:
    view = _chosen(run, name)
    request, proposed = view.request, view.proposal
    if view.problems or request is None or proposed is None or view.candidates is None:
        missing = "request.json, proposal.json or candidates.parquet is missing"
        raise UserError(
            f"search {view.name} of {run.path} cannot be read: {'; '.join(view.problems) or missing}"
        )
    if set(proposed.coefficients) != {*request.components} or set(proposed.weights) != {*request.domains}:
        raise UserError(
            f"proposal.json and request.json of search {view.name} of {run.path} are of two searches"
        )
    settings = run.any_config().search
    reference = np.array([proposed.snapshot[domain] for domain in request.domains])
    try:
        problem = search_problem(request, settings.proposal, reference)
    except ValueError as error:
        raise UserError(f"request.json of search {view.name} of {run.path} is invalid: {error}") from None
    table = _table(view.candidates, request)
    observations = _observations(view.candidates, table, request, problem)
    fit = _fitted(observations, settings.law, derive_seed(request.seed, "law"))
    u = np.array([proposed.coefficients[component] for component in request.components])
    if settings.method == "gradient":
        notes: tuple[str, ...] = (NO_LAWS,)
    else:
        recorded = {domain: proposed.predicted[domain] for domain in request.domains}
        notes = _differences(fit.law.predict(u[None])[0], recorded)
    return Searched(
        title=f"search {view.name} of {run.path.resolve().name}",
        fit=fit,
        problem=problem,
        resampled=_resampled(
            fit,
            problem,
            u,
            _sampled(view.candidates, table),
            count=resampled or settings.proposal.bootstrap or RESAMPLED,
            seed=derive_seed(request.seed, "bootstrap"),
        ),
        current=staying(request, like=u),
        proposal=u,
        confidence=confidence or settings.proposal.confidence,
        notes=notes,
        units=Units.of(proposed),
    )


def _chosen(run: RunDir, name: str | None) -> SearchView:
    """The search that is named, or the last that proposed."""
    views = {search.name: read_search(search) for search in run.search_dirs()}
    finished = [view for view in views.values() if view.status and view.status.stage is SearchStage.PROPOSED]
    if name is None:
        if not finished:
            raise UserError(f"{run.path} has no finished search")
        return finished[-1]
    if name not in views:
        raise UserError(f"{run.path} has no search {name}: it has {', '.join(views) or 'none'}")
    if views[name] not in finished:
        raise UserError(f"search {name} of {run.path} has no proposal. {views[name].standing}")
    return views[name]


def _table(candidates: Candidates, request: SearchRequest) -> np.ndarray:
    """Row of the file [M, D] of each candidate that the laws were fitted to and each loss, in their order."""
    rows = [np.flatnonzero(candidates.rows(domain, "candidate")) for domain in request.domains]
    if len({len(row) for row in rows}) != 1 or not len(rows[0]):
        raise UserError(
            f"candidates.parquet of search {request.search} must have each candidate once by domain"
        )
    table = np.stack(rows, axis=1)
    U = candidates.U[table]
    if not np.array_equal(U, np.broadcast_to(U[:, :1], U.shape)):
        raise UserError(f"candidates.parquet of search {request.search} must list domains in the same order")
    return table


def _sampled(candidates: Candidates, table: np.ndarray) -> np.ndarray | None:
    """Losses on other draws of the held-out samples [B, M, D]."""
    return None if candidates.resampled is None else np.moveaxis(candidates.resampled[table], 2, 0)


def _observations(
    candidates: Candidates, table: np.ndarray, request: SearchRequest, problem: Problem
) -> Observations:
    try:
        return Observations(
            candidates.U[table[:, 0]],
            candidates.loss[table],
            candidates.stderr_change[table],
            None if candidates.gradients is None else candidates.gradients[table],
            composition=problem.composition,
            names=request.domains,
            components=request.components,
            domains=request.domains,
        )
    except ValueError as error:
        raise UserError(f"candidates.parquet of search {request.search} is invalid: {error}") from None


def _fitted(observations: Observations, settings: LawConfig, seed: int) -> LawFit:
    return fit_law(
        observations,
        family=settings.family,
        seed=seed,
        huber_delta=settings.huber_delta,
        num_starts=settings.num_starts,
        averaging=settings.averaging,
    )


def _resampled(
    fit: LawFit, problem: Problem, u: np.ndarray, sampled: np.ndarray | None, *, count: int, seed: int
) -> tuple[Law, ...]:
    """Laws of the bootstrap of a proposal u [K]."""
    predicted = fit.law.predict(u[None], averaging=False)[0]
    proposal = Proposal(
        u, u @ problem.expanded, predicted, problem.total(predicted, u), problem.divergence(u), "recorded"
    )
    try:
        return bootstrap(fit, problem, count=count, seed=seed, proposal=proposal, sampled=sampled).laws
    except SolverError as error:
        raise UserError(f"the laws cannot be resampled: {error}") from None


def _differences(losses: np.ndarray, recorded: Mapping[str, float]) -> tuple[str, ...]:
    """A note where losses [D] of the proposal are others than proposal.json has, in its order."""
    apart = dict(zip(recorded, np.abs(losses - np.array(list(recorded.values()))), strict=True))
    worst = max(apart, key=lambda name: float(apart[name]))
    if apart[worst] <= SAME:
        return ()
    return (
        f"fitted again, the law's loss of {worst} at the proposal is {apart[worst]:.4f} from what "
        "proposal.json has: settings, files or this program have changed since",
    )


class _Recorded(BaseModel):
    """What is read of a fit's proposal.json."""

    predicted: dict[str, Finite]


def _recorded(file: Path, metrics: Sequence[str]) -> dict[str, float]:
    """Losses that a fit predicted at its proposal, in the metrics' order."""
    try:
        predicted = _Recorded.model_validate(read_json(file)).predicted
        return {metric: predicted[metric] for metric in metrics}
    except (ValidationError, KeyError):
        raise UserError(f"{file} is no proposal of this fit: fit again") from None


def _of_fit(folder: Path, confidence: float | None, resampled: int | None) -> Searched:
    config = load_fit_config(folder / SETTINGS)
    count = resampled or config.bootstrap.count or RESAMPLED
    bars = config.bootstrap.model_copy(update={"count": count})
    analysis = analyse(config.model_copy(update={"bootstrap": bars}))
    outcome = analysis.outcome
    if outcome is None:
        raise UserError(f"{folder} holds laws without a proposal: fit again without proposer.fit_only")
    if outcome.bootstrap is None:
        raise UserError(f"{folder} holds the worst mixture: fit again without proposer.make_worst_mix")
    recorded = _recorded(folder / PROPOSAL, analysis.inputs.metrics)
    return Searched(
        title=f"the fit in {folder.resolve().name}",
        fit=analysis.fit,
        problem=outcome.problem,
        resampled=outcome.bootstrap.laws,
        current=analysis.inputs.current,
        proposal=outcome.proposal.u,
        confidence=confidence or bars.confidence,
        notes=(*analysis.inputs.notes, *_differences(outcome.proposal.predicted, recorded)),
    )
