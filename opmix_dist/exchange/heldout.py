"""metrics/heldout.json: the loss of every held-out sample at the end of a run.

With it, two runs can be compared sample by sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from opmix_dist.exchange.schemas import Finite, Name, Record

FILE = "heldout.json"
"""In the folder of the metrics."""


class SampleLosses(Record):
    """Of the N samples of one domain."""

    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the samples' tokens and targets: the same samples in the same order have the same one."""
    sums: list[Finite]
    """[N] loss summed over a sample's targets, nats."""
    targets: list[Annotated[int, Field(ge=0, le=1 << 40)]]
    """[N]."""

    @model_validator(mode="after")
    def _one_each(self) -> SampleLosses:
        if len(self.sums) != len(self.targets) or not sum(self.targets):
            raise ValueError("sums and targets must have an entry for each sample, and there must be targets")
        return self


class HeldOutLosses(Record):
    """Of all domains that were evaluated."""

    step: int = Field(ge=0)
    domains: dict[Name, SampleLosses]


def sample_losses(
    names: Sequence[str], domain_ids: np.ndarray, tokens: np.ndarray, mask: np.ndarray, sums: np.ndarray
) -> dict[str, SampleLosses]:
    """By domain; those whose losses are not finite, or that have no target, are left out.

    Args:
        names: of the domains that ``domain_ids`` [N] number.
        tokens: [N, T] int64.
        mask: [N, T] bool, which of them are targets.
        sums: [N] float64.
    """
    found = {}
    for number, name in enumerate(names):
        rows = domain_ids == number
        counts = mask[rows].sum(axis=1)
        if not counts.sum() or not np.isfinite(sums[rows]).all():
            continue
        content = tokens[rows].astype("<i8").tobytes() + np.packbits(mask[rows]).tobytes()
        digest = hashlib.sha256(content).hexdigest()
        found[name] = SampleLosses(digest=digest, sums=sums[rows].tolist(), targets=counts.tolist())
    return found
