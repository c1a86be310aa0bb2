"""Where the regressions of one exponential start: from lines through the logarithms."""

from __future__ import annotations

import numpy as np

from opmix_dist.search.laws import robust


def best_of_starts(
    problems: robust.HuberProblems, num_starts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """theta [D, parameters] of the lowest objective per domain, and whether it had converged [D]."""
    num_domains = len(problems.target)
    starts = _starts(problems, num_starts, np.random.default_rng(seed))  # [S, D, parameters]
    repeated = problems.take(np.tile(np.arange(num_domains), num_starts))
    theta, converged = robust.minimise(repeated, starts.reshape(num_starts * num_domains, -1))
    objective = repeated.objective(theta).reshape(num_starts, num_domains)
    best = objective.argmin(axis=0) * num_domains + np.arange(num_domains)
    return theta[best], converged[best]


def _starts(problems: robust.HuberProblems, num_starts: int, rng: np.random.Generator) -> np.ndarray:
    """Starts [S, D, parameters]; a domain's do not depend on the others, the first has exact slopes."""
    target, z = problems.target, problems.z
    num_domains, rank = len(target), z.shape[1]
    share = (np.arange(num_starts) + rng.uniform(0.05, 0.95, num_starts)) / num_starts
    noise = 1 + 0.5 * rng.standard_normal((num_starts, 1, rank))
    noise[0] = 1
    constant = share[:, None] * target.min(axis=1)  # [S, D]
    inputs = np.column_stack([np.ones(len(z)), z])
    logs = np.log(target - constant[..., None])  # [S, D, M]
    if problems.slopes is not None:  # d loss / (loss - exp(c)) is the slope of the logarithm
        measured, rows = problems.slopes.target, problems.slopes.rows
        lines = np.column_stack([np.zeros(rank), np.eye(rank)])
        inputs = np.vstack([inputs, np.tile(lines, (measured.shape[1], 1))])
        relative = measured / (target[:, rows] - constant[..., None])[..., None]  # [S, D, G, r]
        logs = np.concatenate([logs, relative.reshape(num_starts, num_domains, -1)], axis=2)
    line = (logs @ np.linalg.pinv(inputs).T).reshape(num_starts * num_domains, 1 + rank)
    line[:, 1:] *= np.repeat(noise[:, 0], num_domains, axis=0)
    theta = robust.encode(constant.ravel(), line[:, 0], line[:, 1:])
    if problems.feature is not None:
        theta = np.column_stack([theta, np.zeros(len(theta))])
    return theta.reshape(num_starts, num_domains, -1)
