"""Whether caps and floors leave a mixture at all: a verdict by linear programs, not by solver tolerances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

from opmix_dist.search.problem import Problem


class InfeasibleError(ValueError):
    """No mixture of the components satisfies the bounds.

    closest: u [K] that passes them by the least amount in all; failures: each bound it passes, in words.
    """

    def __init__(self, message: str, closest: np.ndarray, failures: Sequence[str]) -> None:
        super().__init__(message)
        self.closest = closest
        self.failures = tuple(failures)


class SolverError(RuntimeError):
    """The solver stopped without an optimum."""


# Shares by which a cap or a floor may be passed: what linear programs resolve.
SHARE_TOLERANCE = 1e-7


def require_feasible_shares(problem: Problem) -> None:
    """InfeasibleError that names caps and floors, and the amounts by which they fail, where no u meets them.

    Of several that cannot hold together, those are named that fail where the sum of the failures is least.
    """
    rows, limits = share_bounds(problem)
    if not len(rows):
        return
    count, bounds = rows.shape[1], len(rows)
    found = linprog(
        np.append(np.zeros(count), np.ones(bounds)),
        A_ub=np.hstack([rows, -np.eye(bounds)]),
        b_ub=limits,
        A_eq=[np.append(np.ones(count), np.zeros(bounds))],
        b_eq=[1.0],
        bounds=(0, None),
    )
    if found.status != 0:
        raise SolverError(f"checking the caps and floors failed: {found.message}")
    if found.fun <= SHARE_TOLERANCE:
        return
    closest = np.zeros(len(problem.usable))
    closest[problem.usable] = found.x[:count] / found.x[:count].sum()
    failures = problem.in_words(problem.share_excesses(closest[None])[0], SHARE_TOLERANCE)
    reason = _contradiction(problem) or "no mixture of the components satisfies the caps and floors"
    raise InfeasibleError(f"{reason}: {least_amounts(failures)}", closest, failures)


def least_amounts(failures: Sequence[str]) -> str:
    """``a by 0.1 at least``, or of several those whose sum is least."""
    if len(failures) == 1:
        return f"{failures[0]} at least"
    return f"where they fail least in all, {' and '.join(failures)}"


def share_bounds(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Caps and floors as A v <= b over the usable components: A [B, k], b [B]; only those that can bind."""
    shares = problem.expanded[problem.usable].T  # [X, k]
    capped, floored = problem.highest < 1, problem.lowest > 0
    rows = np.vstack([shares[capped], -shares[floored]])
    return rows, np.append(problem.highest[capped], -problem.lowest[floored])


def corners(problem: Problem, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points U [V, K] around what caps and floors leave of the simplex.

    Without bounds the corners of the simplex; else the corners of the polytope that lie furthest in the
    direction of each component, away from it, and in ``count`` random directions.
    """
    usable = np.flatnonzero(problem.usable)
    rows, limits = share_bounds(problem)
    axes = np.eye(len(usable))
    if not len(rows):
        points = axes
    else:
        directions = np.vstack([axes, -axes, rng.standard_normal((count, len(usable)))])
        found = [_furthest(direction, rows, limits) for direction in directions]
        points = np.unique(np.round(found, 9), axis=0)
    full = np.zeros((len(points), len(problem.usable)))
    full[:, usable] = np.clip(points, 0, None)
    return full / full.sum(axis=1, keepdims=True)


def drawn_in(problem: Problem, points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Points U [N, K] moved towards an allowed centre [K], each no further than caps and floors ask."""
    rows, limits = share_bounds(problem)
    room = np.maximum(limits - rows @ centre[problem.usable], 0)  # [B]
    taken = (points - centre)[:, problem.usable] @ rows.T  # [N, B]
    far = np.divide(room, taken, out=np.ones_like(taken), where=taken > room)
    return centre + far.min(axis=1, initial=1.0)[:, None] * (points - centre)


def _furthest(direction: np.ndarray, rows: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """v [k] on the simplex with A v <= b that lies furthest in a direction [k]."""
    # The room lets bounds that leave one mixture pass, as the verdict above does.
    found = linprog(
        -direction,
        A_ub=rows,
        b_ub=limits + SHARE_TOLERANCE,
        A_eq=[np.ones(len(direction))],
        b_eq=[1.0],
        bounds=(0, None),
    )
    if found.status != 0:
        raise SolverError(f"no corner of what the caps and floors leave was found: {found.message}")
    return np.asarray(found.x)


def _contradiction(problem: Problem) -> str | None:
    """What caps and floors alone rule out, whatever the components are."""
    for name, low, high in zip(problem.domains, problem.lowest, problem.highest, strict=True):
        if low > high + SHARE_TOLERANCE:
            return f"the floor of {name} ({low:.4g}) is above its cap ({high:.4g})"
    if problem.lowest.sum() > 1 + SHARE_TOLERANCE:
        return f"floors sum to {problem.lowest.sum():.4g}"
    room = np.minimum(problem.highest, 1).sum()
    if room < 1 - SHARE_TOLERANCE:
        return f"caps sum to {room:.4g}: allow more repetitions or train on fewer tokens"
    return None
