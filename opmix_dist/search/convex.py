"""The proposal of convex laws: one program with exponential cones, compiled once and solved for many laws."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np

from opmix_dist.search.feasibility import InfeasibleError, SolverError, least_amounts, share_bounds
from opmix_dist.search.laws import ConvexLaw, LogLinearLaw
from opmix_dist.search.problem import TOLERANCE, Problem

# Where rounding keeps the solver from its usual 1e-8, as the worst of several losses that tie may: still less
# than bounds are held to (problem.TOLERANCE).
COARSE = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-7)


class ConvexProgram:
    """A problem and a family of convex laws; ``solve`` gives the u [K] of a law.

    Compiling takes some 25 ms. Log-linear laws enter as parameters, so that each further one takes a fifth of
    that; laws of which nothing is known but their expression are compiled each time.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._compiled: dict[bool, _Compiled] = {}

    def solve(self, law: ConvexLaw) -> np.ndarray:
        """u [K] of the least total.

        Raises:
            InfeasibleError: the law's losses pass their bounds everywhere that caps and floors allow; names
                the losses and the amounts, of several those whose sum is least.
            SolverError: Clarabel found no optimum.
        """
        if not self.problem.bounds_losses:
            return self._program(law, elastic=False).solve(law)
        try:
            return self._program(law, elastic=False).solve(law)
        except SolverError:
            closest = self._program(law, elastic=True).solve(law)
            predicted = law.predict(closest[None], averaging=False)
            failures = self.problem.violations(predicted[0], closest)
            if not failures:
                raise
            message = "no mixture that caps and floors allow keeps the losses within their bounds"
            raise InfeasibleError(f"{message}: {least_amounts(failures)}", closest, failures) from None

    @staticmethod
    def reuses(law: ConvexLaw) -> bool:
        """Whether what was compiled for one law of this kind serves for all."""
        return isinstance(law, LogLinearLaw)

    def _program(self, law: ConvexLaw, *, elastic: bool) -> _Compiled:
        if not self.reuses(law):
            return _Compiled(self.problem, law, elastic)
        if elastic not in self._compiled:
            self._compiled[elastic] = _Compiled(self.problem, law, elastic)
        return self._compiled[elastic]


class _Compiled:
    """elastic: minimises the sum by which losses pass their bounds, in place of the problem's total."""

    def __init__(self, problem: Problem, law: ConvexLaw, elastic: bool) -> None:
        self.usable = problem.usable
        self.weights = cp.Variable(int(self.usable.sum()), nonneg=True)
        u = np.eye(len(self.usable))[:, self.usable] @ self.weights
        losses, self.enter = _losses(law, u)
        constraints = [cp.sum(self.weights) == 1]
        rows, limits = share_bounds(problem)
        if len(rows):
            constraints.append(rows @ self.weights <= limits)
        # Half of the tolerance is room for bounds that leave a single point, which no interior method likes.
        ceiling = problem.ceiling(losses.shape[0]) + TOLERANCE / 2
        bounded = np.flatnonzero(np.isfinite(ceiling))
        excess = cp.Variable(bounded.size, nonneg=True) if elastic else np.zeros(bounded.size)
        if bounded.size:
            constraints.append(losses[bounded] <= ceiling[bounded] + excess)
        aim = cp.sum(excess) if elastic else _total(problem, losses, u)
        self.problem = cp.Problem(cp.Minimize(aim), constraints)

    def solve(self, law: ConvexLaw) -> np.ndarray:
        self.enter(law)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of inaccuracy: the status below says so
                self.problem.solve(solver=cp.CLARABEL)
                if self.problem.status == cp.OPTIMAL_INACCURATE:  # flat, or with several optima
                    self.problem.solve(solver=cp.CLARABEL, **COARSE)
        except cp.SolverError as error:
            raise SolverError(f"Clarabel failed on the proposal: {error}") from error
        if self.problem.status != cp.OPTIMAL or self.weights.value is None:
            raise SolverError(
                f"Clarabel found no optimum of the proposal: its status is {self.problem.status}"
            )
        u = np.zeros(len(self.usable))
        u[self.usable] = np.clip(self.weights.value, 0, None)
        return u / u.sum()


def _total(problem: Problem, losses: cp.Expression, u: cp.Expression) -> cp.Expression:
    count = losses.shape[0]
    if problem.objective in ("mean", "relative"):
        total = problem.rates(count) @ losses
    else:
        offsets = problem.offsets(count)
        counts = np.flatnonzero(np.isfinite(offsets))
        total = cp.max(losses[counts] - offsets[counts])
    if problem.kl > 0:
        drawn = problem.prior > 0
        x = problem.expanded.T[drawn] @ u
        total += problem.kl * cp.sum(cp.rel_entr(x, problem.prior[drawn]))
    return total


def _losses(law: ConvexLaw, u: cp.Expression) -> tuple[cp.Expression, Callable[[ConvexLaw], None]]:
    """The losses of a law, and what enters another law of its kind."""
    if not isinstance(law, LogLinearLaw):
        return law.expression(u), lambda _: None
    floor, t = cp.Parameter(len(law.t), nonneg=True), cp.Parameter(law.t.shape)

    def enter(law: ConvexLaw) -> None:
        assert isinstance(law, LogLinearLaw)
        floor.value, t.value = np.exp(law.log_c), law.t

    return floor + cp.exp(t @ u), enter
