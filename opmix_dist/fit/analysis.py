"""From tables to a mixture: laws, proposal, intervals and a decision, all by ``opmix_dist.search``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from opmix_dist.errors import UserError
from opmix_dist.fit.config import FitConfig
from opmix_dist.fit.inputs import Inputs, read_inputs
from opmix_dist.fit.tables import Swarm
from opmix_dist.search.bootstrap import Bootstrap, bootstrap
from opmix_dist.search.decision import Decision, Gain, decide, predicted_gain
from opmix_dist.search.feasibility import InfeasibleError, SolverError
from opmix_dist.search.laws import Law, LawFit, Observations, SmoothLaw, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal, propose


@dataclass(frozen=True)
class Outcome:
    """What is proposed. The components of the search are the domains: u = x.

    current_losses: what the laws expect of the current mixture [D], where there is one.
    bootstrap: None without resampling. gain, decision: of moving from the current mixture, KL term left out;
    None without one, or without resampling.
    """

    problem: Problem
    proposal: Proposal
    current_losses: np.ndarray | None = None
    bootstrap: Bootstrap | None = None
    gain: Gain | None = None
    decision: Decision | None = None


@dataclass(frozen=True)
class Analysis:
    """held_out_losses: what the laws expect of the runs that were held out [N, D]; outcome: None with
    ``proposer.fit_only``."""

    config: FitConfig
    inputs: Inputs
    fit: LawFit
    held_out_losses: np.ndarray | None
    outcome: Outcome | None

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.inputs.notes, *self.fit.warnings)


def _silent(line: str) -> None:
    pass


def analyse(config: FitConfig, on_progress: Callable[[str], None] = _silent) -> Analysis:
    """Read the tables, fit the laws, propose a mixture.

    Args:
        on_progress: called with a line before each part that may take minutes.

    Raises:
        UserError: as ``read_inputs``; bounds that no mixture satisfies; a prior or a law that does not fit.
    """
    inputs = read_inputs(config)
    runs, domains, metrics = len(inputs.fitted.runs), len(inputs.domains), len(inputs.metrics)
    on_progress(f"fitting: {runs} runs, {domains} domains, {metrics} metrics")
    fit = _fit(config, inputs.fitted)
    held_out = inputs.held_out
    held_out_losses = fit.law.predict(held_out.ratios) if held_out else None
    outcome = None
    if not config.proposer.fit_only:
        outcome = _propose(config, inputs, fit, on_progress)
    return Analysis(config, inputs, fit, held_out_losses, outcome)


def _fit(config: FitConfig, swarm: Swarm) -> LawFit:
    observations = Observations(swarm.ratios, swarm.losses, names=swarm.metrics, components=swarm.domains)
    law = config.law
    try:
        return fit_law(
            observations,
            family=config.regression.family,
            seed=config.regression.seed,
            huber_delta=law.huber_delta,
            num_starts=law.num_starts,
            averaging=law.averaging,
        )
    except ValueError as error:
        raise UserError(f"the laws cannot be fitted: {error}") from error


def _propose(config: FitConfig, inputs: Inputs, fit: LawFit, on_progress: Callable[[str], None]) -> Outcome:
    current = inputs.current
    current_losses = None if current is None else fit.law.predict(current[None], averaging=False)[0]
    try:
        problem = _problem(config, inputs, current_losses)
        if config.proposer.make_worst_mix:  # without intervals: those are of the best mixture
            return Outcome(problem, _worst(config, fit, problem), current_losses)
        proposal = propose(fit.law, problem, seed=config.regression.seed)
        outcome = Outcome(problem, proposal, current_losses)
        if config.bootstrap.count:
            on_progress(f"intervals: {config.bootstrap.count} fits to resampled losses")
        return _with_errors(config, fit, outcome, current) if config.bootstrap.count else outcome
    except InfeasibleError as error:
        raise UserError(f"no mixture satisfies the bounds: {error}") from error
    except (ValueError, SolverError) as error:
        raise UserError(f"no mixture can be proposed: {error}") from error


def _with_errors(config: FitConfig, fit: LawFit, outcome: Outcome, current: np.ndarray | None) -> Outcome:
    """With intervals, and where there is a current mixture with the decision whether to leave it."""
    settings, problem, proposal = config.bootstrap, outcome.problem, outcome.proposal
    spread = bootstrap(
        fit, problem, count=settings.count, seed=config.regression.seed, keep=current, proposal=proposal
    )
    if current is None:
        return replace(outcome, bootstrap=spread)
    gain = predicted_gain(fit.law, problem, spread, keep=current, u=proposal.u)
    decision = decide(gain.value, gain.stderr, confidence=settings.confidence)
    return replace(outcome, bootstrap=spread, gain=gain, decision=decision)


def _problem(config: FitConfig, inputs: Inputs, current_losses: np.ndarray | None) -> Problem:
    return Problem(
        composition=np.eye(len(inputs.domains)),
        prior=inputs.prior,
        kl=config.proposer.kl,
        objective=config.objective.type,
        omega=inputs.omega,
        reference=current_losses if inputs.reference is None else inputs.reference,
        max_increase=inputs.max_increase,
        floors=inputs.floors,
        caps=inputs.caps,
        domains=inputs.domains,
        losses=inputs.metrics,
    )


@dataclass(frozen=True)
class _Reversed:
    """A law's losses taken from a ceiling: the best mixture under it is the worst under the law."""

    law: Law
    ceiling: float

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        return self.ceiling - self.law.predict(candidates, averaging=averaging)


@dataclass(frozen=True)
class _SmoothReversed(_Reversed):
    law: SmoothLaw

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        return -self.law.gradient(u, averaging=averaging)


def _worst(config: FitConfig, fit: LawFit, problem: Problem) -> Proposal:
    """The mixture that the law itself expects to be worst, and the losses that it expects of it."""
    law, ceiling = fit.law, 2 * float(fit.measured.max())
    reversed_law = _SmoothReversed(law, ceiling) if isinstance(law, SmoothLaw) else _Reversed(law, ceiling)
    found = propose(reversed_law, problem, seed=config.regression.seed)
    predicted = fit.law.predict(found.u[None], averaging=False)[0]
    return replace(found, predicted=predicted, objective=problem.total(predicted, found.u))
