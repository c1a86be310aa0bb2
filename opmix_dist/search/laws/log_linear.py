"""The log-linear law of OP-Mix, all domains and all starts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from opmix_dist.search.laws import robust
from opmix_dist.search.laws.base import Law, Observations
from opmix_dist.search.laws.basis import NARROW_RIDGE, UNVISITED, Basis
from opmix_dist.search.laws.starts import best_of_starts

# exp(t . u) that differs more than e^10-fold between components is noise that was fitted, not a law.
STEEP = 10.0
# A floor exp(c) below this part of the smallest loss might as well be 0: the law is a pure exponential.
FLOORLESS = 1e-3
# Distinct candidates, for each coefficient, from which the averaging term is fitted. It bends the law along
# the simplex much as exp does: with fewer candidates the two only share the noise.
AVERAGING_POINTS = 1.5


@dataclass(frozen=True)
class LogLinearLaw:
    """L_i(u) = exp(c_i) + exp(t_i . u) + b_i (1 - sum_k u_k^2), nats per token (OP-Mix, arXiv 2605.15220; the
    form of Data Mixing Laws, arXiv 2403.16952).

    The last term is about averaging and not in the paper: it is 0 at a single probe and grows with 1 - 1 / n
    for the effective number n = 1 / sum u^2 of probes that u mixes.

    log_c: c [D]; t: [D, K]; averaging: b [D], None: no such term.
    """

    log_c: np.ndarray
    t: np.ndarray
    averaging: np.ndarray | None = None

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        losses = np.exp(self.log_c) + np.exp(candidates @ self.t.T)
        if averaging and self.averaging is not None:
            losses = losses + np.outer(_mixedness(candidates), self.averaging)
        return losses

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        slopes = np.exp(self.t @ u)[:, None] * self.t
        if averaging and self.averaging is not None:
            slopes = slopes - 2 * np.outer(self.averaging, u)
        return slopes

    def expression(self, u: cp.Variable) -> cp.Expression:
        """The D losses at a variable u [K], without the averaging term: sums of exponentials, convex."""
        return np.exp(self.log_c) + cp.exp(self.t @ u)


def _mixedness(candidates: np.ndarray) -> np.ndarray:
    """1 - sum u^2 [M]."""
    return 1 - (candidates**2).sum(axis=1)


@dataclass(frozen=True)
class LogLinear:
    """Fits a log-linear law to each domain.

    Minimises the sum of Huber(L_i(u_m) - loss_mi) over the candidates: residuals of the losses themselves,
    in nats, not of their logarithms, as the public code that OP-Mix fits with does (allenai/olmix, after
    Data Mixing Laws, arXiv 2403.16952; threshold 0.02). Each start draws exp(c) below the smallest loss and
    perturbs the slopes of the regression of log(loss - exp(c)).

    Standard errors weigh the candidates. Measured gradients add a residual for each direction on the simplex,
    in units of z (``Basis``): the error of the loss one standard deviation of the candidates, or of a uniform
    draw, away. That is of the size and kind of a loss's own residual, which is why it has the same weight. On
    truths that are not log-linear, with noise, weights of 0.3 to 100 do as well, and less does worse.

    Where observations do not determine a law, or losses are constant, the answer is the flattest law that
    fits (``robust.RIDGE``), and slopes along directions that the candidates hardly visit are drawn towards 0
    (NARROW_RIDGE); each with a warning.

    huber_delta: residual, in nats, from which the penalty grows linearly; num_starts: starts per domain, the
    best of them is the answer; averaging: whether the law has its averaging term; gradient_weight: of the
    residual of one direction's slope beside that of the loss.
    """

    huber_delta: float = 0.02
    num_starts: int = 64
    averaging: bool = False
    gradient_weight: float = 1.0
    name = "log_linear"
    most_folds = 64

    def __post_init__(self) -> None:
        if not self.huber_delta > 0 or self.num_starts < 1 or not self.gradient_weight >= 0:
            raise ValueError(
                f"need huber_delta > 0, num_starts >= 1 and gradient_weight >= 0, got {self.huber_delta}, "
                f"{self.num_starts} and {self.gradient_weight}"
            )

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        design = _Design(observations, self.averaging and _can_average(observations))
        everything = np.ones((1, len(observations.candidates)))
        problems = design.problems(self, observations.losses[None], everything)
        theta, converged = best_of_starts(problems, self.num_starts, seed)
        law = design.law(theta)
        warnings = [
            *_design_warnings(design, asked_for_averaging=self.averaging),
            *_law_warnings(observations, law, converged),
        ]
        return law, tuple(warnings)

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits near ``law``, all at once; losses [R, M, D], weights [R, M]."""
        assert isinstance(law, LogLinearLaw)
        design = _Design(observations, law.averaging is not None)
        problems = design.problems(self, losses, weights)
        theta, _ = robust.minimise(problems, np.tile(design.theta(law), (len(losses), 1)))
        return [design.law(part) for part in theta.reshape(len(losses), len(law.t), -1)]


class _Design:
    """Observations in the coordinates of the solver, with or without the averaging term.

    sloped: candidates whose gradient was measured [M] bool.
    """

    def __init__(self, observations: Observations, averaging: bool) -> None:
        self.observations = observations
        candidates, gradients = observations.candidates, observations.gradients
        points, components = candidates.shape
        self.sloped = (
            np.zeros(points, dtype=bool) if gradients is None else np.isfinite(gradients).all(axis=(1, 2))
        )
        self.basis = Basis.of(candidates, complete=bool(self.sloped.any()))
        self.z = self.basis.project(candidates)
        self.feature = _mixedness(candidates) if averaging else None
        self.coefficients = components + 1 + averaging

    def determined(self, used: np.ndarray) -> bool:
        """Whether the candidates used [M] bool are enough to determine all coefficients."""
        candidates, sloped = self.observations.candidates, self.sloped & used
        values, gradients = (len(np.unique(candidates[rows], axis=0)) for rows in (used, sloped))
        equations = values + (candidates.shape[1] - 1) * gradients
        if equations < self.coefficients:
            return False
        if sloped.any():
            return True
        columns = [np.ones(len(self.z)), self.z, *([] if self.feature is None else [self.feature])]
        # exp(c) and the amplitude share the column of ones.
        return bool(np.linalg.matrix_rank(np.column_stack(columns)[used]) == self.coefficients - 1)

    def problems(self, settings: LogLinear, losses: np.ndarray, weights: np.ndarray) -> robust.HuberProblems:
        """R x D regressions, the D of each refit together; losses [R, M, D], weights [R, M]."""
        refits, points, num_domains = losses.shape
        target = losses.transpose(0, 2, 1).reshape(refits * num_domains, points)
        weight = np.repeat(weights, num_domains, axis=0) * np.tile(self.observations.weights.T, (refits, 1))
        loose = np.array([not self.determined(row > 0) for row in weights])
        flat = np.repeat(loose, num_domains) | robust.is_constant(target)
        ridge = np.zeros((len(target), 1 + self.basis.rank + (self.feature is not None)))
        ridge[:, 1 : 1 + self.basis.rank] = NARROW_RIDGE * points * self._narrow
        ridge[flat] = np.maximum(ridge[flat], robust.RIDGE * points)
        slopes = self._slopes(settings.gradient_weight * weight, refits) if self.sloped.any() else None
        return robust.HuberProblems(self.z, target, weight, ridge, settings.huber_delta, self.feature, slopes)

    @property
    def _narrow(self) -> np.ndarray:
        """Directions [r] bool that nothing tells of but candidates that hardly visit them."""
        return self.basis.narrow & ~self.sloped.any()

    def narrow(self) -> list[str]:
        """Those directions in words."""
        return [] if self.sloped.any() else list(self.basis.describe_narrow(self.observations.components))

    def _slopes(self, weight: np.ndarray, refits: int) -> robust.Slopes:
        gradients = self.observations.gradients
        assert gradients is not None
        measured = gradients[self.sloped].swapaxes(0, 1) @ self.basis.unscale.T  # [D, G, r]
        feature = None
        if self.feature is not None:
            feature = -2 * self.observations.candidates[self.sloped] @ self.basis.unscale.T
        target = np.tile(measured, (refits, 1, 1))
        rows = np.flatnonzero(self.sloped)
        return robust.Slopes(rows, self.z[rows], target, weight[:, rows], feature)

    def law(self, theta: np.ndarray) -> LogLinearLaw:
        log_c, log_amplitude, exponents = robust.decode(theta, self.basis.rank)
        t = exponents @ self.basis.scale.T  # [D, K]
        averaging = None if self.feature is None else theta[:, -1].copy()
        return LogLinearLaw(log_c, t + (log_amplitude - t @ self.basis.centre)[:, None], averaging)

    def theta(self, law: LogLinearLaw) -> np.ndarray:
        """Inverse of ``law`` where that law has no slopes outside of the basis."""
        exponents = law.t @ self.basis.unscale.T
        theta = robust.encode(np.exp(law.log_c), law.t @ self.basis.centre, exponents)
        return theta if law.averaging is None else np.column_stack([theta, law.averaging])


def _can_average(observations: Observations) -> bool:
    """Whether an averaging term can be told from the rest of the law."""
    design = _Design(observations, averaging=True)
    distinct = len(np.unique(observations.candidates, axis=0))
    enough = distinct >= AVERAGING_POINTS * design.coefficients
    return enough and design.determined(np.ones(len(observations.candidates), dtype=bool))


def _design_warnings(design: _Design, *, asked_for_averaging: bool) -> Iterator[str]:
    points, components = design.observations.candidates.shape
    if asked_for_averaging and design.feature is None:
        needed = int(np.ceil(AVERAGING_POINTS * (components + 2)))
        yield (
            f"{points} candidates do not tell averaging from the mixture, so the laws have no averaging "
            f"term: use {needed} or more that differ in how many components they mix"
        )
    if not design.determined(np.ones(points, dtype=bool)):
        varies = np.ptp(design.observations.candidates, axis=0) > UNVISITED
        alike = [name for name, does in zip(design.observations.components, varies, strict=True) if not does]
        where = f", as all of them have the same of {', '.join(alike)}" if alike and points > 1 else ""
        yield (
            f"{points} candidates do not determine laws of {design.coefficients} coefficients{where}: "
            "the flattest laws that fit were taken; use more distinct candidates"
        )
    narrow = design.narrow()
    if narrow:
        yield (
            f"the candidates hardly vary in {'; '.join(narrow)}: slopes there were drawn towards 0; add "
            "candidates with more and with less of these components"
        )


def _law_warnings(observations: Observations, law: LogLinearLaw, converged: np.ndarray) -> Iterator[str]:
    constant = robust.is_constant(observations.losses.T)
    bare = np.exp(law.log_c) < FLOORLESS * observations.losses.min(axis=0)
    for concerned, what in (
        (constant, "the loss is the same for every candidate, so the law is flat"),
        (~converged, f"the fit of the law did not converge in {robust.MAX_ITERATIONS} iterations"),
        (np.ptp(law.t, axis=1) > STEEP, "the law is too steep to trust away from the candidates"),
        (
            bare & ~constant,
            "no floor was found, so the law extrapolates as a pure exponential: take care far out",
        ),
    ):
        if concerned.any():
            yield f"{', '.join(np.array(observations.names)[concerned])}: {what}"
