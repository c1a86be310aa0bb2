"""Candidates that are clearly worse than staying are not evaluated to the end.

While the held-out samples stream, each candidate's objective on those so far is compared with that of the
reference on the same ones. The difference has a paired standard error; one whose lower confidence bound is
above 0 is stopped. Several looks are as many chances to be stopped by bad luck: each has its share of the
error that is allowed in all (Bonferroni).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import t as student

from opmix_dist.pool.partial import Estimate, estimate, variances
from opmix_dist.search.problem import Problem

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the samples after which is looked: what is left after half is little to gain."""
LEAST_SEEN = 4
"""Samples with targets of every domain before the first look: fewer say nothing about their own spread."""


@dataclass(frozen=True)
class EarlyStop:
    """The rule.

    problem: whose objective is compared, without its KL term, as gains are: evaluations serve any ``kl``.
    reference: sums [N] of the candidate that all others are compared with. targets, domain_ids: of the
    samples [N]. order: of the samples in the stream [N]. confidence: with which a stopped candidate is worse.
    """

    problem: Problem
    reference: np.ndarray
    targets: np.ndarray
    domain_ids: np.ndarray
    num_domains: int
    order: np.ndarray
    confidence: float

    @cached_property
    def tag(self) -> str:
        """Digest of all that decides which candidates are stopped and when, besides the evaluation's own
        settings."""
        losses = self._of_reference.loss[0]
        rule = (LOOKS, LEAST_SEEN, self.confidence, self.problem.objective)
        rates = None if self.problem.objective.startswith("worst") else self.problem.rates(len(losses))
        offsets = self.problem.offsets(len(losses)) if rates is None else None
        found = hashlib.sha256(repr(rule).encode())
        for values in (rates, offsets, self.reference, self.order):
            found.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        return found.hexdigest()

    def looks(self, batch_size: int) -> list[int]:
        """Numbers of samples, in their order, after which candidates may be stopped: ends of parts of
        ``batch_size`` before the last, with enough of every domain that has targets at all."""
        count = len(self.order)
        ends = {int(np.ceil(share * count / batch_size)) * batch_size for share in LOOKS}
        return sorted(end for end in ends if end < count and self._is_enough(end))

    def _is_enough(self, seen: int) -> bool:
        rows = self.order[:seen]
        counts = self._counts(rows)
        return bool((counts[self._counts(self.order) > 0] >= LEAST_SEEN).all())

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """Samples with targets among ``rows`` by domain."""
        return np.bincount(self.domain_ids[rows][self.targets[rows] > 0], minlength=self.num_domains)

    @cached_property
    def _of_reference(self) -> Estimate:
        seen = np.full((1, len(self.targets)), True)
        return self._estimate(self.reference[None], seen)

    def _estimate(self, sums: np.ndarray, seen: np.ndarray) -> Estimate:
        return estimate(sums, seen, self.reference, self.targets, self.domain_ids, self.num_domains)

    def keeps(self, sums: np.ndarray, seen: np.ndarray, num_looks: int) -> np.ndarray:
        """Which of m candidates go on [m] bool.

        Args:
            sums: [m, N]; seen: [m, N] bool.
            num_looks: that a candidate has in all.
        """
        found, reference = self._estimate(sums, seen), self._of_reference
        value, slope = self.problem.value, self.problem.slope
        apart = value(found.loss) - value(reference.loss)
        slopes = np.stack([slope(losses) for losses in found.loss])  # [m, D]
        moves = slopes[:, self.domain_ids] * found.influence
        moves = moves - slope(reference.loss[0])[self.domain_ids] * reference.influence
        parts = variances(moves, found.counts, self.domain_ids)  # [m, D]
        quantile = student.ppf(1 - (1 - self.confidence) / num_looks, _freedom(parts, found.counts))
        return ~(apart > quantile * np.sqrt(parts.sum(axis=1)))


def _freedom(parts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Degrees of freedom [m] of a sum of variances [m, D], each of ``counts`` samples (Welch and
    Satterthwaite); 1 where there is no variance."""
    below = (parts**2 / np.maximum(counts - 1, 1)).sum(axis=1)
    return np.divide(parts.sum(axis=1) ** 2, below, out=np.ones(len(parts)), where=below > 0)
