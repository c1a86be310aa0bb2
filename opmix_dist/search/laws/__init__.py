"""The laws of a search: from coefficients u over components to the loss of each domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from opmix_dist.search.laws.base import ConvexLaw, Family, Law, LawFit, Observations, SmoothLaw
from opmix_dist.search.laws.choice import choose
from opmix_dist.search.laws.gaussian_process import GaussianProcess
from opmix_dist.search.laws.log_linear import LogLinear, LogLinearLaw
from opmix_dist.search.laws.power import Power
from opmix_dist.search.laws.quadratic import Quadratic
from opmix_dist.search.laws.quality import fit_with_quality
from opmix_dist.search.laws.trees import Trees

__all__ = [
    "FAMILIES",
    "ConvexLaw",
    "Family",
    "Law",
    "LawFit",
    "LogLinearLaw",
    "Observations",
    "SmoothLaw",
    "fit_law",
]

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (LogLinear(), Power(), Quadratic(), Trees(), GaussianProcess())
}
"""The families in their default settings."""

AUTO = "auto"


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
        family: a name in ``FAMILIES``, or ``auto``: the choice of cross-validation, see ``choice``.
        huber_delta: residual, in nats, from which the penalty grows linearly (log-linear and power laws).
        num_starts: starts per domain of the log-linear law; the best of them is the answer.
        averaging: whether the log-linear law has a term for averaging, see ``LogLinearLaw``.

    Raises:
        ValueError: an unknown family, or a setting out of its range.
    """
    log_linear = LogLinear(huber_delta, num_starts, averaging)
    families = {**FAMILIES, log_linear.name: log_linear, Power.name: Power(huber_delta)}
    if family != AUTO and family not in families:
        known = ", ".join([*families, AUTO])
        raise ValueError(f"no family of laws is named {family!r}: there are {known}")
    if family == AUTO:
        fit = choose(list(families.values()), observations, seed=seed)
    else:
        fit = fit_with_quality(families[family], observations, seed=seed)
    if observations.gradients is not None and fit.family != log_linear.name:
        note = f"laws of the family {fit.family} are fitted to losses alone: gradients were not used"
        fit = replace(fit, warnings=(note, *fit.warnings))
    return fit
