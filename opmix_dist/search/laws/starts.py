"""Where the regressions of one exponential start: from lines through the logarithms."""

from __future__ import annotations

import numpy as np

from opmix_dist.search.laws import robust

# With many points the starts of a domain are soon in one valley or a few, and where residuals are far beyond
# Huber's delta its floor is slow to reach: after so many iterations so many starts go on, the best of them,
# which takes a fifth of the time at 17 x 512. With few points the valleys are many, and all starts go on: a
# start that is behind after 30 iterations was the best in the end in one fit of forty.
MANY_POINTS = 64
HEATS = ((10, 16), (30, 4))


def best_of_starts(
    problems: robust.HuberProblems, num_starts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """theta [D, parameters] of the lowest objective per domain, and whether it had converged [D]."""
    num_domains = len(problems.target)
    theta = _starts(problems, num_starts, np.random.default_rng(seed))  # [S, D, parameters]
    for iterations, survivors in HEATS if problems.z.shape[0] > MANY_POINTS else ():
        if len(theta) > survivors:
            theta, _, objective = _from(problems, theta, iterations)
            order = np.argsort(objective, axis=0, kind="stable")[:survivors]
            theta = np.take_along_axis(theta, order[..., None], axis=0)
    theta, converged, objective = _from(problems, theta, robust.MAX_ITERATIONS)
    best = objective.argmin(axis=0), np.arange(num_domains)
    return theta[best], converged[best]


def _from(
    problems: robust.HuberProblems, theta: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where theta [S, D, parameters] lead, whether they converged and their objectives [S, D]."""
    num_starts, num_domains, _ = theta.shape
    repeated = problems.take(np.tile(np.arange(num_domains), num_starts))
    found, converged = robust.minimise(repeated, theta.reshape(num_starts * num_domains, -1), iterations)
    objective = repeated.objective(found)
    shape = (num_starts, num_domains)
    return found.reshape(theta.shape), converged.reshape(shape), objective.reshape(shape)


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
