"""Catalogue and held-out samples as the configuration's ``data`` section asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from opmix_dist.config import DataConfig
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import EvalSet, ReadOptions, eval_batches
from opmix_dist.data.remote import open_catalogue
from opmix_dist.data.store import ShardStore
from opmix_dist.errors import UserError


def open_data(config: DataConfig, domains: Sequence[str] | None = None) -> Catalogue:
    """The catalogue of ``data.root``, through ``data.cache`` where that is set.

    Args:
        domains: names in the order wanted; None takes those of the configuration.

    Raises:
        UserError: what :func:`~opmix_dist.data.remote.open_catalogue` refuses.
    """
    store = None
    if config.cache is not None:
        store = ShardStore(
            remote=config.root,
            cache=Path(config.cache),
            limit_bytes=config.cache_limit,
            check=config.verify_shards != "never",
            timeout_s=config.fetch_timeout_s,
        )
    return open_catalogue(config.root, config.domains if domains is None else domains, store)


def read_options(config: DataConfig) -> ReadOptions:
    """How a loader reads samples."""
    return ReadOptions(
        mask_documents=config.mask_documents,
        verify=config.verify_shards == "always",
        fetch_threads=config.fetch_threads,
        fetch_ahead=config.fetch_ahead,
    )


def held_out_samples(
    config: DataConfig, catalogue: Catalogue, *, samples_per_domain: int, seed: int, skip: int = 0
) -> EvalSet:
    """Samples for losses that are compared; arguments as of :func:`~opmix_dist.data.loader.eval_batches`.

    Raises:
        UserError: as ``eval_batches``, or a domain whose samples have no target, and so no loss.
    """
    found = eval_batches(
        catalogue, samples_per_domain=samples_per_domain, seed=seed, skip=skip, reading=read_options(config)
    )
    targets = torch.zeros(len(catalogue.names), dtype=torch.int64)
    targets.index_add_(0, found.domain_ids, found.batch.targets)
    for name, count in zip(catalogue.names, targets.tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"domain {name}: none of {samples_per_domain} held-out samples has a token that counts in "
                "the loss; raise train.eval_samples_per_domain and search.candidates.samples_per_domain, or "
                "prepare it again"
            )
    return found
