"""Mixtures as a configuration gives them: by name, or by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.errors import UserError

GROUPS = ("old", "new")
"""What stands for several domains: those that the model had read before the run, and the others."""
NO_HISTORY: Mapping[str, int] = {}


def named_mixture(name: str, catalogue: Catalogue, current: Mapping[str, float]) -> dict[str, float]:
    """``uniform``, ``natural`` (in proportion to training samples, so that all domains end an epoch together)
    or ``current``, by domain."""
    if name == "current":
        return dict(current)
    samples = catalogue.samples("train").astype(np.float64)
    weights = samples / samples.sum() if name == "natural" else np.full(len(samples), 1 / len(samples))
    return dict(zip(catalogue.names, weights.tolist(), strict=True))


def check_group_names(domains: Sequence[str]) -> None:
    """UserError where a domain bears the name of a group."""
    for name in GROUPS:
        if name in domains:
            raise UserError(
                f"a domain cannot be named `{name}` in a run with start.run: mixtures mean a group "
                "by it; prepare it under another name"
            )


def new_domains(names: Sequence[str], history: Mapping[str, int]) -> list[str]:
    """Those of which the model has read nothing before; none where it has no history."""
    return [name for name in names if not history.get(name)] if history else []


def old_mixture(tokens: Mapping[str, int], old: Sequence[str]) -> np.ndarray:
    """p [len(old)]: what the model was trained on so far, by the tokens that it has read of each domain.

    Raises:
        UserError: it has read nothing of them.
    """
    read = np.array([tokens.get(name, 0) for name in old], dtype=np.float64)
    if not read.sum() > 0:
        raise UserError(
            f"the model has read nothing of {', '.join(old) or 'any domain'}: there is no old mixture"
        )
    return read / read.sum()


def group_mixture(
    group: str, catalogue: Catalogue, history: Mapping[str, int], key: str = "mixture.initial"
) -> dict[str, float]:
    """Of the old domains by the tokens that were read of them, or of the new ones by their training samples.

    Args:
        history: tokens that the model had read of each domain before the run began.
        key: the setting that asks for it.

    Raises:
        UserError: the run has no history, or the group has no domain.
    """
    if not history:
        raise UserError(f"{key} names `{group}`, which needs start.run: an earlier run tells what is old")
    new = new_domains(catalogue.names, history)
    if group == "old":
        members = [name for name in catalogue.names if name not in new]
    else:
        members = new
    if not members:
        raise UserError(f"{key} names `{group}`, and data.domains has no {group} domain: leave it out")
    if group == "old":
        shares = old_mixture(history, members)
    else:
        samples = dict(zip(catalogue.names, catalogue.samples("train").tolist(), strict=True))
        sizes = np.array([samples[name] for name in members], dtype=np.float64)
        shares = sizes / sizes.sum()
    return dict.fromkeys(catalogue.names, 0.0) | dict(zip(members, shares.tolist(), strict=True))


def chosen_mixture(
    chosen: str | Mapping[str, float],
    catalogue: Catalogue,
    key: str = "mixture.initial",
    history: Mapping[str, int] = NO_HISTORY,
) -> dict[str, float]:
    """Weights by domain, in the catalogue's order; a domain that is not named gets 0.

    Args:
        key: the setting that chose it.
        history: of a run with ``start.run``, as in :func:`group_mixture`.

    Raises:
        UserError: an unknown domain or group, a negative weight, or a sum that is not 1.
    """
    if isinstance(chosen, str):
        if chosen in GROUPS:
            return group_mixture(chosen, catalogue, history, key)
        return named_mixture(chosen, catalogue, {})
    weights = dict.fromkeys(catalogue.names, 0.0)
    for name, weight in chosen.items():
        if not 0 <= weight <= 1:
            raise UserError(f"{key}.{name} is {weight}: a weight lies between 0 and 1")
        if name in GROUPS and name not in catalogue.names:
            for member, share in group_mixture(name, catalogue, history, key).items():
                weights[member] += weight * share
        elif name in weights:
            weights[name] += weight
        else:
            raise UserError(f"{key} names `{name}`, which is no domain of {catalogue.root}: "
                            f"it has {', '.join(catalogue.names)}")  # fmt: skip
    total = sum(chosen.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"{key} sums to {total:g}: weights must sum to 1")
    return weights
