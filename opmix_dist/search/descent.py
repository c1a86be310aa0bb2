"""The proposal of laws that are not convex: descent from several points, points alone for laws of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize

from opmix_dist.search.feasibility import InfeasibleError, corners, drawn_in, share_bounds
from opmix_dist.search.laws import Law, SmoothLaw
from opmix_dist.search.problem import TOLERANCE, Problem

# Points that the law is asked about before any descent; how many of the best, at which distance from each
# other (sum of absolute differences), are descended from.
POINTS = 4096
STARTS = 6
APART = 0.3
ITERATIONS = 200
# Laws of steps: rounds of points that lie by such a part from the best so far; the best of all are averaged.
# RegMix (arXiv 2407.01492) averages the best 100 of 100,000 points; the rounds make up for fewer.
ROUNDS = (0.5, 0.25, 0.12, 0.06)
BEST_AVERAGED = 64
# The part of the points that is enough where the optimum is known roughly: an eighth.
FEWER = 8


def sampled(law: Law, problem: Problem, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """u [K]: the mean of the best of many points, as RegMix takes it (arXiv 2407.01492); for laws of steps.

    Where the mean passes a bound of the losses, as means of feasible points may, the best point is taken.
    start: u [K] near the optimum: fewer points. Raises InfeasibleError where no point is feasible.
    """
    fewer = 1 if start is None else FEWER
    count, averaged = POINTS // fewer, BEST_AVERAGED // fewer
    points = _points(problem, seed, count)
    best = _best(law, problem, points if start is None else np.vstack([points, start]))[:averaged]
    rng = np.random.default_rng([seed, 1])
    for part in ROUNDS:
        centres, others = rng.integers(len(best), size=count), rng.integers(len(points), size=count)
        near = (1 - part) * best[centres] + part * points[others]
        best = _best(law, problem, np.vstack([best, near]))[:averaged]
    for u in (best.mean(axis=0), best[0]):
        failures = problem.violations(law.predict(u[None], averaging=False)[0], u)
        if not failures:
            return u
    raise _infeasible(best[0], failures)


def descended(law: SmoothLaw, problem: Problem, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """u [K]: the lowest feasible end of SLSQP, with exact Jacobians, from the best of many points.

    start: u [K], is begun from alone where it is given. Raises InfeasibleError where descent of the amounts
    by which bounds are passed reaches no feasible point either.
    """
    if start is None:
        starts = _apart(_best(law, problem, _points(problem, seed, POINTS)))
    else:
        starts = start[None]
    program = _Program(law, problem)
    if problem.violations(program.losses(starts[0]), starts[0]):
        # The starts are sorted, so none is allowed: first to where bounds are passed least.
        ends = [program.descend(u, elastic=True) for u in starts]
        starts = _best(law, problem, np.vstack([starts, *ends]))[: len(starts)]
        failures = problem.violations(program.losses(starts[0]), starts[0])
        if failures:
            raise _infeasible(starts[0], failures)
    ends = [program.descend(u, elastic=False) for u in starts]
    return _best(law, problem, np.vstack([starts, *ends]))[0]


def _infeasible(closest: np.ndarray, failures: list[str]) -> InfeasibleError:
    return InfeasibleError(
        "no mixture was found that caps and floors allow and that keeps the losses within their bounds: "
        f"of all that were tried, they fail least where {' and '.join(failures)}",
        closest,
        failures,
    )


def _points(problem: Problem, seed: int, number: int) -> np.ndarray:
    """U [N, K] that caps and floors allow: corners, and ``number`` mixtures of corners and points of the
    simplex, half of them spread evenly and half near few components, drawn in to the middle until allowed."""
    rng = np.random.default_rng([seed, 0])
    hull = corners(problem, len(problem.usable), rng)
    between = rng.dirichlet(np.ones(len(hull)), size=number // 4) @ hull
    count = int(problem.usable.sum())
    even = rng.dirichlet(np.ones(count), size=3 * number // 8)
    few = rng.dirichlet(np.full(count, 1 / count), size=3 * number // 8)
    drawn = np.zeros((len(even) + len(few), len(problem.usable)))
    drawn[:, problem.usable] = np.vstack([even, few])
    return np.vstack([hull, between, drawn_in(problem, drawn, hull.mean(axis=0))])


def _best(law: Law, problem: Problem, points: np.ndarray) -> np.ndarray:
    """U [N, K] sorted: by the amount by which bounds are passed, then by the problem's total."""
    losses = law.predict(points, averaging=False)
    passed = problem.excesses(losses, points)
    passed = np.where(passed > TOLERANCE, passed, 0).sum(axis=1)
    return points[np.lexsort((problem.totals(losses, points), passed))]


def _apart(points: np.ndarray) -> np.ndarray:
    """The first of the points [N, K] that lie apart, at most ``STARTS``."""
    chosen = points[:1]
    for point in points[1:]:
        if len(chosen) == STARTS:
            break
        if (np.abs(chosen - point).sum(axis=1) > APART).all():
            chosen = np.vstack([chosen, point])
    return chosen


class _Program:
    """One problem and law for SLSQP. Its variables are the weights of the usable components, and after them
    what makes kinks smooth: the worst loss as a variable of its own, or (elastic) the amount by which each
    bounded loss passes its bound, whose sum is then minimised in place of the total."""

    def __init__(self, law: SmoothLaw, problem: Problem) -> None:
        self.law, self.problem, self.usable = law, problem, problem.usable
        self.num_weights = int(self.usable.sum())
        count = law.predict(np.eye(len(self.usable))[:1]).shape[1]
        self.ceiling = problem.ceiling(count)
        self.bounded = np.flatnonzero(np.isfinite(self.ceiling))
        self.offsets = None if problem.objective in ("mean", "relative") else problem.offsets(count)
        self._last: tuple[bytes, np.ndarray, np.ndarray] | None = None

    def losses(self, u: np.ndarray) -> np.ndarray:
        return self.law.predict(u[None], averaging=False)[0]

    def descend(self, u: np.ndarray, *, elastic: bool) -> np.ndarray:
        """Where SLSQP ends from u [K], on the simplex; u itself where it leaves the finite."""
        losses = self.losses(u)
        kinks: np.ndarray = np.empty(0)
        if elastic:
            kinks = np.maximum(losses - self.ceiling, 0)[self.bounded]
        elif self.offsets is not None:
            kinks = np.array([self.problem.value(losses)])
        found = minimize(
            self._amounts if elastic else self._total,
            np.append(u[self.usable], kinks),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * self.num_weights + [(0 if elastic else None, None)] * len(kinks),
            constraints=list(self._constraints(elastic)),
            options={"ftol": 1e-12, "maxiter": ITERATIONS},
        )
        weights = np.clip(found.x[: self.num_weights], 0, 1)
        if not np.isfinite(weights).all() or not weights.sum() > 0:
            return u
        end = np.zeros(len(u))
        end[self.usable] = weights / weights.sum()
        return end

    def _at(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u [K], the losses [D] and their Jacobian in the weights [D, k]."""
        u = np.zeros(len(self.usable))
        u[self.usable] = z[: self.num_weights]
        if self._last is None or self._last[0] != u.tobytes():  # SLSQP asks for each several times
            slopes = self.law.gradient(u, averaging=False)[:, self.usable]
            self._last = (u.tobytes(), self.losses(u), slopes)
        return u, *self._last[1:]

    def _total(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        u, losses, slopes = self._at(z)
        slope = np.zeros(len(z))
        if self.offsets is None:
            value = float(self.problem.value(losses))
            slope[: self.num_weights] = self.problem.slope(losses) @ slopes
        else:
            value, slope[-1] = float(z[-1]), 1.0
        if self.problem.kl > 0:
            drawn = self.problem.prior > 0
            prior, shares = self.problem.prior[drawn], self.problem.expanded[:, drawn]
            x = np.maximum(u @ shares, 1e-12)  # finite slopes on the edge of the simplex
            value += self.problem.kl * float(x @ np.log(x / prior))
            slope[: self.num_weights] += self.problem.kl * (shares[self.usable] @ (np.log(x / prior) + 1))
        return value, slope

    def _amounts(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.append(np.zeros(self.num_weights), np.ones(len(z) - self.num_weights))
        return float(z @ slope), slope

    def _constraints(self, elastic: bool) -> list[dict[str, Any]]:
        rows, limits = share_bounds(self.problem)
        counted = np.flatnonzero(np.isfinite(self.offsets)) if self.offsets is not None else np.empty(0, int)
        kinks = len(self.bounded) if elastic else int(self.offsets is not None)

        def linear(matrix: np.ndarray, constant: np.ndarray | float) -> dict[str, Any]:
            padded = np.hstack([matrix, np.zeros((len(matrix), kinks))])
            return {"fun": lambda z: padded @ z + constant, "jac": lambda _: padded}

        def of_losses(which: np.ndarray, limit: np.ndarray, kink: np.ndarray) -> dict[str, Any]:
            """limit + kink @ (what follows the weights) - losses, of some of the losses."""
            return {
                "fun": lambda z: limit + kink @ z[self.num_weights :] - self._at(z)[1][which],
                "jac": lambda z: np.hstack([-self._at(z)[2][which], kink]),
            }

        constraints = [{"type": "eq", **linear(np.ones((1, self.num_weights)), -1.0)}]
        if len(rows):
            constraints.append({"type": "ineq", **linear(-rows, limits)})
        if self.bounded.size:
            kink = np.eye(kinks) if elastic else np.zeros((self.bounded.size, kinks))
            constraints.append({"type": "ineq", **of_losses(self.bounded, self.ceiling[self.bounded], kink)})
        if self.offsets is not None and not elastic:
            kink = np.ones((counted.size, 1))
            constraints.append({"type": "ineq", **of_losses(counted, self.offsets[counted], kink)})
        return constraints
