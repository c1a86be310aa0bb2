"""The gradient nearest to a given one that raises no memory's loss: the quadratic program of GEM.

min over z of 1/2 |z - g|^2 subject to m_k . z >= 0 for all K memories has the dual

    min over v >= 0 of 1/2 v^T M M^T v + (M g)^T v,    z = g + M^T v

(Lopez-Paz & Ranzato 2017, Gradient episodic memory, arXiv 1706.08840, equations 8 to 12), which needs M M^T
[K, K] and M g [K] only.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

_RANK_TOLERANCE = 1e-12
"""Eigenvalues of M M^T below this share of the largest are 0: memories whose gradients depend on others."""


def dual(gram: np.ndarray, dots: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """v [K]; zeros where no constraint is violated.

    Args:
        gram: M M^T, [K, K].
        dots: M g, [K].
        margin: least value of each v_k where some constraint is violated, as in the authors' code; above 0
            the constraints hold with room.
    """
    if (dots >= 0).all():
        return np.zeros(len(dots))
    values, vectors = np.linalg.eigh(gram)
    kept = values > _RANK_TOLERANCE * values[-1]
    if not kept.any():
        return np.zeros(len(dots))
    roots = np.sqrt(values[kept])
    # gram = R^T R; with w = v - margin the objective is 1/2 |R w + c|^2 + const, R^T c = dots + gram @ margin
    R = roots[:, None] * vectors[:, kept].T
    c = (vectors[:, kept].T @ (dots + margin * gram.sum(axis=1))) / roots
    w, _ = nnls(R, -c)
    return w + margin
