"""A run directory as a report sees it: what is there, and a sentence for what is not.

A run may be unfinished and a search may have failed anywhere, so absent files are normal here. What the
trainer wrote must be valid (UserError otherwise); what a pool wrote may be nonsense, which becomes a problem
that the report prints and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opmix_dist.bounded import require_ordinary
from opmix_dist.config import RunConfig, SearchRunConfig
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, SearchDir, read_records
from opmix_dist.exchange.schemas import (
    BadStep,
    EvalLine,
    Fit,
    MixtureRecord,
    PhaseCost,
    Proposal,
    Record,
    SearchRequest,
    SearchStage,
    SearchStatus,
    Summary,
    TrainLine,
)
from opmix_dist.exchange.units import LOSSES, Units

T = TypeVar("T")
MAX_CANDIDATE_ROWS = 1_000_000
MAX_CANDIDATES_BYTES = 1 << 30


class CurvePoint(Record):
    """A line of probes/COMPONENT/curve.jsonl; loss in nats per token."""

    step: int
    loss: float


@dataclass(frozen=True)
class Candidates:
    """candidates.parquet: N rows, one per candidate and domain."""

    kinds: np.ndarray
    """[N] "candidate", "snapshot" or "proposal"."""
    domains: np.ndarray
    """[N] domain of each row."""
    components: Sequence[str]
    """C names, those of the request."""
    U: np.ndarray
    """[N, C] interpolation coefficients."""
    loss: np.ndarray
    """[N] nats per token, or error rates where the proposal says so."""
    stderr: np.ndarray
    """[N] standard error of the loss."""
    stderr_change: np.ndarray
    """[N] standard error of the loss minus the snapshot's on the same samples."""
    predicted: np.ndarray
    """[N] loss by the law, nan where there is none."""
    left_out: np.ndarray
    """[N] loss by a law that was fitted to other candidates, nan where there is none."""
    gradients: np.ndarray | None = None
    """[N, C] derivatives of the loss by the coefficients; None where the search took none."""
    resampled: np.ndarray | None = None
    """[N, B] loss on other draws of the held-out samples, nan but for candidates; None: there are none."""

    def rows(self, domain: str, kind: str) -> np.ndarray:
        """[N] mask of the rows of one domain and kind."""
        return (self.domains == domain) & (self.kinds == kind)


@dataclass
class SearchView:
    """One search; None and empty where it has not come that far, ``problems`` where a file is unreadable."""

    name: str
    request: SearchRequest | None = None
    status: SearchStatus | None = None
    candidates: Candidates | None = None
    fit: Fit | None = None
    proposal: Proposal | None = None
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def units(self) -> Units:
        """What its values are; as of losses where no proposal tells."""
        return LOSSES if self.proposal is None else Units.of(self.proposal)

    @property
    def standing(self) -> str:
        """One sentence: how far the search came, or why it failed."""
        if self.status is None:
            return "Requested; the pool has not begun."
        if self.status.stage is SearchStage.FAILED:
            return f"Failed: {self.status.reason or 'no reason was recorded'}. The mixture stayed as it was."
        if self.status.stage is SearchStage.PROPOSED:
            return "Finished with a proposal."
        return f"In progress: {self.status.stage.value}, {self.status.done} of {self.status.total} done."


@dataclass(frozen=True)
class RunView:
    """One run; ``summary`` is None until it has finished, and in a search alone, which trains nothing."""

    name: str
    config: RunConfig | SearchRunConfig
    mixtures: list[MixtureRecord]
    train: list[TrainLine]
    evals: list[EvalLine]
    summary: Summary | None
    searches: list[SearchView]
    bad_steps: list[BadStep] = field(default_factory=list)
    """In the order in which they were met."""

    @property
    def domains(self) -> list[str]:
        """Every domain that the run names, in the order of its first mixture."""
        named: list[Sequence[str]] = [list(m.weights) for m in self.mixtures]
        named += [list(line.loss) for line in self.evals]
        named += [s.request.domains for s in self.searches if s.request]
        named += [list(self.summary.final_loss)] if self.summary else []
        return list(dict.fromkeys(name for names in named for name in names))

    @property
    def final(self) -> EvalLine | None:
        """The final evaluation, or the latest one of a run that has not finished."""
        if self.summary is not None:
            return final_line(self.summary)
        return self.evals[-1] if self.evals else None

    @property
    def last_step(self) -> int:
        """Finished steps, as far as the run directory tells."""
        if self.summary is not None:
            return self.summary.steps
        return max([0, *(m.step for m in self.mixtures[-1:]), *(line.step for line in self.train[-1:])])

    @property
    def costs(self) -> dict[str, PhaseCost]:
        """Cost by phase: the trainer's, then those of each search that proposed."""
        costs = dict(self.summary.costs) if self.summary else {}
        for search in self.searches:
            if search.proposal:
                costs |= {f"search {search.name}: {phase}": c for phase, c in search.proposal.costs.items()}
        return costs


def final_line(summary: Summary) -> EvalLine:
    """The final evaluation of a finished run."""
    return EvalLine(
        step=summary.steps, tokens=summary.tokens, loss=summary.final_loss, stderr=summary.final_stderr
    )


def read_run(run: RunDir) -> RunView:
    """Everything a report needs of ``run``.

    Raises:
        UserError: no run directory, or a file of the trainer is invalid; names the file.
    """
    return RunView(
        name=run.path.resolve().name,
        config=run.any_config(),
        mixtures=run.mixtures(),
        train=run.train_lines(),
        evals=run.eval_lines(),
        summary=run.summary() if run.summary_file.exists() else None,
        searches=[read_search(search) for search in run.search_dirs()],
        bad_steps=run.bad_steps(),
    )


def read_search(search: SearchDir) -> SearchView:
    """What there is of a search; never raises for a missing or invalid file of it."""
    view = SearchView(search.name)

    def optional(path: Path, read: Callable[[], T]) -> T | None:
        if not path.exists():
            return None
        try:
            return read()
        except UserError as error:
            view.problems.append(str(error))
            return None

    view.request = optional(search.request_file, search.request)
    view.status = optional(search.status_file, search.status)
    view.proposal = optional(search.proposal_file, search.proposal)
    if view.request is None:
        return view
    components = view.request.components
    view.fit = optional(search.fit_file, partial(_fit, search, components))
    view.candidates = optional(
        search.candidates_file, partial(_candidates, search.candidates_file, components)
    )
    for name in components:
        path = search.curve(name)
        view.curves[name] = optional(path, partial(read_records, path, CurvePoint)) or []
    return view


def _fit(search: SearchDir, components: Sequence[str]) -> Fit:
    fit = search.fit()
    if fit.components != components:
        raise UserError(f"{search.fit_file} names other components than request.json; fit again")
    per_domain = (fit.r2, fit.spearman, fit.loo_error, fit.calibration, *fit.comparison.values())
    if any(len(values) != len(fit.domains) for values in per_domain):
        raise UserError(f"{search.fit_file} must have one entry per domain in every list; fit again")
    return fit


def _candidates(path: Path, components: Sequence[str]) -> Candidates:
    """Raises UserError naming the file when it is not the table that the pool writes."""
    measured = ("loss", "stderr", "stderr_change", "predicted", "left_out")
    names = ["kind", "domain", *measured, *(f"u_{c}" for c in components)]
    slopes = [f"gradient_{c}" for c in components]
    try:
        require_ordinary(path, MAX_CANDIDATES_BYTES)
        metadata = pq.read_metadata(path)
        if metadata.num_rows > MAX_CANDIDATE_ROWS:
            raise UserError(f"{path} has more than {MAX_CANDIDATE_ROWS} rows; a search writes far fewer")
        there = metadata.schema.to_arrow_schema().names
        has_slopes, has_draws = slopes[0] in there, "resampled" in there
        names += slopes if has_slopes else []
        table = pq.ParquetFile(path).read(columns=[*names, *(["resampled"] if has_draws else [])])
        columns = {name: table.column(name).to_numpy() for name in names}
        numbers = {name: columns[name].astype(np.float64) for name in names[2:]}
        draws = _draws(table.column("resampled"), columns["kind"]) if has_draws else None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a table of candidates: {' '.join(str(error).split())}") from None
    U = np.stack([numbers[f"u_{c}"] for c in components], axis=1)
    gradients = np.stack([numbers[name] for name in slopes], axis=1) if has_slopes else None
    losses = {name: numbers[name] for name in measured}
    return Candidates(
        columns["kind"], columns["domain"], components, U, **losses, gradients=gradients, resampled=draws
    )


def _draws(column: pa.ChunkedArray, kinds: np.ndarray) -> np.ndarray:
    """[N, B], nan but for candidates; ValueError where these have different numbers of draws, or none."""
    rows = np.flatnonzero(kinds == "candidate")
    found = np.array([column[int(row)].as_py() for row in rows], dtype=np.float64)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise ValueError("`resampled` must have as many finite losses in each row of a candidate")
    draws = np.full((len(kinds), found.shape[1]), np.nan)
    draws[rows] = found
    return draws
