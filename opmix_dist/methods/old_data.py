"""Training samples of old domains: those that the model had read before the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.build import read_options
from opmix_dist.data.loader import eval_batches
from opmix_dist.errors import UserError
from opmix_dist.exchange.history import open_domains
from opmix_dist.methods.base import MethodAround
from opmix_dist.seeds import derive_seed


def old_domains(around: MethodAround, chosen: Sequence[str] | None) -> list[str]:
    """
    Args:
        chosen: by the method's settings; None: all that have a history.

    Raises:
        UserError: there are none.
    """
    if chosen is not None and not chosen:
        raise UserError(f"{key_of(around)}.domains is empty: name old domains, or set it to null")
    found = list(chosen or (name for name, tokens in around.history.items() if tokens > 0))
    if not found:
        raise UserError(
            f"method.name {around.config.method.name} keeps what old domains have taught, and the run has "
            f"none: set start.run, or name them in {key_of(around)}.domains"
        )
    return found


def key_of(around: MethodAround) -> str:
    """The section of the method's settings."""
    return f"method.{around.config.method.name}"


def shares_of(tokens: Mapping[str, int], domains: Sequence[str]) -> dict[str, float]:
    """In proportion to the tokens that were read of them; equal where that is not known of any.

    Raises:
        UserError: of some it is known, and of others not.
    """
    read = {name: tokens.get(name, 0) for name in domains}
    if not any(read.values()):
        return dict.fromkeys(domains, 1 / len(domains))
    for name, count in read.items():
        if not count:
            raise UserError(
                f"the model has read nothing of {name}, as the history of start.run tells: leave it out of "
                "the method's domains"
            )
    return {name: count / sum(read.values()) for name, count in read.items()}


def old_samples(around: MethodAround, domains: Sequence[str], per_domain: int) -> dict[str, TokenBatch]:
    """The first training samples of a seeded permutation of each domain, or of what ``data.replay_samples``
    keeps of it; fewer where it has fewer, and only those with a target. On every rank the same.

    Raises:
        UserError: a domain that is not there, or without a sample that has a target.
    """
    config = around.config
    # opened with the others, which data.replay_samples may name
    catalogue = open_domains(config, list(dict.fromkeys([*around.catalogue.names, *domains])))
    wanted = replace(
        catalogue, names=tuple(domains), domains={name: catalogue.domains[name] for name in domains}
    )
    samples = eval_batches(
        wanted,
        samples_per_domain=per_domain,
        seed=derive_seed(config.seed, "memory"),
        split="train",
        reading=read_options(config.data),
    )
    found = {}
    for number, name in enumerate(wanted.names):
        rows = torch.nonzero((samples.domain_ids == number) & (samples.batch.targets > 0))[:, 0]
        if not len(rows):
            raise UserError(
                f"domain {name}: none of {per_domain} training samples has a token that counts in the loss; "
                f"raise {key_of(around)}.samples_per_domain"
            )
        found[name] = samples.batch[rows]
    return found
