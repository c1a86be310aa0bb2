"""Learning-rate schedules."""

from __future__ import annotations

import math

from opmix_dist.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of ``step`` (from 0) in a run of ``steps``.

    Linear warm-up goes from ``warmup_from * peak`` to the peak, which step ``warmup_steps`` has. Then
    ``constant`` stays; ``cosine`` falls along half a period to ``min_lr_ratio * peak``; ``wsd`` (warm-up,
    stable, decay: MiniCPM, arXiv 2404.06395) stays until the last ``decay_fraction`` of the steps and falls
    linearly to ``min_lr_ratio * peak``.
    """
    if step < config.warmup_steps:
        missing = config.warmup_from * peak * (config.warmup_steps - step)
        return (peak * (step + 1) + missing) / (config.warmup_steps + 1)
    floor = config.min_lr_ratio
    return peak * (floor + (1 - floor) * _shape(config, step, steps))


def _shape(config: ScheduleConfig, step: int, steps: int) -> float:
    """From 1 at the peak to 0 at the floor."""
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = round(config.decay_fraction * steps)
    return min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
