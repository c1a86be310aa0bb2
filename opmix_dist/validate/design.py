"""Which mixtures are trained on for real, and through which coefficients each is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opmix_dist.exchange.schemas import Proposal, SearchRequest
from opmix_dist.pool.requests import staying
from opmix_dist.search.simplex import OLD, sobol_candidates
from opmix_dist.seeds import derive_seed
from opmix_dist.validate.config import DesignConfig

Kind = Literal["design", "proposal", "component", "average"]
SAME = 1e-5
"""Shares that differ by less are those of one mixture: it is trained on once."""
ALONE = 0.999
"""A share of ``old`` above which nothing is averaged."""


@dataclass(frozen=True)
class Point:
    """One simulated model: coefficients u [K] over components, and the mixture x = C^T u [D] that it stands
    for. Points of one x are compared with one real run, whatever their u."""

    name: str
    kind: Kind
    u: np.ndarray
    x: np.ndarray


def design_points(request: SearchRequest, proposal: Proposal, settings: DesignConfig) -> list[Point]:
    """The components by themselves (``old`` first), the proposal, an even design over the simplex of
    coefficients; and ``old``'s mixture through averages of the domains' probes, where they can reach it."""
    composition = np.array(request.composition)  # [K, D]
    count = len(composition)
    u = np.array([proposal.coefficients[name] for name in request.components])
    found: list[tuple[str, Kind, np.ndarray]] = []
    alone = np.eye(count)
    if settings.components:
        found += [(name, "component", alone[k]) for k, name in enumerate(request.components)]
    else:
        found.append((OLD, "component", alone[request.components.index(OLD)]))
    found.append(("proposal", "proposal", u))
    if settings.mixtures:
        seed = derive_seed(request.seed, "validation", settings.seed)
        drawn = sobol_candidates(count, settings.mixtures, seed=seed)
        found += [(f"design-{i + 1}", "design", row) for i, row in enumerate(drawn)]
    if settings.averages:
        found += [(name, "average", row) for name, row in _averages(request, u)]
    return [Point(_free(name, kind, request), kind, row, row @ composition) for name, kind, row in found]


def _free(name: str, kind: Kind, request: SearchRequest) -> str:
    """A domain may be called ``proposal``."""
    return f"the-{name}" if kind != "component" and name in request.components else name


def _averages(request: SearchRequest, u: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Coefficients, other than ``old`` alone, of the mixture that ``old`` is: mixed as much as ``u`` [K], and
    the domains' probes alone by their shares. None where a new domain joins: each mixture has one u then."""
    composition, old = np.array(request.composition), request.components.index(OLD)
    spread = np.array([0.0 if name == OLD else request.current.get(name, 0.0) for name in request.components])
    rows = [("old-as-mixed", staying(request, like=u)), ("old-by-domains", spread)]
    reaches = [(n, row) for n, row in rows if np.abs(row @ composition - composition[old]).max() < SAME]
    return [(name, row) for name, row in reaches if row[old] < ALONE]


def same_mixture(points: Sequence[Point]) -> list[list[int]]:
    """Numbers of the points by mixture, in the order in which mixtures first come."""
    groups: list[list[int]] = []
    for i, point in enumerate(points):
        for group in groups:
            if np.abs(points[group[0]].x - point.x).max() < SAME:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
