"""From laws to a mixture: the problem that a search solves at its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import rel_entr

from opmix_dist.search.convex import ConvexProgram
from opmix_dist.search.descent import descended, sampled
from opmix_dist.search.feasibility import InfeasibleError, SolverError, require_feasible_shares
from opmix_dist.search.laws import ConvexLaw, Law, SmoothLaw
from opmix_dist.search.problem import Problem, paper_composition

__all__ = [
    "InfeasibleError",
    "Proposal",
    "Proposer",
    "SolverError",
    "paper_composition",
    "propose",
    "repetition_caps",
]


@dataclass(frozen=True)
class Proposal:
    """u [K] on the simplex; mixture: x = C^T u [X]; predicted: the law's losses at u [D], nats per token,
    without its averaging term.

    objective: the problem's total, value + kl KL(x || prior); kl_divergence: KL(x || prior) in nats;
    solver_status: ``optimal`` for convex laws, else how the best point was found.
    """

    u: np.ndarray
    mixture: np.ndarray
    predicted: np.ndarray
    objective: float
    kl_divergence: float
    solver_status: str


def propose(
    law: Law,
    problem: Problem,
    *,
    seed: int = 0,
    start: np.ndarray | None = None,
) -> Proposal:
    """The u of the least total that a law predicts, averaging term left out, within the problem's bounds.

    Convex laws: a program with exponential cones, solved by Clarabel to 1e-8 of the total (1e-7 where
    rounding allows no more), which near a flat optimum leaves some 1e-4 on the shares. Smooth laws: the best
    of several descents by SLSQP. Laws of steps: the mean of the best of many points.

    Args:
        seed: of the points that descents begin from.
        start: u [K], to begin from in place of those points: near the optimum it takes a fraction of the
            time. Programs that are compiled already do not need it.

    Raises:
        InfeasibleError: no u satisfies the bounds; names those that fail and the amounts.
        ValueError: the law has other components or losses than the problem.
        SolverError: the solver found no optimum.
    """
    return Proposer(problem, law)(law, seed=seed, start=start)


class Proposer:
    """``propose`` for many laws: what can be prepared once is prepared once.

    law: one of them, for the shapes. The errors are those of ``propose``; those that do not depend on a law's
    coefficients (shapes, caps, floors) are raised here.
    """

    def __init__(self, problem: Problem, law: Law) -> None:
        _require_fit(law, problem)
        require_feasible_shares(problem)
        self.problem = problem
        self._program = ConvexProgram(problem)

    def __call__(self, law: Law, *, seed: int = 0, start: np.ndarray | None = None) -> Proposal:
        u, status = self._solve(law, seed, start)
        predicted = law.predict(u[None], averaging=False)[0]
        mixture = u @ self.problem.expanded
        return Proposal(
            u=u,
            mixture=mixture,
            predicted=predicted,
            objective=self.problem.total(predicted, u),
            kl_divergence=float(rel_entr(mixture, self.problem.prior).sum()),
            solver_status=status,
        )

    def _solve(self, law: Law, seed: int, start: np.ndarray | None) -> tuple[np.ndarray, str]:
        if isinstance(law, ConvexLaw) and (start is None or self._program.reuses(law)):
            return self._program.solve(law), "optimal"
        if isinstance(law, SmoothLaw):
            return descended(law, self.problem, seed, start), "best of several descents"
        return sampled(law, self.problem, seed, start), "mean of the best points"


def repetition_caps(
    tokens_available: np.ndarray, allowed_epochs: float, tokens_to_train: float
) -> np.ndarray:
    """Largest share of each domain [X] that repeats none of its tokens more than ``allowed_epochs`` times.

    Args:
        tokens_available: tokens of each domain [X].
        tokens_to_train: tokens that the mixture will be trained on. A cap above 1 does not bind.
    """
    available = np.asarray(tokens_available, dtype=np.float64)
    if not (available >= 0).all() or not allowed_epochs > 0 or not tokens_to_train > 0:
        raise ValueError(
            f"tokens must not be negative, epochs and tokens to train above 0, got {available.tolist()}, "
            f"{allowed_epochs} and {tokens_to_train}"
        )
    return available * allowed_epochs / tokens_to_train


def _require_fit(law: Law, problem: Problem) -> None:
    """ValueError where law and problem differ in the number of components or losses."""
    count = len(problem.expanded)
    try:
        losses = law.predict(np.eye(count)[:1])
    except ValueError as error:
        raise ValueError(f"the law has other components than the composition's {count}: {error}") from error
    problem.require_losses(losses.shape[1])
