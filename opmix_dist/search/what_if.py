"""What a law says of any mixture: losses and their differences with intervals, and how far it reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from opmix_dist.search.laws import Law

# Candidates whose distance from the others is looked at: a linear program each.
MOST_CANDIDATES = 64
# A mixture that is farther from the candidates than this share of them is from the others is extrapolated to.
ORDINARY = 0.9


@dataclass(frozen=True)
class Band:
    """Values with the interval that they lie in by the resampled laws, each [P, D], nats per token."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """Losses at P mixtures by a law [P, D] and by each law of a bootstrap [B, P, D].

    Without the averaging term: what the mixtures themselves give.
    """

    losses: np.ndarray
    resampled: np.ndarray

    @classmethod
    def of(cls, law: Law, resampled: Sequence[Law], U: np.ndarray) -> Forecast:
        """At coefficients U [P, K]."""
        draws = [one.predict(U, averaging=False) for one in resampled]
        return cls(law.predict(U, averaging=False), np.stack(draws))

    def joined(self, values: Callable[[np.ndarray], np.ndarray]) -> Forecast:
        """The same of something that depends on the losses: ``values`` takes [..., D] to [..., E]."""
        return Forecast(values(self.losses), values(self.resampled))

    def levels(self, confidence: float) -> Band:
        """Losses [P, D]; the share ``confidence`` of the resampled laws lies within the interval."""
        return _band(self.losses, self.resampled, confidence)

    def changes(self, start: int, confidence: float) -> Band:
        """Losses [P, D] minus those of mixture number ``start``.

        Paired: each resampled law is taken at both, so that what shifts both alike drops out. The intervals
        are therefore narrower than the difference of two ``levels`` would make believe.
        """
        row = slice(start, start + 1)
        return _band(self.losses - self.losses[row], self.resampled - self.resampled[:, row], confidence)


def _band(value: np.ndarray, draws: np.ndarray, confidence: float) -> Band:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence:g}")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Band(value, low, high)


def with_shares(mixture: np.ndarray, shares: Mapping[int, float]) -> np.ndarray:
    """The mixture [X] with some shares fixed by number; the others keep their proportions among each other.

    Raises:
        ValueError: shares that are no shares, sum to more than 1, or leave a rest that nobody can take.
    """
    fixed = np.zeros(len(mixture), dtype=bool)
    result = np.array(mixture, dtype=np.float64)
    for index, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"a share must lie between 0 and 1, not {share:g}")
        fixed[index], result[index] = True, share
    rest = 1 - result[fixed].sum()
    others = result[~fixed].sum()
    if rest < -1e-9:
        raise ValueError(f"the shares that are set sum to {result[fixed].sum():.6g}, which is more than 1")
    if rest > 1e-9 and others <= 0:
        raise ValueError(
            f"the shares that are set sum to {result[fixed].sum():.6g}, and the other domains have no share "
            "in the mixture that could grow to fill the rest: set one of them, too"
        )
    result[~fixed] *= max(rest, 0.0) / others if others > 0 else 0.0
    return result / result.sum()


def as_mixed_as(like: np.ndarray, u: np.ndarray, composition: np.ndarray) -> np.ndarray:
    """Coefficients [K] of the mixture C^T u that mix as many probes as ``like`` [K], as nearly as can be.

    Models that mix several probes gain from averaging, whatever the probes were trained on: mixtures are
    compared at like 1 / sum u^2, the effective number of probes, so that such gains drop out. Between ``u``,
    which mixes most (``coefficients_of``), and the coefficients of the same mixture that mix least, a point
    is taken; where a mixture has only one set of coefficients there is nothing to choose.

    Args:
        u: [K], of all coefficients of its mixture those of the least sum of squares; composition: C [K, X].
    """
    away = _least_mixed(u, composition) - u
    square, slope, missing = away @ away, u @ away, u @ u - like @ like
    if square < 1e-18 or missing >= 0:
        return u
    # |u + b away|^2 = |like|^2 for the b above 0, as far as the least mixed at most
    b = min((-slope + np.sqrt(slope**2 - square * missing)) / square, 1.0)
    moved = np.clip(u + b * away, 0, None)
    return moved / moved.sum()


def _least_mixed(u: np.ndarray, composition: np.ndarray) -> np.ndarray:
    """Of the coefficients of u's mixture with as much of one component as there can be, the least mixed."""
    found = [u]
    for component in np.eye(len(u)):
        program = linprog(
            -component,
            A_eq=np.vstack([composition.T, np.ones(len(u))]),
            b_eq=np.append(u @ composition, 1.0),
            bounds=(0, None),
        )
        if program.status == 0:  # else u, within rounding of the border, is all that there is
            found.append(np.clip(program.x, 0, None) / np.clip(program.x, 0, None).sum())
    return max(found, key=lambda point: float(point @ point))


@dataclass(frozen=True)
class Reach:
    """How far from the candidates U [M, K] a law is asked, in shares of the coefficients.

    ordinary: the distance that nine of ten candidates keep from the others, where they are left out. Beyond
        it the left-out errors of a fit, and the intervals that come from them, say nothing.
    """

    candidates: np.ndarray
    ordinary: float

    @classmethod
    def of(cls, candidates: np.ndarray) -> Reach:
        rows = np.unique(np.linspace(0, len(candidates) - 1, MOST_CANDIDATES).round().astype(int))
        distances = [distance_outside(candidates[m], np.delete(candidates, m, axis=0)) for m in rows]
        return cls(candidates, float(np.quantile(distances, ORDINARY)))

    def distance(self, u: np.ndarray) -> float:
        return distance_outside(u, self.candidates)

    def covers(self, u: np.ndarray) -> bool:
        return self.distance(u) <= self.ordinary + 1e-9


def distance_outside(u: np.ndarray, candidates: np.ndarray) -> float:
    """The least share of u [K] that has to move to bring it into the convex hull of the rows U [M, K].

    The total variation distance to the nearest point of the hull, by a linear program: 0 within the hull, 1
    for a corner that no candidate has a share of; 1 without candidates.
    """
    points, components = candidates.shape
    if points == 0:
        return 1.0
    # u = U^T w + plus - minus, w on the simplex; sum(plus) = sum(minus) is what moves
    identity = np.eye(components)
    found = linprog(
        np.concatenate([np.zeros(points), np.ones(components), np.zeros(components)]),
        A_eq=np.vstack(
            [
                np.hstack([candidates.T, identity, -identity]),
                np.concatenate([np.ones(points), np.zeros(2 * components)]),
            ]
        ),
        b_eq=np.append(u, 1.0),
        bounds=(0, None),
    )
    if found.status != 0:
        raise RuntimeError(f"the distance to the candidates could not be computed: {found.message}")
    return max(float(found.fun), 0.0)
