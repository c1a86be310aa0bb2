"""Many small Huber regressions of one exponential at once, by batched Levenberg-Marquardt.

P problems share their inputs z [M, r] (columns about centred, of about unit size) and each fits

    y(z) = f + A (exp(w . z / A) - 1) + e s,    A = f / (1 + exp(-b)),

with its own theta = (f, b, w_1 .. w_r, e). The last term is there where points have a further feature s that
enters linearly. It is C + exp(a + v . z) + e s with C = f - A, a = log A, v = w / A: f is the value and w
the slope at z = 0, which data fix well, and b holds the curvature alone, which they fix badly. In
(log C, a, v) the near-degenerate direction is a curved valley; here it is an axis. C, A > 0 always.

Slopes dy / dz may be given as data too, at some of the points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

MAX_ITERATIONS = 300
# Weight per point of the ridge on (curvature, slopes) where the data do not determine a law. In these
# coordinates a slope is the change of loss for one standard deviation of u: it is biased by one millionth.
RIDGE = 1e-6
# A step that promises to gain less than this part of the objective, or than residuals of 1e-14, is the last.
RELATIVE_DECREASE = 1e-11
RESIDUAL_FLOOR = 1e-14
# Beyond delta, Huber's curvature is 0 and that of its quadratic majorant is delta / |residual|. This part of
# the latter keeps the matrix regular; all of it takes some five times the iterations where outliers are many.
OUTLIER_CURVATURE = 0.1
# |b| = 30 makes one of the two terms 1e-13 of the other: further out nothing changes in float64.
MAX_LOGIT = 30.0


@dataclass(frozen=True)
class Slopes:
    """Measured slopes of P regressions at G points.

    rows: of the points among all [G]; z: inputs [G, r]; target: dy / dz [P, G, r]; weight: [P, G], 0 leaves
    a point out; feature: ds / dz [G, r], None without a feature.
    """

    rows: np.ndarray
    z: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    feature: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Slopes:
        return replace(self, target=self.target[rows], weight=self.weight[rows])

    def residual(self, theta: np.ndarray) -> np.ndarray:
        """[P, G, r]."""
        rank = self.z.shape[1]
        growth = _parts(theta, self.z)[2]
        slopes = growth[..., None] * theta[:, None, 2 : 2 + rank]
        if self.feature is not None:
            slopes = slopes + theta[:, -1, None, None] * self.feature
        return slopes - self.target

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """d residual / d theta [P, G, r, parameters]."""
        rank = self.z.shape[1]
        level, share, growth, exponent = _parts(theta, self.z)
        w = theta[:, 2 : 2 + rank]
        along = growth[..., None] * w[:, None]  # [P, G, r]
        jacobian = np.zeros((*along.shape, theta.shape[1]))
        jacobian[..., 0] = -along * (exponent / level)[..., None]
        jacobian[..., 1] = -along * (exponent * (1 - share))[..., None]
        jacobian[..., 2 : 2 + rank] = growth[..., None, None] * np.eye(rank)
        jacobian[..., 2 : 2 + rank] += along[..., None] * (self.z / (level * share)[..., None])[:, :, None]
        if self.feature is not None:
            jacobian[..., -1] = self.feature
        return jacobian


@dataclass(frozen=True)
class HuberProblems:
    """P regressions. The objective is the sum of weight huber(residual) over the points and the slopes, and
    of ridge / 2 theta^2 over the coefficients after f.

    z: inputs [M, r]; target: [P, M]; weight: [P, M], 0 leaves a point out; ridge: [P, 1 + r] or
    [P, 2 + r]; delta: Huber's threshold on the residual, in the units of the target; feature: s [M].
    """

    z: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    delta: float
    feature: np.ndarray | None = None
    slopes: Slopes | None = None

    def take(self, rows: np.ndarray) -> HuberProblems:
        return replace(
            self,
            target=self.target[rows],
            weight=self.weight[rows],
            ridge=self.ridge[rows],
            slopes=None if self.slopes is None else self.slopes.take(rows),
        )

    def residual(self, theta: np.ndarray) -> np.ndarray:
        """[P, M]."""
        return predict(theta, self.z, self.feature) - self.target

    def huber(self, theta: np.ndarray) -> np.ndarray:
        """The data term [P]; theta [P, 2 + r]."""
        value = (self.weight * _huber(self.residual(theta), self.delta)).sum(axis=1)
        if self.slopes is not None:
            lost = _huber(self.slopes.residual(theta), self.delta)
            value += (self.slopes.weight * lost.sum(axis=2)).sum(axis=1)
        return value

    def objective(self, theta: np.ndarray) -> np.ndarray:
        """[P]; inf where theta is not admissible (f <= 0) or overflows."""
        value = self.huber(theta) + (self.ridge * theta[:, 1:] ** 2).sum(axis=1) / 2
        return np.where((theta[:, 0] > 0) & np.isfinite(value), value, np.inf)

    def step(self, theta: np.ndarray, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Damped Gauss-Newton step [P, 2 + r], and the gain that the quadratic model promises [P]."""
        normal, gradient = self.normal_equations(theta)
        diagonal = np.einsum("pii->pi", normal)  # a view: adding to it adds to the matrices
        gradient[:, 1:] += self.ridge * theta[:, 1:]
        diagonal[:, 1:] += self.ridge
        # The floor keeps the matrix regular where the data say nothing of a coefficient.
        diagonal += damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True)
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        return step, -(step * gradient).sum(axis=1) / 2

    def normal_equations(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J^T H J [P, 2 + r, 2 + r] and the gradient [P, 2 + r] of the data term.

        H is Huber's curvature at each residual. J [P, M, 2 + r] of the points is not formed: its columns are
        s_0 and s_1 for (f, b) and growth * z_j for w_j, so that the large block is one product of [P, M]
        with [M, r^2].
        """
        z, rank = self.z, self.z.shape[1]
        level, share, growth, exponent = _parts(theta, z)
        pull, curvature = _pull(self.residual(theta), self.delta)
        pull, curvature = self.weight * pull, self.weight * curvature
        bend = np.expm1(exponent) - exponent * growth  # d y / d A
        columns = [1 + share * bend, level * share * (1 - share) * bend]
        if self.feature is not None:
            columns.append(np.broadcast_to(self.feature, bend.shape))
        scalar = np.stack(columns, axis=1)  # [P, 2 or 3, M]
        weighted = scalar * curvature[:, None]
        # Coefficients in the order (f, b, e, w) while the blocks are put in, and in theta's order at the end.
        count = len(columns)
        normal = np.empty((len(theta), count + rank, count + rank))
        normal[:, :count, :count] = weighted @ scalar.swapaxes(1, 2)
        normal[:, :count, count:] = (weighted * growth[:, None]) @ z
        normal[:, count:, :count] = normal[:, :count, count:].swapaxes(1, 2)
        pairs = (z[:, :, None] * z[:, None]).reshape(len(z), rank * rank)
        normal[:, count:, count:] = ((curvature * growth**2) @ pairs).reshape(len(theta), rank, rank)
        gradient = np.hstack([(scalar @ pull[..., None])[..., 0], (pull * growth) @ z])
        if self.feature is not None:
            order = np.r_[0, 1, 3 : 3 + rank, 2]
            normal, gradient = normal[:, order][:, :, order], gradient[:, order]
        if self.slopes is not None:
            self._add_slopes(self.slopes, theta, normal, gradient)
        return normal, gradient

    def _add_slopes(
        self, slopes: Slopes, theta: np.ndarray, normal: np.ndarray, gradient: np.ndarray
    ) -> None:
        pull, curvature = _pull(slopes.residual(theta), self.delta)
        weight = slopes.weight[..., None]
        jacobian = slopes.jacobian(theta).reshape(len(theta), -1, theta.shape[1])
        weighted = jacobian * (weight * curvature).reshape(len(theta), -1, 1)
        normal += weighted.swapaxes(1, 2) @ jacobian
        gradient += ((weight * pull).reshape(len(theta), 1, -1) @ jacobian)[:, 0]


def is_constant(target: np.ndarray) -> np.ndarray:
    """Rows of [P, M] that are the same at every point, but for rounding [P] bool."""
    return np.ptp(target, axis=1) <= 1e-9 * target.mean(axis=1)


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    return inside * (size - inside / 2)


def _pull(residual: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Huber's derivative, and the curvature that stands for its second derivative."""
    outside = np.abs(residual) > delta
    tail = OUTLIER_CURVATURE * delta / np.maximum(np.abs(residual), delta)
    return np.clip(residual, -delta, delta), np.where(outside, tail, 1.0)


def _parts(theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f [P, 1], A / f [P, 1], exp(w . z / A) [P, M] and its exponent [P, M]."""
    level, share = theta[:, :1], expit(theta[:, 1:2])
    exponent = theta[:, 2 : 2 + z.shape[1]] @ z.T / (level * share)
    return level, share, np.exp(exponent), exponent


def predict(theta: np.ndarray, z: np.ndarray, feature: np.ndarray | None = None) -> np.ndarray:
    """y [P, M] of theta [P, 2 + r] at z [M, r]; with a feature s [M] theta is [P, 3 + r]."""
    level, share, _, exponent = _parts(theta, z)
    value = level + level * share * np.expm1(exponent)
    return value if feature is None else value + theta[:, -1:] * feature


def encode(constant: np.ndarray, log_amplitude: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """theta [P, 2 + r] of C + exp(a + v . z), from C [P], a [P] and v [P, r]."""
    amplitude = np.exp(log_amplitude)
    logit = np.clip(log_amplitude - np.log(constant), -MAX_LOGIT, MAX_LOGIT)
    return np.column_stack([constant + amplitude, logit, amplitude[:, None] * exponents])


def decode(theta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log C [P], a [P] and v [P, rank] of C + exp(a + v . z); inverse of ``encode``."""
    log_level, logit = np.log(theta[:, 0]), theta[:, 1]
    log_amplitude = log_level - np.logaddexp(0, -logit)
    exponents = theta[:, 2 : 2 + rank] / np.exp(log_amplitude)[:, None]
    return log_level - np.logaddexp(0, logit), log_amplitude, exponents


def minimise(
    problems: HuberProblems, theta: np.ndarray, iterations: int = MAX_ITERATIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt from theta [P, 2 + r], each problem until it converges.

    Returns:
        theta [P, 2 + r] and whether each problem converged within the iterations [P] bool.
    """
    theta, damping = theta.copy(), np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    floor = RESIDUAL_FLOOR**2 * len(problems.z)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # such a step is refused
        objective = problems.objective(theta)
        for _ in range(iterations):
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
