"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from opmix_dist.exchange.schemas import Gain

ABSENT = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def si(value: float) -> str:
    """Three digits and an SI prefix: 1234567 is "1.23 M"."""
    if not math.isfinite(value) or abs(value) < 1000:
        return f"{value:.3g}"
    # three digits first, so that 999,999 becomes 1 M and not 1e+03 k
    rounded = float(f"{value:.3g}")
    power = min(int(math.log10(abs(rounded)) // 3), len(_PREFIXES) - 1)
    return f"{rounded / 1000**power:.3g} {_PREFIXES[power]}"


def loss(value: float | None, stderr: float | None = None) -> str:
    """Four decimals, with the standard error where there is one; a dash for no value."""
    if value is None:
        return ABSENT
    return f"{value:.4f}" if stderr is None or math.isnan(stderr) else f"{value:.4f} ± {stderr:.4f}"


def signed(value: float | None) -> str:
    if value is None:
        return ABSENT
    # a difference of -1e-17 is none
    return f"{round(value, 4) + 0.0:+.4f}".replace("-", "−")


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def percent(value: float) -> str:
    """0.9 is "90%"."""
    return f"{100 * value:g}%"


def gain(found: Gain, confidence: float | None) -> dict[str, str]:
    """What is known of a gain, by where it comes from. Three digits: some objectives change by 1e-5."""
    lines = {"measured on the same samples": f"{_three_digits(found.measured)} ± {found.stderr:.2g}"}
    if found.predicted is not None:
        interval = ""
        if found.interval is not None and confidence is not None:
            ends = f"{_three_digits(found.interval.low)} to {_three_digits(found.interval.high)}"
            interval = f" ({percent(confidence)}: {ends})"
        lines["predicted by the laws"] = f"{_three_digits(found.predicted)}{interval}"
    if found.optimism is not None:
        lines["of the measured, for having chosen on the same samples"] = _three_digits(found.optimism)
    if found.averaging is not None:
        lines["no part of it: averaging probes, the mixture unchanged"] = _three_digits(found.averaging)
    return lines


def _three_digits(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def comparison(value: float, reference: float) -> str:
    """How ``value`` stands to ``reference``: "3.1% below" or "0.4% above"."""
    change = value / reference - 1
    return f"{abs(100 * change):.1f}% {'below' if change < 0 else 'above'}"


def apart(names: Iterable[str]) -> list[str]:
    """Names that come again get a number, so that all differ."""
    taken: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name} ({number})"
        taken.append(unique)
    return taken
