"""From laws to a mixture: the convex problem that a search solves at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cvxpy as cp
import numpy as np
from scipy.optimize import linprog
from scipy.special import rel_entr

from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.simplex import require_simplex

Expansion = Literal["effective", "paper"]

# Caps that are exceeded by less than this are met: what the solvers resolve.
CAP_TOLERANCE = 1e-7


class InfeasibleError(ValueError):
    """No mixture of the components satisfies the caps."""


class SolverError(RuntimeError):
    """The solver stopped without an optimum."""


@dataclass(frozen=True)
class Proposal:
    """u [K] on the simplex; mixture: x = C^T u [D]; predicted: the law's losses at u, nats per token.

    objective: sum_i omega_i exp(t_i . u) + kl KL(x || prior), the constants exp(c_i) left out;
    kl_divergence: KL(x || prior) in nats; solver_status: as cvxpy names it.
    """

    u: np.ndarray
    mixture: np.ndarray
    predicted: np.ndarray
    objective: float
    kl_divergence: float
    solver_status: str


def propose(
    law: LogLinearLaw,
    composition: np.ndarray,
    *,
    prior: np.ndarray,
    kl: float = 0.05,
    omega: np.ndarray | None = None,
    caps: np.ndarray | None = None,
    expansion: Expansion = "effective",
) -> Proposal:
    """min over u on the simplex of sum_i omega_i exp(t_i . u) + kl KL(x || prior), x = C^T u, x <= caps.

    The objective of OP-Mix (arXiv 2605.15220); convex, with exponential cones, solved by Clarabel to 1e-8 of
    the objective, which near a flat optimum leaves some 1e-4 on the shares.
    A domain of prior 0 has an infinite KL wherever its share is above 0: components that contain it get no
    weight. With kl = 0 the prior plays no part, and kl_divergence may be inf.

    Args:
        law: coefficients for K components and any number of losses L.
        composition: C [K, D], rows sum to 1.
        prior: [D], a mixture.
        kl: lambda of the KL term, at least 0.
        omega: weight of each loss [L], not negative; None is 1 / L each.
        caps: largest share of each domain [D]; see ``repetition_caps``.
        expansion: "effective", or "paper" for ``paper_composition``.

    Raises:
        InfeasibleError: no u satisfies the caps.
        ValueError: wrong shapes or values, or a prior that rules out every component.
        SolverError: the solver found no optimum.
    """
    composition = require_simplex(composition, "each row of the composition")
    if expansion == "paper":
        composition = paper_composition(composition)
    prior = require_simplex(prior, "the prior")
    omega = np.full(len(law.t), 1 / len(law.t)) if omega is None else np.asarray(omega, dtype=np.float64)
    caps = np.full(len(prior), np.inf) if caps is None else np.asarray(caps, dtype=np.float64)
    _check(law, composition, prior, kl, omega, caps)
    usable = _usable_components(composition, prior) if kl > 0 else np.full(len(composition), True)
    _require_feasible(composition[usable], caps)
    u = np.zeros(len(composition))
    u[usable], status = _solve(law.t[:, usable], composition[usable], prior, kl, omega, caps)
    mixture = u @ composition
    divergence = float(rel_entr(mixture, prior).sum())
    penalty = kl * divergence if kl > 0 else 0.0
    return Proposal(
        u=u,
        mixture=mixture,
        predicted=law.predict(u[None])[0],
        objective=float(omega @ np.exp(law.t @ u) + penalty),
        kl_divergence=divergence,
        solver_status=status,
    )


def repetition_caps(
    tokens_available: np.ndarray, allowed_epochs: float, tokens_to_train: float
) -> np.ndarray:
    """Largest share of each domain [D] that repeats none of its tokens more than ``allowed_epochs`` times.

    Args:
        tokens_available: tokens of each domain [D].
        tokens_to_train: tokens that the mixture will be trained on. A cap above 1 does not bind.
    """
    available = np.asarray(tokens_available, dtype=np.float64)
    if not (available >= 0).all() or not allowed_epochs > 0 or not tokens_to_train > 0:
        raise ValueError(
            f"tokens must not be negative, epochs and tokens to train above 0, got {available.tolist()}, "
            f"{allowed_epochs} and {tokens_to_train}"
        )
    return available * allowed_epochs / tokens_to_train


def paper_composition(composition: np.ndarray) -> np.ndarray:
    """C [K, D] as the authors' pretraining code expands u: a domain's probe counts as the pure domain.

    Row 0 is ``old`` and stays. Row k was trained on s d + (1 - s) old for some domain d and share s; it
    becomes the one-hot row of d. Two probes for one new domain stay as they are: there the authors, too,
    work with the effective shares.

    Raises:
        ValueError: a row is not of that form.
    """
    if len(composition) == 2:
        return composition
    old, excess = composition[0], composition[1:] - composition[0]  # s (onehot(d) - old)
    pure = np.eye(len(old))[excess.argmax(axis=1)]
    pure = np.where(np.abs(excess).max(axis=1, keepdims=True) < 1e-9, composition[1:], pure)  # old itself
    towards = pure - old
    share = (excess * towards).sum(axis=1) / np.maximum((towards**2).sum(axis=1), 1e-18)
    wrong = np.flatnonzero(np.abs(excess - share[:, None] * towards).max(axis=1) > 1e-6)
    if wrong.size:
        raise ValueError(
            f"expansion 'paper' needs components that mix one domain with the old mixture, and component "
            f"{wrong[0] + 1} does not: use 'effective'"
        )
    return np.vstack([old, pure])


def _check(
    law: LogLinearLaw,
    composition: np.ndarray,
    prior: np.ndarray,
    kl: float,
    omega: np.ndarray,
    caps: np.ndarray,
) -> None:
    num_losses, num_components = law.t.shape
    if composition.ndim != 2 or len(composition) != num_components:
        raise ValueError(f"the law has {num_components} components, the composition is {composition.shape}")
    for what, values, count in (
        ("prior", prior, composition.shape[1]),
        ("caps", caps, composition.shape[1]),
        ("omega", omega, num_losses),
    ):
        if values.shape != (count,):
            raise ValueError(f"{what} must have {count} entries, got an array {values.shape}")
    if not (np.isfinite(omega) & (omega >= 0)).all() or not (np.isfinite(kl) and kl >= 0):
        raise ValueError(f"omega and kl must be finite and not negative, got {omega.tolist()} and {kl}")
    if not (caps >= 0).all():
        raise ValueError(f"caps must not be negative, got {caps.tolist()}")


def _usable_components(composition: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Components [K] bool that contain no domain of prior 0."""
    usable = ~(composition[:, prior == 0] > 0).any(axis=1)
    if not usable.any():
        ruled_out = np.flatnonzero(prior == 0).tolist()
        raise ValueError(
            f"the prior is 0 for domain(s) {ruled_out}, and every component contains one of them: "
            "give them a prior above 0, or set kl to 0"
        )
    return usable


def _require_feasible(composition: np.ndarray, caps: np.ndarray) -> None:
    """A linear program finds the least excess over the caps: the verdict is not left to solver tolerances."""
    bounded = np.flatnonzero(np.isfinite(caps))
    if not bounded.size:
        return
    num_components = len(composition)
    excess = np.append(np.zeros(num_components), 1.0)
    found = linprog(
        excess,
        A_ub=np.column_stack([composition[:, bounded].T, -np.ones(bounded.size)]),
        b_ub=caps[bounded],
        A_eq=[np.append(np.ones(num_components), 0.0)],
        b_eq=[1.0],
        bounds=(0, None),
    )
    if found.status != 0:
        raise SolverError(f"checking the caps failed: {found.message}")
    if found.fun > CAP_TOLERANCE:
        raise InfeasibleError(
            f"no mixture of the components satisfies the caps, which sum to {np.minimum(caps, 1).sum():.4g}: "
            f"the closest exceeds one by {found.fun:.4g}; allow more repetitions or train on fewer tokens"
        )


def _solve(
    t: np.ndarray, composition: np.ndarray, prior: np.ndarray, kl: float, omega: np.ndarray, caps: np.ndarray
) -> tuple[np.ndarray, str]:
    """u [K] on the simplex, and cvxpy's status."""
    u = cp.Variable(len(composition), nonneg=True)
    x = composition.T @ u
    constraints = [cp.sum(u) == 1]
    bounded = np.isfinite(caps)
    if bounded.any():
        constraints.append(x[bounded] <= caps[bounded])
    objective = omega @ cp.exp(t @ u)
    if kl > 0:
        drawn = prior > 0
        objective += kl * cp.sum(cp.rel_entr(x[drawn], prior[drawn]))
    problem = cp.Problem(cp.Minimize(objective), constraints)
    try:
        problem.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        raise SolverError(f"Clarabel failed on the proposal: {error}") from error
    if problem.status != cp.OPTIMAL or u.value is None:
        raise SolverError(f"Clarabel found no optimum of the proposal: its status is {problem.status}")
    weights = np.clip(u.value, 0, None)
    return weights / weights.sum(), problem.status
