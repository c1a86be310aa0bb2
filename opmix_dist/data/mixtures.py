"""Mixtures as a configuration gives them: by name, or by weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.errors import UserError


def named_mixture(name: str, catalogue: Catalogue, current: Mapping[str, float]) -> dict[str, float]:
    """``uniform``, ``natural`` (in proportion to training samples, so that all domains end an epoch together)
    or ``current``, by domain."""
    if name == "current":
        return dict(current)
    samples = catalogue.samples("train").astype(np.float64)
    weights = samples / samples.sum() if name == "natural" else np.full(len(samples), 1 / len(samples))
    return dict(zip(catalogue.names, weights.tolist(), strict=True))


def chosen_mixture(
    chosen: str | Mapping[str, float], catalogue: Catalogue, key: str = "mixture.initial"
) -> dict[str, float]:
    """Weights by domain, in the catalogue's order; a domain that is not named gets 0.

    Args:
        key: the setting that chose it.

    Raises:
        UserError: an unknown domain, a negative weight, or a sum that is not 1.
    """
    if isinstance(chosen, str):
        return named_mixture(chosen, catalogue, {})
    for name, weight in chosen.items():
        if name not in catalogue.names:
            raise UserError(f"{key} names `{name}`, which is no domain of {catalogue.root}: "
                            f"it has {', '.join(catalogue.names)}")  # fmt: skip
        if not 0 <= weight <= 1:
            raise UserError(f"{key}.{name} is {weight}: a weight lies between 0 and 1")
    total = sum(chosen.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"{key} sums to {total:g}: weights must sum to 1")
    return {name: float(chosen.get(name, 0.0)) for name in catalogue.names}
