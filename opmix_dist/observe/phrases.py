"""Times and curves in a few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_HEIGHTS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Two units at most: ``0.4 s``, ``45 s``, ``3 min``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve of ``values`` in at most ``width`` characters, each the mean of some; the lowest and the
    highest of these are the ends of the scale. What is not finite is left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    groups = min(width, len(finite))
    ends = [len(finite) * i // groups for i in range(groups + 1)] if groups else []
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(ends)]
    if not means:
        return ""
    low, high = min(means), max(means)
    if not high > low:
        return _HEIGHTS[0] * len(means)
    return "".join(_HEIGHTS[round((value - low) / (high - low) * (len(_HEIGHTS) - 1))] for value in means)
