"""Points on the simplex: what the probes are trained on, and the candidates between them.

Two coordinates run through the search: u [K] over components (what is interpolated) and x [D] over domains
(what is trained on), tied by the composition matrix C [K, D] through x = C^T u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OLD = "old"
"""Name of the component that collapses what the model was trained on so far."""

TWO_PROBE_SHARES = (0.1, 0.9)
"""Share of the new domain in the two probes of a one-new-domain search (OP-Mix, arXiv 2605.15220)."""


def require_simplex(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as float64, or ValueError unless the last axis is finite, not negative and sums to 1.

    A sum that is off by less than 1e-6 (weights written with six decimals) is divided out.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{what} must be finite and not negative, got {values.tolist()}")
    total = values.sum(axis=-1, keepdims=True)
    if (np.abs(total - 1) > 1e-6).any():
        worst = total.flat[np.abs(total - 1).argmax()]
        raise ValueError(f"{what} must sum to 1, got a sum of {worst:.8g}")
    return values / total


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
