"""Two models on the same held-out samples: by how much they differ, and how sure the samples make that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from opmix_dist.exchange.heldout import SampleLosses
from opmix_dist.models.loss import losses_by_domain


@dataclass(frozen=True)
class SampledDifference:
    """Mean difference in nats per token, and its standard error over held-out samples.

    The error says how sure it is that one *model* is better than the other on the domain, and nothing of
    what the same settings would come to with another seed.
    """

    mean: float
    stderr: float


def sampled_differences(
    losses: Mapping[str, SampleLosses], baseline: Mapping[str, SampleLosses]
) -> dict[str, SampledDifference]:
    """``losses`` minus ``baseline`` by domain, of those that both measured on the same samples."""
    return {
        name: _difference(mine, baseline[name])
        for name, mine in losses.items()
        if name in baseline
        and mine.digest == baseline[name].digest
        and mine.targets == baseline[name].targets
    }


def average_difference(by_domain: Mapping[str, SampledDifference]) -> SampledDifference:
    """Of the mean over domains, whose samples are independent of each other: their variances add."""
    count = len(by_domain)
    return SampledDifference(
        sum(one.mean for one in by_domain.values()) / count,
        math.sqrt(sum(one.stderr**2 for one in by_domain.values())) / count,
    )


def _same_samples(mine: SampleLosses, its: SampleLosses) -> bool:
    return mine.digest == its.digest and mine.targets == its.targets


def _difference(mine: SampleLosses, its: SampleLosses) -> SampledDifference:
    """The ratio of the summed differences to the summed targets, as
    :func:`~opmix_dist.models.loss.losses_by_domain` puts samples together."""
    sums = np.array(mine.sums) - np.array(its.sums)
    found = losses_by_domain(sums, np.array(mine.targets), np.zeros(len(sums), dtype=np.int64), 1)
    return SampledDifference(float(found.loss[0]), float(found.stderr[0]))
