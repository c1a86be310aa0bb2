"""Search without laws: descent over mixtures with the exact gradients of the simulated losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from scipy.special import rel_entr

from opmix_dist.search.ask_tell import MixtureSearch, SearchResult, best_measured
from opmix_dist.search.feasibility import InfeasibleError, least_amounts, require_feasible_shares
from opmix_dist.search.laws import Observations
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal, propose

# A step counts where the objective falls by at least the first part of what the model promised; damping is
# lowered where it falls by the second.
SUFFICIENT, GOOD = 0.1, 0.75
# Damping to begin with, as a part of a loss's slope, and what changes it.
DAMPING, RAISED, LOWERED = 0.1, 8.0, 0.25
# A nat, or a share, by which a bound is passed counts as this many nats of the objective: more than what
# moving a bound is worth, or points beyond it would be preferred.
PENALTY = 10.0
# Part of a loss that its slopes are taken to come from, at first.
REDUCIBLE = 0.3
# Evaluated mixtures, the nearest, from which the curvature around a centre is learnt.
MEMORY = 4


@dataclass(frozen=True)
class LocalModel:
    """A convex law of losses near a point: L_i + g_i . d + d . H_i d / 2, d = u - point.

    point: [K]; losses: [D]; gradients: g [D, K]; curvature: H [D, K, K], positive semidefinite.
    """

    point: np.ndarray
    losses: np.ndarray
    gradients: np.ndarray
    curvature: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]; there is no averaging term."""
        d = candidates - self.point
        return self.losses + d @ self.gradients.T + np.einsum("mk,ikl,ml->mi", d, self.curvature, d) / 2

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        return self.gradients + self.curvature @ (u - self.point)

    def expression(self, u: cp.Variable) -> cp.Expression:
        """The D losses for cvxpy: H_i = R_i^T R_i."""
        values, vectors = np.linalg.eigh(self.curvature)
        roots = np.sqrt(np.maximum(values, 0))[..., None] * vectors.swapaxes(1, 2)
        d = u - self.point
        return self.losses + self.gradients @ d + cp.hstack([cp.sum_squares(root @ d) / 2 for root in roots])


class GradientSearch(MixtureSearch):
    """Evaluates one mixture at a time, losses and gradients, and moves where they point: no laws.

    Each step minimises the problem, KL and bounds included, over local models of the losses: their gradients,
    a curvature of each that is learnt from the gradients at other mixtures (damped BFGS), and damping that
    rises where a step does not bring what it promised and falls where it does (Levenberg-Marquardt). It ends
    when no step promises more than ``tolerance`` nats. The proposal is the best evaluated mixture that keeps
    the bounds to within that. From mixtures that pass bounds it moves to where they are passed least.

    start: u [K], where it begins, for example the current mixture. InfeasibleError where no mixture of the
    components satisfies the caps and floors.
    """

    def __init__(
        self,
        problem: Problem,
        start: np.ndarray,
        *,
        max_evaluations: int = 12,
        tolerance: float = 1e-4,
        components: Sequence[str] = (),
    ) -> None:
        super().__init__(problem, np.asarray(start)[None], wants_gradients=True, components=components)
        if max_evaluations < 1 or not tolerance > 0:
            raise ValueError(
                f"need max_evaluations >= 1 and tolerance > 0, got {max_evaluations} and {tolerance}"
            )
        require_feasible_shares(problem)
        self._max_evaluations, self._tolerance = max_evaluations, tolerance
        self._damping = DAMPING
        self._centre: Observations | None = None  # one row: where the next step begins
        self._promised = 0.0  # by which the merit should fall with the step that was asked
        self._why_ended = "the mixture that was asked waits for its losses"

    def _decide(self) -> np.ndarray | None:
        told = self._told[-1]
        if self._centre is None:
            self._centre = told
        else:
            self._move(self._centre, told)
        if self.rounds == self._max_evaluations:
            self._why_ended = f"all {self.rounds} evaluations are used"
            return None
        u, merit = self._step()
        self._promised = self._merit(self._centre) - merit
        if self._promised <= self._tolerance:
            self._why_ended = f"no step promises more than {self._tolerance:g} nats"
            return None
        return u[None]

    def _step(self) -> tuple[np.ndarray, float]:
        """u [K] of the least objective that the model has within the bounds, or where it sees no way to keep
        those of the losses, of the least excess over them; and the model's merit there."""
        model = self._model()
        try:
            step = propose(model, self.problem)
        except InfeasibleError as error:
            u = error.closest
            return u, self._merit_of(model.predict(u[None]), u[None])
        return step.u, step.objective

    def _model(self) -> LocalModel:
        """Around the centre, with damping in proportion to each loss's slope, so that no unit matters."""
        assert self._centre is not None
        gradients = _gradients(self._centre)
        slope = np.linalg.norm(_along_simplex(gradients), axis=1)
        damping = self._damping * slope[:, None, None] * np.eye(gradients.shape[1])
        return LocalModel(
            self._centre.candidates[0],
            self._centre.losses[0],
            gradients,
            _curvature(self._centre, self._told) + damping,
        )

    def _move(self, centre: Observations, told: Observations) -> None:
        """Take the step that was tried, or not, and trust the next one more or less."""
        fell = self._merit(centre) - self._merit(told)  # inf if the prior forbids the start: then it is left
        if fell < SUFFICIENT * self._promised:
            self._damping = max(self._damping, DAMPING) * RAISED
            return
        self._centre = told
        if fell > GOOD * self._promised:
            self._damping *= LOWERED

    def _merit(self, told: Observations) -> float:
        return self._merit_of(told.losses, told.candidates)

    def _merit_of(self, losses: np.ndarray, u: np.ndarray) -> float:
        """The objective, and a price for each bound that is passed, of losses [1, D] at u [1, K]: an exact
        penalty."""
        excess = self.problem.excesses(losses, u).sum()
        return float(self.problem.totals(losses, u)[0] + PENALTY * excess)

    def _best(self) -> int | None:
        return best_measured(self.problem, self.observations, self._tolerance)

    def _result(self) -> SearchResult:
        row = self._best()
        if row is None:
            raise self._infeasible()
        observations = self.observations
        u, losses = observations.candidates[row], observations.losses[row]
        mixture = u @ self.problem.expanded
        proposal = Proposal(
            u=u,
            mixture=mixture,
            predicted=losses,
            objective=self.problem.total(losses, u),
            kl_divergence=float(rel_entr(mixture, self.problem.prior).sum()),
            solver_status="measured",
        )
        return SearchResult(None, proposal, self.rounds, self._why_ended)

    def _infeasible(self) -> InfeasibleError:
        observations = self.observations
        excess = self.problem.excesses(observations.losses, observations.candidates)
        row = int(excess.sum(axis=1).argmin())
        failures = self.problem.in_words(excess[row], self._tolerance)
        message = f"none of {self.rounds} evaluated mixtures keeps the bounds: {least_amounts(failures)}"
        return InfeasibleError(message, observations.candidates[row], failures)


def _gradients(told: Observations) -> np.ndarray:
    """[D, K] of a single row; the guard of every tell has seen them."""
    assert told.gradients is not None
    return told.gradients[0]


def _along_simplex(gradients: np.ndarray) -> np.ndarray:
    """What of gradients [..., K] moves on the simplex can see: the rest adds the same to each component."""
    return gradients - gradients.mean(axis=-1, keepdims=True)


def _curvature(centre: Observations, told: Sequence[Observations]) -> np.ndarray:
    """H [D, K, K] around a centre: a first guess, and how gradients turn towards the mixtures that lie
    nearest, the nearest last, which counts most.

    The guess is that of L = C + exp(t . u) with slopes g: g g^T / exp(t . u), exp(t . u) a fixed part of L.
    It is right to a factor only; without it the first steps are half as good.
    """
    slopes = _along_simplex(_gradients(centre))
    curvature = np.einsum("ik,il->ikl", slopes, slopes) / (REDUCIBLE * centre.losses[0])[:, None, None]
    others = [other for other in told if other is not centre]
    others.sort(key=lambda other: -np.abs(other.candidates - centre.candidates).sum())
    for other in others[-MEMORY:]:
        step = other.candidates[0] - centre.candidates[0]
        turned = _along_simplex(_gradients(other) - _gradients(centre))
        curvature = np.stack([_updated(H, step, y) for H, y in zip(curvature, turned, strict=True)])
    return curvature


def _updated(curvature: np.ndarray, step: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """H [K, K] that knows a step [K], which turned the gradient by [K]: BFGS, damped where the loss is not
    convex along the step, so that H stays positive semidefinite (Powell, 1978; Nocedal and Wright, 18.2)."""
    across = curvature @ step
    known, seen = step @ across, step @ turned
    if known <= 0:  # nothing is known along the step: there is nothing to take away
        return curvature + np.outer(turned, turned) / seen if seen > 0 else curvature
    part = 1.0 if seen >= 0.2 * known else 0.8 * known / (known - seen)
    blend = part * turned + (1 - part) * across
    return curvature - np.outer(across, across) / known + np.outer(blend, blend) / (step @ blend)
