"""What a proposal minimises and what it must respect: one description for every law and for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Objective = Literal["mean", "relative", "worst", "worst_change"]
"""mean: sum_i omega_i L_i. relative: sum_i omega_i L_i / reference_i, the log-perplexities relative to the
current model's. worst: max_i L_i. worst_change: max_i (L_i - reference_i)."""

Expansion = Literal["effective", "paper"]


@dataclass(frozen=True)
class Problem:
    """min over u on the simplex of objective(L(u)) + kl KL(x || prior), x = C^T u, subject to

        floors <= x <= caps    and    L_i(u) <= reference_i + max_increase_i.

    composition: C [K, X]; prior: [X], a mixture; omega: weights of the D losses [D], not negative, None: 1 / D;
    reference: losses of the current model [D], nats per token; max_increase: [D], nats, inf where a loss may
    rise freely; floors, caps: [X]; domains, losses: names of the X domains and the D losses, for messages.
    expansion: ``paper`` for ``paper_composition``.

    Raises ValueError where shapes or values are wrong, or an objective or a bound needs a reference that is
    not there.
    """

    composition: np.ndarray
    prior: np.ndarray
    kl: float = 0.05
    objective: Objective = "mean"
    omega: np.ndarray | None = None
    reference: np.ndarray | None = None
    max_increase: np.ndarray | None = None
    floors: np.ndarray | None = None
    caps: np.ndarray | None = None
    expansion: Expansion = "effective"
    domains: Sequence[str] = ()
    losses: Sequence[str] = ()

    def value(self, losses: np.ndarray) -> np.ndarray:
        """The objective without its KL term [...], of losses [..., D]: what a gain is measured in."""
        raise NotImplementedError

    def slope(self, losses: np.ndarray) -> np.ndarray:
        """d value / d L_i [D] at losses [D]; at a tie of the worst, of one of them."""
        raise NotImplementedError

    def divergence(self, u: np.ndarray) -> float:
        """KL(C^T u || prior) in nats; inf where the prior is 0 and x is not."""
        raise NotImplementedError

    def total(self, losses: np.ndarray, u: np.ndarray) -> float:
        """value + kl KL(x || prior) of losses [D] at u [K]."""
        raise NotImplementedError

    def violations(self, losses: np.ndarray, u: np.ndarray, tolerance: float = 1e-6) -> list[str]:
        """Each bound that is passed by more than the tolerance, in words with the amount; empty: feasible."""
        raise NotImplementedError
