"""How a plan writes numbers: decimal units, as vendors' data sheets do."""

from __future__ import annotations


def gigabytes(size: float) -> str:
    """10^9 bytes."""
    if abs(size) >= 1e12:
        return f"{size / 1e12:,.2f} TB"
    return f"{size / 1e9:,.2f} GB" if abs(size) >= 1e7 else f"{size / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.3g} s"


def hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.2g}"


def count(value: float) -> str:
    """Of parameters and tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f}"
