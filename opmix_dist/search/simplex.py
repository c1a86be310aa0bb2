"""Points on the simplex: what the probes are trained on, and the candidates between them.

Two coordinates run through the search: u [K] over components (what is interpolated) and x [D] over domains
(what is trained on), tied by the composition matrix C [K, D] through x = C^T u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from scipy.stats import qmc

OLD = "old"
"""Name of the component that collapses what the model was trained on so far."""

# Shares that are missed by less are met: what the solver resolves.
REACH_TOLERANCE = 1e-6

TWO_PROBE_SHARES = (0.1, 0.9)
"""Share of the new domain in the two probes of a one-new-domain search (OP-Mix, arXiv 2605.15220)."""


ROUNDING = 1e-12
"""What the sum of a few hundred shares may be off by."""


def require_simplex(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as float64, or ValueError unless the last axis is finite, not negative and sums to 1.

    A sum that is off by less than 1e-6 (weights written with six decimals) is divided out; one that is off by
    rounding alone is left, so that what was checked once is not changed by the next check.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{what} must be finite and not negative, got {values.tolist()}")
    total = values.sum(axis=-1, keepdims=True)
    if (np.abs(total - 1) > 1e-6).any():
        worst = total.flat[np.abs(total - 1).argmax()]
        raise ValueError(f"{what} must sum to 1, got a sum of {worst:.8g}")
    return np.where(np.abs(total - 1) > ROUNDING, values / total, values)


@dataclass(frozen=True)
class Components:
    """The training mixtures of a search's probes.

    names: K component names; domains: D domain names; matrix: C [K, D], rows sum to 1.
    Raises ValueError where names repeat, shapes differ or a row is not a mixture.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        for what, names in (("component", self.names), ("domain", self.domains)):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{what} names must differ, got {', '.join(repeated)} more than once")
        shape = (len(self.names), len(self.domains))
        if np.shape(self.matrix) != shape:
            raise ValueError(f"the composition must be {shape} for its names, not {np.shape(self.matrix)}")
        object.__setattr__(self, "matrix", require_simplex(self.matrix, "each row of the composition"))

    @classmethod
    def for_rebalance(
        cls, domains: Sequence[str], old_mixture: np.ndarray, domain_share: float = 0.9
    ) -> Components:
        """``old`` (the mixture p [D] itself), then per domain d a probe on domain_share d + the rest of p."""
        if not 0 < domain_share <= 1:
            raise ValueError(f"domain_share must be above 0 and at most 1, got {domain_share}")
        old = _mixture_over(domains, old_mixture)
        probes = domain_share * np.eye(len(domains)) + (1 - domain_share) * old
        return cls((OLD, *domains), tuple(domains), np.vstack([old, probes]))

    @classmethod
    def for_one_new_domain(
        cls, old_domains: Sequence[str], old_mixture: np.ndarray, new_domain: str
    ) -> Components:
        """Two probes: 10% new and 90% old (named ``old``), 90% new and 10% old (named by the new domain)."""
        old = _mixture_over(old_domains, old_mixture)
        rows = [np.append((1 - share) * old, share) for share in TWO_PROBE_SHARES]
        return cls((OLD, new_domain), (*old_domains, new_domain), np.vstack(rows))

    @classmethod
    def for_new_domains(
        cls,
        old_domains: Sequence[str],
        old_mixture: np.ndarray,
        new_domains: Sequence[str],
        domain_share: float = 0.9,
    ) -> Components:
        """Of one new domain as ``for_one_new_domain``; of K of them K + 1 probes: ``old`` (the old mixture p
        itself), then per new domain d a probe on domain_share d + the rest of p."""
        if len(new_domains) == 1:
            return cls.for_one_new_domain(old_domains, old_mixture, new_domains[0])
        if not new_domains or not 0 < domain_share <= 1:
            raise ValueError(
                f"need a new domain and a domain_share above 0 and at most 1, got {len(new_domains)} and "
                f"{domain_share}"
            )
        count = len(new_domains)
        old = np.append(_mixture_over(old_domains, old_mixture), np.zeros(count))
        pure = np.hstack([np.zeros((count, len(old_domains))), np.eye(count)])
        probes = domain_share * pure + (1 - domain_share) * old
        return cls((OLD, *new_domains), (*old_domains, *new_domains), np.vstack([old, probes]))


def _mixture_over(domains: Sequence[str], mixture: np.ndarray) -> np.ndarray:
    if len(domains) == 0:
        raise ValueError("need at least one domain")
    if np.shape(mixture) != (len(domains),):
        raise ValueError(f"the old mixture must have {len(domains)} shares [D], not {np.shape(mixture)}")
    return require_simplex(mixture, "the old mixture")


def sample_candidates(num_components: int, count: int, *, seed: int, alpha: float = 1.0) -> np.ndarray:
    """U [count, num_components], rows drawn from Dirichlet(alpha); alpha 1 is uniform on the simplex.

    The first rows do not depend on ``count``, so that a search can be extended.
    """
    if num_components < 1 or count < 1 or not alpha > 0:
        raise ValueError(f"need components, candidates and alpha > 0, got {num_components}, {count}, {alpha}")
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(num_components, alpha), size=count)


def sobol_candidates(num_components: int, count: int, *, seed: int) -> np.ndarray:
    """U [count, num_components], scrambled Sobol points that cover the simplex evenly, uniform on average.

    Points of the cube are mapped by breaking a stick, u_k = (rest) (1 - (1 - v_k)^(1 / (K - k))), which keeps
    uniformity and is one to one. Measured on 12 to 32 points in 3 to 7 components, their mean is 3 to 17
    times closer to the centre than that of Dirichlet draws, and a point of the simplex is 5 to 16% closer to
    the nearest of them; sorted spacings and exponentials, which fold the simplex or project on it, do worse.
    The first rows do not depend on ``count``.
    """
    if num_components < 1 or count < 1:
        raise ValueError(f"need components and candidates, got {num_components} and {count}")
    if num_components == 1:
        return np.ones((count, 1))
    sampler = qmc.Sobol(num_components - 1, seed=np.random.default_rng(seed))
    cube = sampler.random_base2((count - 1).bit_length())[:count]  # [M, K - 1]
    broken = 1 - (1 - cube) ** (1 / np.arange(num_components - 1, 0, -1))  # share of what is left
    left = np.cumprod(1 - broken, axis=1)
    return np.column_stack([broken[:, 0], broken[:, 1:] * left[:, :-1], left[:, -1]])


def candidates_near(centre: np.ndarray, count: int, *, spread: float, seed: int) -> np.ndarray:
    """U [count, K] around a centre [K]: (1 - spread) centre + spread times a Dirichlet(1) draw.

    spread: 0 repeats the centre, 1 forgets it. The first rows do not depend on ``count``.
    """
    centre = require_simplex(centre, "the centre")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread must be between 0 and 1, got {spread}")
    return (1 - spread) * centre + spread * sample_candidates(len(centre), count, seed=seed)


def coefficients_of(
    mixture: np.ndarray, composition: np.ndarray, *, domains: Sequence[str] = ()
) -> np.ndarray:
    """u [K] on the simplex with C^T u = x; of all of them that of the least sum of squares, which mixes most.

    Args:
        mixture: x [X]; composition: C [K, X]; domains: X names for messages, their numbers otherwise.

    Raises:
        ValueError: wrong shapes, or x is out of reach of the components by more than 1e-6: names the domains
            and their shares in the nearest mixture that is in reach.
    """
    composition = require_simplex(composition, "each row of the composition")
    mixture = require_simplex(mixture, "the mixture")
    if composition.ndim != 2 or mixture.shape != composition.shape[1:]:
        raise ValueError(f"a mixture {mixture.shape} does not fit a composition {composition.shape}")
    u = cp.Variable(len(composition), nonneg=True)
    nearest = _solved(u, cp.norm(composition.T @ u - mixture), [cp.sum(u) == 1]) @ composition
    names = tuple(domains) or tuple(f"domain {i}" for i in range(len(mixture)))
    missed = [
        f"{name}: {wanted:.4g} (nearest in reach: {found:.4g})"
        for name, wanted, found in zip(names, mixture, nearest, strict=True)
        if abs(found - wanted) > REACH_TOLERANCE
    ]
    if missed:
        raise ValueError(f"no weights of the components give {', '.join(missed)}")
    return _solved(u, cp.sum_squares(u), _reaching(nearest, composition, u))


def _solved(u: cp.Variable, objective: cp.Expression, constraints: list[cp.Constraint]) -> np.ndarray:
    """The best u, on the simplex."""
    cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL)
    assert u.value is not None  # the constraints can always be met
    weights = np.clip(u.value, 0, None)
    return weights / weights.sum()


def nearest_coefficients(
    mixture: np.ndarray, composition: np.ndarray, like: np.ndarray | None = None
) -> np.ndarray:
    """u [K] on the simplex whose C^T u is nearest to x in the sum of squares.

    Of several such u, that of the least sum of u^2, which mixes most probes; with coefficients ``like`` [K]
    to compare with, one that mixes about as many as those do: on the way from there to the u that has most of
    the first component, the point whose sum of squares is nearest to that of ``like``.

    Args:
        mixture: x [X]; composition: C [K, X].
    """
    u = cp.Variable(len(composition), nonneg=True)
    nearest = _solved(u, cp.norm(composition.T @ u - mixture), [cp.sum(u) == 1]) @ composition
    reached = _reaching(nearest, composition, u)
    most = _solved(u, cp.sum_squares(u), reached)
    if like is None:
        return most
    first = _solved(u, -u[0], reached)
    along = first - most
    # |most + t along|^2 = |like|^2; `most` is the least, so that it grows with t
    a, b, c = along @ along, 2 * (most @ along), most @ most - like @ like
    if a < ROUNDING or c >= 0:
        return most
    t = (-b + np.sqrt(b * b - 4 * a * c)) / (2 * a)
    return most + min(float(t), 1.0) * along


def _reaching(mixture: np.ndarray, composition: np.ndarray, u: cp.Variable) -> list[cp.Constraint]:
    """C^T u = x, of an x that can be reached, as independent equations: the rows of C may depend on each
    other, and domains outnumber them."""
    left, strength, right = np.linalg.svd(composition.T, full_matrices=False)
    kept = strength > 1e-9 * strength[0]
    return [right[kept] @ u == (mixture @ left[:, kept]) / strength[kept]]


def two_probe_candidates(composition: np.ndarray) -> np.ndarray:
    """U [9, 2] for which the new domain's share of x = C^T u is 10%, 20% .. 90%.

    Args:
        composition: C [2, D] as of ``Components.for_one_new_domain``; the new domain is the one that the
            second row has most more of. Raises ValueError if the rows do not span 10% to 90%.
    """
    composition = np.asarray(composition, dtype=np.float64)
    if composition.ndim != 2 or len(composition) != 2:
        raise ValueError(f"two-probe candidates need two components, got a composition {composition.shape}")
    new = (composition[1] - composition[0]).argmax()
    low, high = composition[:, new]
    shares = np.arange(1, 10) / 10
    if low > shares[0] + 1e-9 or high < shares[-1] - 1e-9:
        raise ValueError(f"two probes must span 10% to 90% of the new domain, not {low:.4g} to {high:.4g}")
    along = np.clip((shares - low) / (high - low), 0, 1)
    return np.stack([1 - along, along], axis=1)


def effective(candidates: np.ndarray, composition: np.ndarray) -> np.ndarray:
    """The data mixtures X [M, D] that the candidates U [M, K] stand for: each row x = C^T u."""
    if candidates.ndim != 2 or candidates.shape[1] != len(composition):
        raise ValueError(f"candidates {candidates.shape} do not fit a composition {composition.shape}")
    return candidates @ composition
