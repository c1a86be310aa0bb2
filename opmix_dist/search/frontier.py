"""The Pareto front between the losses of two domains or groups: what one costs the other, at best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import cvxpy as cp
import numpy as np

from opmix_dist.search.laws import ConvexLaw, Law, SmoothLaw
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import InfeasibleError, propose

# Weight of the other loss at an end of the front. It breaks ties between mixtures that serve the first loss
# alike; what it costs the first loss is of second order in it, hence below the solvers' tolerance.
TIE_BREAK = 1e-4
# Points that are closer than this share of the front's extent, in both losses, count as one.
RESOLUTION = 5e-3
# A front whose ends differ by less than this, in nats, is one point: no loss has to pay for the other.
NO_TRADE_OFF = 1e-6


@dataclass(frozen=True)
class Frontier:
    """Mixtures of which none is better in both losses than another, by ascending first loss.

    u: [P, K] coefficients; mixtures: [P, X]; losses: [P, 2], nats per token, without the averaging term.
    """

    u: np.ndarray
    mixtures: np.ndarray
    losses: np.ndarray


def pareto_front(
    law: Law,
    problem: Problem,
    first: np.ndarray,
    second: np.ndarray,
    *,
    points: int = 15,
    kl: float = 0.0,
    seed: int = 0,
) -> Frontier:
    """The front between two weighted sums of losses, within the floors, caps and loss bounds of ``problem``.

    After its two ends, the widest gap is filled until there are enough points: by the weighted sum whose
    level lines run along the gap's chord, which finds the convex parts (Aneja and Nair 1979, doi
    10.1287/mnsc.25.1.73), then by bounding one loss in the middle of the gap and minimising the other, which
    also finds points of straight and of hollow parts. A gap where neither finds a point is one of the front.

    Args:
        first, second: weights of the D losses [D], not negative and not all 0; for the mean of a group, one
            over its size in its places.
        points: most points of the front, at least 2. Fewer are found where the front is short.
        kl: weight of KL(x || prior), nats; the problem's own is not used. Above 0 the points are those
            of the front that the prior pulls inwards.
        seed: of the solvers' starts, where the law is not convex.

    Raises:
        ValueError: wrong weights or number of points.
        InfeasibleError, SolverError: as of ``propose``.
    """
    if points < 2:
        raise ValueError(f"a front needs at least 2 points, not {points}")
    search = _TwoLosses(law, problem, first, second, kl, seed)
    ends = [search.weighted(1.0, TIE_BREAK), search.weighted(TIE_BREAK, 1.0)]
    found = sorted(ends, key=lambda point: point.losses[0])
    extent = found[1].losses - found[0].losses
    if (np.abs(extent) < NO_TRADE_OFF).any():
        best = min(found, key=lambda point: point.losses.sum())
        return _frontier([best], problem)
    closed: set[tuple[_Point, _Point]] = set()
    while len(found) < points:
        gaps = _open_gaps(found, np.abs(extent), closed)
        if not gaps:
            break
        left, right = max(gaps, key=lambda gap: gap[0])[1:]
        point = _between(search, left, right, found, np.abs(extent))
        if point is None:
            closed.add((left, right))
        else:
            found = _undominated([*found, point])
    return _frontier(found, problem)


@dataclass(frozen=True, eq=False)
class _Point:
    u: np.ndarray
    losses: np.ndarray  # [2]


class _TwoLosses:
    """``propose`` on the problem with the two sums as losses of their own, behind its D losses: so that they
    can be minimised and bounded like these."""

    def __init__(
        self, law: Law, problem: Problem, first: np.ndarray, second: np.ndarray, kl: float, seed: int
    ) -> None:
        weights = np.asarray([first, second], dtype=np.float64)
        if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any(axis=1).all():
            raise ValueError(f"weights must be finite, not negative and not all 0, got {weights.tolist()}")
        count = law.predict(np.eye(len(problem.expanded))[:1]).shape[1]
        if weights.shape != (2, count):
            raise ValueError(f"the law has {count} losses, and weights are given of {weights.shape[-1]}")
        self.law = _with_sums(law, weights)
        self.problem, self.weights, self.kl, self.seed = problem, weights, kl, seed

    def weighted(self, of_first: float, of_second: float) -> _Point:
        """The minimum of a weighted sum of both."""
        return self._solve(np.array([of_first, of_second]), np.full(2, np.inf))

    def bounded(self, minimised: int, bound: float) -> _Point | None:
        """The minimum of one, 0 or 1, while the other is at most ``bound``; None where that is impossible."""
        bounds = np.full(2, np.inf)
        bounds[1 - minimised] = bound
        try:
            return self._solve(np.eye(2)[minimised], bounds)
        except InfeasibleError:  # the bound lies within the solver's tolerance of the loss's minimum
            return None

    def _solve(self, omega: np.ndarray, bounds: np.ndarray) -> _Point:
        problem, count = self.problem, self.weights.shape[1]
        reference = np.ones(count) if problem.reference is None else problem.reference
        increase = np.full(count, np.inf) if problem.max_increase is None else problem.max_increase
        names = tuple(problem.losses) or tuple(f"loss {i}" for i in range(count))
        extended = replace(
            problem,
            objective="mean",
            kl=self.kl,
            omega=np.append(np.zeros(count), omega / omega.sum()),
            # a sum's bound is its reference, over which it may not rise
            reference=np.append(reference, np.where(np.isfinite(bounds), bounds, 1.0)),
            max_increase=np.append(increase, np.where(np.isfinite(bounds), 0.0, np.inf)),
            losses=(*names, "the first of the front", "the second of the front"),
        )
        u = propose(self.law, extended, seed=self.seed).u
        return _Point(u, self.law.predict(u[None], averaging=False)[0, count:])


@dataclass(frozen=True)
class _WithSums:
    """A law of D losses as one of D + 2: its own, and two weighted sums of them (weights [2, D])."""

    law: Law
    weights: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        losses = self.law.predict(candidates, averaging=averaging)
        return np.hstack([losses, losses @ self.weights.T])


@dataclass(frozen=True)
class _SmoothWithSums(_WithSums):
    law: SmoothLaw

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        gradient = self.law.gradient(u, averaging=averaging)
        return np.vstack([gradient, self.weights @ gradient])


@dataclass(frozen=True)
class _ConvexWithSums(_SmoothWithSums):
    """Weights are not negative, so that the sums are convex, too."""

    law: ConvexLaw

    def expression(self, u: cp.Variable) -> cp.Expression:
        losses = self.law.expression(u)
        return cp.hstack([losses, self.weights @ losses])


def _with_sums(law: Law, weights: np.ndarray) -> Law:
    if isinstance(law, ConvexLaw):
        return _ConvexWithSums(law, weights)
    return _SmoothWithSums(law, weights) if isinstance(law, SmoothLaw) else _WithSums(law, weights)


def _open_gaps(
    found: list[_Point], extent: np.ndarray, closed: set[tuple[_Point, _Point]]
) -> list[tuple[float, _Point, _Point]]:
    """(width, left, right) of neighbours; the width is a distance in shares of the extent [2]."""
    return [
        (float(np.linalg.norm((right.losses - left.losses) / extent)), left, right)
        for left, right in pairwise(found)
        if (left, right) not in closed
    ]


def _between(
    search: _TwoLosses, left: _Point, right: _Point, found: list[_Point], extent: np.ndarray
) -> _Point | None:
    """A new point of the front that lies in the gap, or None."""
    chord = right.losses - left.losses  # to the right and down
    middle = (left.losses + right.losses) / 2
    for attempt in (
        lambda: search.weighted(-chord[1], chord[0]),
        lambda: search.bounded(1, middle[0]),
        lambda: search.bounded(0, middle[1]),
    ):
        point = attempt()
        if point is None or not all(_apart(point, other, extent) for other in found):
            continue
        if any(kept is point for kept in _undominated([*found, point])):
            return point
    return None


def _apart(point: _Point, other: _Point, extent: np.ndarray) -> bool:
    return bool((np.abs(point.losses - other.losses) > RESOLUTION * extent).any())


def _undominated(points: list[_Point]) -> list[_Point]:
    """Those than which none is better in one loss and as good in the other, by ascending first loss."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda point: tuple(point.losses)):
        if not kept or point.losses[1] < kept[-1].losses[1]:
            kept.append(point)
    return kept


def _frontier(points: list[_Point], problem: Problem) -> Frontier:
    u = np.array([point.u for point in points])
    return Frontier(u, u @ problem.expanded, np.array([point.losses for point in points]))
