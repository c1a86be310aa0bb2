"""What was computed in all, over stages, trainers and pools, and how that stands to somebody else's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from opmix_dist.exchange.schemas import PhaseCost
from opmix_dist.report import words
from opmix_dist.report.tables import total_cost

UNITS = {"flops": "FLOPs", "device_seconds": "device-seconds"}
"""Fields of a cost that are compared, and what they are called."""


def add_up(ledgers: Iterable[Mapping[str, PhaseCost]]) -> dict[str, PhaseCost]:
    """Costs by phase over several ledgers: of the stages of a lifecycle, say."""
    found: dict[str, list[PhaseCost]] = {}
    for ledger in ledgers:
        for phase, cost in ledger.items():
            found.setdefault(phase, []).append(cost)
    return {phase: total_cost(costs) for phase, costs in found.items()}


def amounts(costs: Mapping[str, PhaseCost], unit: str) -> dict[str, float]:
    """By phase, what is not 0; ``unit``: a key of UNITS."""
    found = {phase: float(getattr(cost, unit)) for phase, cost in costs.items()}
    return {phase: amount for phase, amount in found.items() if amount}


def mean_amounts(ledgers: Sequence[Mapping[str, PhaseCost]], unit: str) -> dict[str, float]:
    """By phase, over several courses; one that lacks a phase has spent nothing on it."""
    return {phase: amount / len(ledgers) for phase, amount in amounts(add_up(ledgers), unit).items()}


def less_compute(
    name: str, parts: Mapping[str, float], baseline: str, baseline_parts: Mapping[str, float], unit: str
) -> str:
    """``opmix: 34.0% less compute than retrain, in FLOPs: 6.6 T (train 6 T + probes 600 G) against 10 T
    (train 10 T)``.

    Args:
        parts, baseline_parts: amounts by phase; each is named.
        unit: a key of UNITS, that they are in.
    """
    mine, its = sum(parts.values()), sum(baseline_parts.values())
    if not its:
        return f"{name}: {baseline} has no {UNITS[unit]} to compare with"
    how = f"{words.share(abs(mine / its - 1))} {'less' if mine < its else 'more'} compute than {baseline}"
    if mine == its:
        how = f"as much compute as {baseline}"
    return f"{name}: {how}, in {UNITS[unit]}: {_sum(parts)} against {_sum(baseline_parts)}"


def _sum(parts: Mapping[str, float]) -> str:
    """``6.6 T (train 6 T + probes 600 G)``, the largest first."""
    by_size = sorted(parts.items(), key=lambda item: -item[1])
    named = " + ".join(f"{phase} {words.si(amount)}" for phase, amount in by_size)
    return f"{words.si(sum(parts.values()))} ({named or 'nothing'})"
