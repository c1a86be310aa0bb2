"""What a finished search writes: candidates.parquet, fit.json, proposal.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import SearchDir, write_record
from opmix_dist.exchange.schemas import (
    Decision,
    Fit,
    Gain,
    Interval,
    PhaseCost,
    Proposal,
    SearchRequest,
)
from opmix_dist.models.loss import paired_stderr
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.requests import keeps_old, newcomers, staying
from opmix_dist.search.ask_tell import SearchResult, best_measured
from opmix_dist.search.bootstrap import Bootstrap
from opmix_dist.search.decision import decide
from opmix_dist.search.laws import Law, LawFit, Observations
from opmix_dist.search.problem import TOLERANCE, Problem
from opmix_dist.search.what_if import Reach
from opmix_dist.search_config import ProposalConfig

# Effective probes of the proposal over those of staying from which the gain is said to hold some averaging.
MORE_PROBES = 1.05
# Nats by which a measured candidate may be better than the proposal without a word.
BEHIND = 1e-3


@dataclass(frozen=True)
class Outcome:
    """All that a search found. What was measured, one candidate each: base, of the snapshot; alone, of going
    on as before; stay, of the same mixture with as many probes as the proposal mixes, which all comparisons
    are with; landed, at the proposal. measured: of all that the method asked for.

    sampled: losses of all that was asked for on other held-out samples, of ``solving.sampled_losses``.
    optimism: of the measured gain, as ``solving.overrated`` tells it.
    error_rates: domains that were measured in error rates of replies."""

    request: SearchRequest
    settings: ProposalConfig
    problem: Problem
    result: SearchResult
    observations: Observations
    measured: Evaluations
    base: Evaluations
    alone: Evaluations
    stay: Evaluations
    landed: Evaluations
    sampled: np.ndarray | None
    bars: Bootstrap | None
    optimism: float | None
    horizon_tokens: int
    costs: dict[str, PhaseCost]
    error_rates: Sequence[str] = ()

    @property
    def law(self) -> Law | None:
        return self.result.fit.law if self.result.fit else None

    @property
    def u(self) -> np.ndarray:
        return self.result.proposal.u

    @cached_property
    def keep(self) -> np.ndarray:
        """u [K] of staying, to compare with the proposal."""
        return staying(self.request, like=self.u)

    def predict(self, u: np.ndarray) -> np.ndarray | None:
        """Losses [D] by the law at u [K], of what is simulated there; None without a law."""
        return None if self.law is None else self.law.predict(u[None])[0]

    @property
    def _may_average(self) -> bool:
        """Whether staying may mix any number of probes."""
        return keeps_old(self.request) and not self.request.new_domains

    @cached_property
    def gain(self) -> Gain:
        """Of the proposal over staying."""
        value = self.problem.value
        alone, stay, landed = (one.losses.loss[0] for one in (self.alone, self.stay, self.landed))
        predicted = None
        if self.law is not None:
            by_law = value(self.law.predict(np.stack([self.keep, self.u]), averaging=False))
            predicted = float(by_law[0] - by_law[1])
        return Gain(
            predicted=predicted,
            interval=None if self.bars is None else _interval(self.bars.gains, self.settings.confidence),
            measured=float(value(stay) - value(landed)),
            stderr=paired_stderr(
                (self.stay.sums[0], self.problem.slope(stay)),
                (self.landed.sums[0], self.problem.slope(landed)),
                self.base.targets,
                self.base.domain_ids,
            ),
            optimism=self.optimism,
            averaging=float(value(alone) - value(stay)) if self._may_average else None,
        )

    @cached_property
    def decision(self) -> Decision:
        """The measured gain decides, less its optimism. Averaging has no part in it: both sides average
        alike, as far as the current mixture can be reached so."""
        if not self.settings.no_move:
            return Decision(move=True, reason="search.proposal.no_move is off: the proposal is taken")
        if joining := newcomers(self.request):
            verb, them = ("joins", "it") if len(joining) == 1 else ("join", "them")
            return Decision(
                move=True, reason=f"{', '.join(joining)} {verb}: the mixture without {them} ends here"
            )
        broken = self.problem.violations(self.stay.losses.loss[0], self.keep)
        if broken:
            return Decision(move=True, reason=f"the mixture cannot stay: {'; '.join(broken)}")
        expected = self.gain.measured - (self.optimism or 0.0)
        found = decide(expected, self.gain.stderr, confidence=self.settings.confidence)
        reason = found.reason
        if self.optimism:
            reason += (
                f"; measured were {self.gain.measured:.4g}, of which {self.optimism:.2g} come of having "
                "chosen on the same samples"
            )
        return Decision(move=found.move, reason=reason)


def write_outcome(search: SearchDir, outcome: Outcome) -> None:
    """Write the three files."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(_candidate_rows(outcome))), buffer)
    files.write_bytes(search.candidates_file, buffer.getvalue().to_pybytes())
    if outcome.result.fit is not None:
        write_record(search.fit_file, fit_record(outcome.result.fit, outcome.request))
    write_record(search.proposal_file, proposal_record(outcome))


def _candidate_rows(outcome: Outcome) -> Iterator[dict[str, object]]:
    """A row per candidate and domain; then the snapshot, which is candidate -1, and the proposal.

    ``stderr`` is that of the loss, ``stderr_change`` that of its change from the snapshot, which the laws
    are weighted by. ``tokens`` count in the loss; a candidate that was stopped early has fewer of them.
    ``predicted`` is the law's loss, ``left_out`` that of laws fitted to other candidates, ``gradient_*`` its
    derivatives by the coefficients, where the search took them, ``resampled`` its loss on held-out samples
    drawn with replacement, the same draws in all rows, where error bars were asked for.
    """
    fit, U = outcome.result.fit, outcome.observations.candidates
    nothing = np.full((1, len(outcome.request.domains)), np.nan)
    absent = np.repeat(nothing, len(U), axis=0)
    by_law = (absent, absent) if fit is None else (fit.predicted, fit.left_out)
    at_proposal = outcome.predict(outcome.u)
    for kind, first, coefficients, measured, predicted, left_out in (
        ("candidate", 0, U, outcome.measured, *by_law),
        ("snapshot", -1, np.zeros_like(U[:1]), outcome.base, nothing, nothing),
        (
            "proposal",
            len(U),
            outcome.u[None],
            outcome.landed,
            nothing if at_proposal is None else at_proposal[None],
            nothing,
        ),
    ):
        losses, changes = measured.losses, measured.changes_from(outcome.base)
        seen = measured.targets_seen
        for m, u in enumerate(coefficients):
            x = u @ outcome.problem.expanded
            row: dict[str, object] = {"candidate": first + m, "kind": kind}
            row |= {f"u_{name}": float(c) for name, c in zip(outcome.request.components, u, strict=True)}
            row |= {f"x_{name}": float(w) for name, w in zip(outcome.request.domains, x, strict=True)}
            for d, domain in enumerate(outcome.request.domains):
                yield row | {
                    "domain": domain,
                    "loss": float(losses.loss[m, d]),
                    "stderr": float(losses.stderr[m, d]),
                    "stderr_change": float(changes.stderr[m, d]),
                    "tokens": int(seen[m, d]),
                    "predicted": _finite(predicted[m, [d]])[0],
                    "left_out": _finite(left_out[m, [d]])[0],
                    **_gradients(outcome, kind, m, d),
                    **_sampled(outcome, kind, m, d),
                }


def _gradients(outcome: Outcome, kind: str, m: int, d: int) -> dict[str, float]:
    """Of a candidate's loss, by component; empty where the search took none."""
    gradients = outcome.observations.gradients
    if gradients is None or kind != "candidate":
        return {}
    return {
        f"gradient_{name}": float(slope)
        for name, slope in zip(outcome.request.components, gradients[m, d], strict=True)
    }


def _sampled(outcome: Outcome, kind: str, m: int, d: int) -> dict[str, list[float]]:
    if outcome.sampled is None:
        return {}
    return {"resampled": outcome.sampled[:, m, d].tolist() if kind == "candidate" else []}


def fit_record(fit: LawFit, request: SearchRequest) -> Fit:
    return Fit(
        domains=request.domains,
        components=request.components,
        family=fit.family,
        parameters=_parameters(fit.law),
        r2=_finite(fit.r2),
        spearman=_finite(fit.spearman),
        loo_error=_finite(fit.loo_error),
        calibration=_finite(fit.calibration),
        comparison={family: _finite(errors) for family, errors in fit.comparison.items()},
        warnings=list(fit.warnings),
    )


def _parameters(law: Law) -> dict[str, Any]:
    """The law's arrays of numbers by name; nothing of laws that are made of other things."""
    if not dataclasses.is_dataclass(law):
        return {}
    values = {field.name: getattr(law, field.name) for field in dataclasses.fields(law)}
    return {
        name: value.tolist()
        for name, value in values.items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isfinite(value).all()
    }


def proposal_record(outcome: Outcome) -> Proposal:
    request, solution = outcome.request, outcome.result.proposal
    confidence = outcome.settings.confidence

    def by_domain(values: np.ndarray) -> dict[str, float]:
        return dict(zip(request.domains, map(float, values), strict=True))

    landed, stay = outcome.landed.losses.loss[0], outcome.stay.losses.loss[0]
    predicted, predicted_stay = outcome.predict(outcome.u), outcome.predict(outcome.keep)
    intervals = {}
    if outcome.bars is not None:
        ends = zip(*outcome.bars.interval(confidence), strict=True)
        intervals = {
            name: Interval(low=float(low), high=float(high))
            for name, (low, high) in zip(request.domains, ends, strict=True)
        }
    return Proposal(
        search=request.search,
        step=request.step,
        coefficients=dict(zip(request.components, map(float, solution.u), strict=True)),
        weights=by_domain(solution.mixture),
        current=request.current,
        predicted=by_domain(landed if predicted is None else predicted),
        simulated=by_domain(landed),
        snapshot=by_domain(outcome.base.losses.loss[0]),
        predicted_current=by_domain(stay if predicted_stay is None else predicted_stay),
        simulated_current=by_domain(stay),
        objective=float(solution.objective),
        kl=_finite([solution.kl_divergence])[0],
        horizon_tokens=outcome.horizon_tokens,
        costs=outcome.costs,
        error_rates=list(outcome.error_rates),
        objective_name=outcome.problem.objective,
        intervals=intervals,
        confidence=confidence if intervals else None,
        stay=dict(zip(request.components, map(float, outcome.keep), strict=True)),
        gain=outcome.gain,
        decision=outcome.decision,
        rounds=outcome.result.rounds,
        why_ended=outcome.result.why_ended,
        warnings=list(_warnings(outcome)),
    )


def _warnings(outcome: Outcome) -> Iterator[str]:
    yield from outcome.result.fit.warnings if outcome.result.fit else ()
    landed, candidates = outcome.landed.losses.loss[0], outcome.observations.candidates
    row = best_measured(outcome.problem, outcome.observations, TOLERANCE)
    if row is not None:
        best = outcome.problem.total(outcome.observations.losses[row], candidates[row])
        behind = outcome.problem.total(landed, outcome.u) - best
        if behind > BEHIND:
            yield (
                f"simulated at the proposal, the objective is {behind:.4g} above candidate {row}'s: the "
                "laws are wrong here; more search.refinement.rounds or search.method gradient may mend it"
            )
    if outcome.result.fit is not None and not (reach := Reach.of(candidates)).covers(outcome.u):
        yield (
            f"{reach.distance(outcome.u):.1%} of the proposal's coefficients lie outside of what the "
            "candidates span, where intervals say little: raise search.candidates.count or "
            "search.refinement.rounds"
        )
    broken = outcome.problem.violations(landed, outcome.u)
    if broken:
        yield f"simulated at the proposal, a bound does not hold: {'; '.join(broken)}"
    mixed, reached = (1 / float(u @ u) for u in (outcome.u, outcome.keep))
    if mixed > MORE_PROBES * reached and not outcome.request.new_domains:
        yield (
            f"the proposal mixes {mixed:.3g} probes in effect, the current mixture can be reached with "
            f"{reached:.3g} at most: some of the measured gain is that of averaging probes"
        )
    if outcome.bars is not None and outcome.bars.failures:
        yield (
            f"{outcome.bars.failures} of {outcome.settings.bootstrap} resampled laws had no proposal and are "
            "left out of the intervals"
        )


def _interval(values: np.ndarray, confidence: float) -> Interval | None:
    """The share ``confidence`` of the values [B] lies within; None of no values."""
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))


def _finite(values: np.ndarray | Sequence[float]) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
