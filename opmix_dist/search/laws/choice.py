"""Which family of laws: the one that predicts left-out candidates best, and the plain one when in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opmix_dist.search.laws import robust
from opmix_dist.search.laws.base import Family, LawFit, Observations
from opmix_dist.search.laws.quality import fit_with_quality

# Candidates from which a family takes part. Quadratics and power laws have a ridge for every number; trees
# cannot split fewer than 40 and begin to follow a slope at some five leaves of 20; a process learns its
# length from pairs of near candidates, of which fewer than 30 have none in the dimensions of a mixture.
LEAST_POINTS = {"trees": 100, "gaussian_process": 30}
# With fewer candidates no error of a left-out one means much.
FEWEST = 6
PREFERRED = "log_linear"


def choose(families: Sequence[Family], observations: Observations, *, seed: int) -> LawFit:
    """The fit of the family to take, with the cross-validated errors of all families that took part.

    All of them predict the same folds, from refits to the other candidates (``LawFit.left_out``). What is
    not refitted is at most three numbers of each loss: a ridge, a number of trees, a kernel's. The log-linear
    law is convex and the paper's: another is taken only if its squared errors, relative to each loss's
    variance and averaged over the losses, are lower by more than one standard error of the difference.
    """
    points = len(observations.candidates)
    entered = [family for family in families if _takes_part(family.name, points)]
    fits = {family.name: fit_with_quality(family, observations, seed=seed) for family in entered}
    comparison = {name: fit.loo_error for name, fit in fits.items()}
    chosen = fits[_best(fits)]
    absent = [family.name for family in families if family.name not in fits]
    notes = []
    if absent:
        notes.append(
            f"{points} candidates are too few for laws of {', '.join(absent)}: they were not compared"
        )
    return replace(chosen, comparison=comparison, warnings=(*notes, *chosen.warnings))


def _takes_part(name: str, points: int) -> bool:
    return name == PREFERRED or points >= LEAST_POINTS.get(name, FEWEST)


def _best(fits: dict[str, LawFit]) -> str:
    """By the one-standard-error rule."""
    losses = fits[PREFERRED].measured
    variance = losses.var(axis=0)
    telling = ~robust.is_constant(losses.T)  # else the rounding of one loss would outweigh all others
    if len(fits) == 1 or not telling.any():
        return PREFERRED
    errors = {
        name: ((fit.left_out - losses)[:, telling] ** 2 / variance[telling]).mean(axis=1)  # [M]
        for name, fit in fits.items()
    }
    best = min(errors, key=lambda name: float(errors[name].mean()))
    gain = errors[PREFERRED] - errors[best]
    within_noise = gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain))
    return PREFERRED if within_noise else best
