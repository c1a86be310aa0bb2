"""Many small Huber regressions of one exponential at once, by batched Levenberg-Marquardt.

P problems share their inputs z [M, r] (columns centred and orthonormal up to sqrt(M)) and each fits

    y(z) = f + A (exp(w . z / A) - 1),    A = f / (1 + exp(-b)),

with its own theta = (f, b, w_1 .. w_r). It is C + exp(a + v . z) with C = f - A, a = log A, v = w / A: f is
the value and w the slope at z = 0, which data fix well, and b holds the curvature alone, which they fix
badly. In (log C, a, v) the near-degenerate direction is a curved valley; here it is an axis. C, A > 0 always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

MAX_ITERATIONS = 300
# A step that promises to gain less than this part of the objective, or than residuals of 1e-14, is the last.
RELATIVE_DECREASE = 1e-11
RESIDUAL_FLOOR = 1e-14
# Beyond delta, Huber's curvature is 0 and that of its quadratic majorant is delta / |residual|. This part of
# the latter keeps the matrix regular; all of it takes some five times the iterations where outliers are many.
OUTLIER_CURVATURE = 0.1
# |b| = 30 makes one of the two terms 1e-13 of the other: further out nothing changes in float64.
MAX_LOGIT = 30.0


@dataclass(frozen=True)
class HuberProblems:
    """P regressions. The objective is sum_m weight_m huber(residual_m) + ridge / 2 (b^2 + |w|^2).

    z: inputs [M, r]; target: [P, M]; weight: [P, M], 0 leaves a point out; ridge: [P]; delta: Huber's
    threshold on the residual, in the units of the target.
    """

    z: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    delta: float

    def take(self, rows: np.ndarray) -> HuberProblems:
        return replace(self, target=self.target[rows], weight=self.weight[rows], ridge=self.ridge[rows])

    def huber(self, theta: np.ndarray) -> np.ndarray:
        """The data term [P]; theta [P, 2 + r]."""
        size = np.abs(predict(theta, self.z) - self.target)
        inside = np.minimum(size, self.delta)
        return (self.weight * inside * (size - inside / 2)).sum(axis=1)

    def objective(self, theta: np.ndarray) -> np.ndarray:
        """[P]; inf where theta is not admissible (f <= 0) or overflows."""
        value = self.huber(theta) + self.ridge / 2 * (theta[:, 1:] ** 2).sum(axis=1)
        return np.where((theta[:, 0] > 0) & np.isfinite(value), value, np.inf)

    def step(self, theta: np.ndarray, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Damped Gauss-Newton step [P, 2 + r], and the gain that the quadratic model promises [P]."""
        normal, gradient = self._normal_equations(theta)
        diagonal = np.einsum("pii->pi", normal)  # a view: adding to it adds to the matrices
        gradient[:, 1:] += self.ridge[:, None] * theta[:, 1:]
        diagonal[:, 1:] += self.ridge[:, None]
        # The floor keeps the matrix regular where the data say nothing of a coefficient.
        diagonal += damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True)
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        return step, -(step * gradient).sum(axis=1) / 2

    def _normal_equations(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J^T H J [P, 2 + r, 2 + r] and the gradient [P, 2 + r], without forming J [P, M, 2 + r].

        H is Huber's curvature at each residual.

        J's columns are s_0 and s_1 for (f, b) and growth * z_j for w_j: the large block is one product of
        [P, M] with [M, r^2].
        """
        z, rank = self.z, self.z.shape[1]
        level, share, growth, exponent = _parts(theta, z)
        residual = level + level * share * np.expm1(exponent) - self.target
        pull = self.weight * np.clip(residual, -self.delta, self.delta)  # Huber's derivative
        outside = np.abs(residual) > self.delta
        tail = OUTLIER_CURVATURE * self.delta / np.maximum(np.abs(residual), self.delta)
        curvature = self.weight * np.where(outside, tail, 1.0)
        bend = np.expm1(exponent) - exponent * growth  # d y / d A
        scalar = np.stack([1 + share * bend, level * share * (1 - share) * bend], axis=1)  # [P, 2, M]
        weighted = scalar * curvature[:, None]
        normal = np.empty((len(theta), 2 + rank, 2 + rank))
        normal[:, :2, :2] = weighted @ scalar.swapaxes(1, 2)
        normal[:, :2, 2:] = (weighted * growth[:, None]) @ z
        normal[:, 2:, :2] = normal[:, :2, 2:].swapaxes(1, 2)
        pairs = (z[:, :, None] * z[:, None]).reshape(len(z), rank * rank)
        normal[:, 2:, 2:] = ((curvature * growth**2) @ pairs).reshape(len(theta), rank, rank)
        gradient = np.hstack([(scalar @ pull[..., None])[..., 0], (pull * growth) @ z])
        return normal, gradient


def _parts(theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f [P, 1], A / f [P, 1], exp(w . z / A) [P, M] and its exponent [P, M]."""
    level, share = theta[:, :1], expit(theta[:, 1:2])
    exponent = theta[:, 2:] @ z.T / (level * share)
    return level, share, np.exp(exponent), exponent


def predict(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    """y [P, M] of theta [P, 2 + r] at z [M, r]."""
    level, share, _, exponent = _parts(theta, z)
    return level + level * share * np.expm1(exponent)


def encode(constant: np.ndarray, log_amplitude: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """theta [P, 2 + r] of C + exp(a + v . z), from C [P], a [P] and v [P, r]."""
    amplitude = np.exp(log_amplitude)
    head = [constant + amplitude, log_amplitude - np.log(constant)]
    return np.column_stack([*head, amplitude[:, None] * exponents])


def decode(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log C [P], a [P] and v [P, r] of C + exp(a + v . z); inverse of ``encode``."""
    log_level, logit = np.log(theta[:, 0]), theta[:, 1]
    log_amplitude = log_level - np.logaddexp(0, -logit)
    return log_level - np.logaddexp(0, logit), log_amplitude, theta[:, 2:] / np.exp(log_amplitude)[:, None]


def minimise(problems: HuberProblems, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt from theta [P, 2 + r], each problem until it converges.

    Returns:
        theta [P, 2 + r] and whether each problem converged within 300 iterations [P] bool.
    """
    theta, damping = theta.copy(), np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    floor = RESIDUAL_FLOOR**2 * len(problems.z)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # such a step is refused
        objective = problems.objective(theta)
        for _ in range(MAX_ITERATIONS):
            part, before = problems.take(active), objective[active]
            step, promised = part.step(theta[active], damping[active])
            trial = theta[active] + step
            trial[:, 1] = np.clip(trial[:, 1], -MAX_LOGIT, MAX_LOGIT)
            value = part.objective(trial)
            better = value < before
            theta[active[better]], objective[active[better]] = trial[better], value[better]
            # A damped step promises little wherever it starts: only a nearly free one tells convergence.
            done = (promised <= RELATIVE_DECREASE * before + floor) & (damping[active] < 1e-2)
            damping[active] = np.clip(damping[active] * np.where(better, 0.2, 8.0), 1e-12, None)
            active = active[~done & (damping[active] < 1e10)]
            if not active.size:
                break
    return theta, ~np.isin(np.arange(len(theta)), active)
