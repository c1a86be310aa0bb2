"""What is known of candidates that were evaluated on a part of the held-out samples only.

The rest is taken from a reference that was evaluated on all of them (a control variate): of domain d

    L_m = L_r + D_m,    D_m = sum over seen samples of (s_mj - r_j) / sum over seen samples of n_j

with sums of losses s and r and numbers of targets n. Candidates and reference find the same samples hard, so
D_m is known far better from a part of the samples than L_m is. For a candidate that saw everything L_m is its
own loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opmix_dist.models.loss import DomainLosses


@dataclass(frozen=True)
class Estimate:
    """Losses L [M, D] and how each sample moves them [M, N], to first order: the variance of a function of
    losses is the sum of squares of what its samples move, times n / (n - 1) (Cochran, Sampling Techniques,
    1977, section 2.11). counts: of samples with targets that were seen [M, D]."""

    loss: np.ndarray
    influence: np.ndarray
    counts: np.ndarray


def estimate(
    sums: np.ndarray,
    seen: np.ndarray,
    reference: np.ndarray,
    targets: np.ndarray,
    domain_ids: np.ndarray,
    num_domains: int,
) -> Estimate:
    """Losses of M candidates.

    Sample j moves L_m by (r_j - L_r n_j) / (sum of all n), and if it was seen also by
    (s_mj - r_j - D_m n_j) / (sum of seen n): twice the same noise where both are large, nothing counted twice
    where all was seen.

    Args:
        sums: of losses of each sample [M, N], nats; those that were not seen are not read.
        seen: [M, N] bool, with a target of each domain that has any.
        reference: sums of a model that saw all [N].
        targets: n [N]; domain_ids: [N], in 0..D-1.
    """

    def by_domain(values: np.ndarray) -> np.ndarray:
        found = np.zeros((*values.shape[:-1], num_domains))
        np.add.at(found.T, domain_ids, values.T)
        return found

    whole = by_domain(targets.astype(np.float64))
    level = by_domain(reference) / np.maximum(whole, 1)  # [D]
    part = by_domain(np.where(seen, targets, 0.0))  # [M, D]
    differences = np.where(seen, sums - reference, 0.0)
    change = by_domain(differences) / np.maximum(part, 1)
    own = (reference - level[domain_ids] * targets) / np.maximum(whole, 1)[domain_ids]
    residuals = np.where(seen, differences - change[:, domain_ids] * targets, 0.0)
    influence = own + residuals / np.maximum(part, 1)[:, domain_ids]
    return Estimate(level + change, influence, by_domain(np.where(seen & (targets > 0), 1.0, 0.0)))


def estimated_losses(
    sums: np.ndarray,
    seen: np.ndarray,
    reference: np.ndarray,
    targets: np.ndarray,
    domain_ids: np.ndarray,
    num_domains: int,
) -> DomainLosses:
    """``estimate`` as losses with standard errors, whose degrees of freedom are those of the seen samples."""
    found = estimate(sums, seen, reference, targets, domain_ids, num_domains)
    totals = np.zeros(num_domains, dtype=np.int64)
    np.add.at(totals, domain_ids, targets)
    return DomainLosses(found.loss, np.sqrt(variances(found.influence, found.counts, domain_ids)), totals)


def variances(influence: np.ndarray, counts: np.ndarray, domain_ids: np.ndarray) -> np.ndarray:
    """By domain [M, D], of what each sample moves [M, N]; 0 of a single sample."""
    squares = np.zeros(counts.shape)
    np.add.at(squares.T, domain_ids, (influence**2).T)
    return squares * counts / np.maximum(counts - 1, 1)
