"""The laws of a search: from coefficients u over components to the loss of each domain."""

from __future__ import annotations

from collections.abc import Mapping

from opmix_dist.search.laws.base import ConvexLaw, Family, Law, LawFit, Observations
from opmix_dist.search.laws.log_linear import LogLinear, LogLinearLaw
from opmix_dist.search.laws.quality import with_quality

__all__ = [
    "FAMILIES",
    "ConvexLaw",
    "Family",
    "Law",
    "LawFit",
    "LogLinearLaw",
    "Observations",
    "fit_law",
]

FAMILIES: Mapping[str, Family] = {"log_linear": LogLinear()}
"""The families in their default settings."""


def fit_law(
    observations: Observations,
    *,
    family: str = "log_linear",
    seed: int,
    huber_delta: float = 0.02,
    num_starts: int = 64,
    averaging: bool = False,
) -> LawFit:
    """The law of a family, and how well it holds.

    Args:
        family: a name in ``FAMILIES``.
        huber_delta: residual, in nats, from which the penalty grows linearly.
        num_starts: starts per domain; the best of them is the answer.

    Raises:
        ValueError: an unknown family, or a setting out of its range.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family of laws is named {family}: there are {', '.join(FAMILIES)}")
    chosen = LogLinear(huber_delta, num_starts, averaging)
    law, warnings = chosen.fit(observations, seed=seed)
    return with_quality(chosen, observations, law, warnings, seed=seed)
