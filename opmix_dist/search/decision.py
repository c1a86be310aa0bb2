"""Whether to move: a gain that is within its uncertainty is no reason to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from opmix_dist.search.bootstrap import Bootstrap
from opmix_dist.search.laws import Law
from opmix_dist.search.problem import Problem


@dataclass(frozen=True)
class Gain:
    """By how much the objective falls from staying to the proposal, and the standard error of that."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Decision:
    """move: whether to; reason: in words with the numbers."""

    move: bool
    gain: float
    stderr: float
    reason: str


def decide(gain: float, stderr: float, *, confidence: float = 0.9) -> Decision:
    """Move where the gain is above 0 at a one-sided confidence, its error taken as normal.

    Args:
        gain: of the proposal over staying, above 0 where the proposal is better.
        stderr: of the gain, not negative.

    Raises:
        ValueError: gain or stderr not finite, stderr negative, confidence outside of [0.5, 1).
    """
    if not np.isfinite([gain, stderr]).all() or stderr < 0:
        raise ValueError(f"gain and stderr must be finite and stderr not negative, got {gain} and {stderr}")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1, got {confidence}")
    margin = float(norm.ppf(confidence)) * stderr
    known = f"gain {gain:.4g} ± {stderr:.2g}"
    if gain <= 0:
        return Decision(False, gain, stderr, f"{known}: the proposal is no better than staying")
    if gain <= margin:
        needed = f"{margin:.4g} would be needed at {confidence:.0%} confidence"
        return Decision(False, gain, stderr, f"{known}: within its uncertainty, {needed}")
    return Decision(True, gain, stderr, f"{known}: above 0 at {confidence:.0%} confidence")


def predicted_gain(law: Law, problem: Problem, spread: Bootstrap, *, keep: np.ndarray, u: np.ndarray) -> Gain:
    """The gain of moving from u = keep [K] to u [K] by the law, with its standard deviation under resampled
    losses. Its optimism is taken off: a law overrates the mixture that it was asked to choose itself.

    Raises ValueError where the bootstrap has no gains.
    """
    if not spread.gains.size:
        raise ValueError("the bootstrap has no gains: give it the mixture to keep")
    values = problem.value(law.predict(np.stack([keep, u]), averaging=False))
    return Gain(float(values[0] - values[1]) - spread.optimism, float(spread.gains.std(ddof=1)))
