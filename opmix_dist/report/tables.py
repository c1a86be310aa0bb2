"""Rows that compare runs, and their drawing in a terminal.

The rows are plain numbers, so that the terminal and the HTML page show the same ones. The first run is the
baseline of every comparison.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import EvalLine, Fit, PhaseCost, Proposal
from opmix_dist.exchange.units import Units
from opmix_dist.report import words

AVERAGES = "The average perplexity is the mean over domains of exp(loss), not exp of the average loss."


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; inf where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(loss)))


@dataclass(frozen=True)
class LossRow:
    """A domain, or the average over domains, of one run after another (R runs)."""

    label: str
    losses: tuple[float, ...]
    """[R] nats per token."""
    stderrs: tuple[float, ...]
    """[R] standard errors of the losses."""
    perplexities: tuple[float, ...]
    """[R]; of the average row the mean over domains of exp(loss)."""

    @property
    def differences(self) -> tuple[float, ...]:
        """[R] loss minus the first run's; negative is better."""
        return tuple(loss - self.losses[0] for loss in self.losses)

    @property
    def best(self) -> float:
        return min(self.losses)


def loss_rows(finals: Sequence[EvalLine]) -> list[LossRow]:
    """A row per domain in the first run's order, then the average over domains.

    Raises:
        UserError: the runs were evaluated on different domains.
    """
    domains = list(finals[0].loss)
    for final in finals:
        if set(final.loss) != set(domains) or not domains:
            raise UserError(
                f"runs over different domains cannot be compared: {', '.join(domains) or 'none'} against "
                f"{', '.join(final.loss) or 'none'}"
            )
    rows = [
        LossRow(
            domain,
            losses=tuple(final.loss[domain] for final in finals),
            stderrs=tuple(final.stderr.get(domain, math.nan) for final in finals),
            perplexities=tuple(perplexity(final.loss[domain]) for final in finals),
        )
        for domain in domains
    ]
    return [*rows, _average(rows)]


def _average(rows: Sequence[LossRow]) -> LossRow:
    """Mean over domains; its standard error takes the domains' errors as independent."""
    errors = np.array([row.stderrs for row in rows])
    return LossRow(
        "average",
        losses=tuple(np.mean([row.losses for row in rows], axis=0).tolist()),
        stderrs=tuple((np.sqrt((errors**2).sum(axis=0)) / len(rows)).tolist()),
        perplexities=tuple(np.mean([row.perplexities for row in rows], axis=0).tolist()),
    )


def total_cost(costs: Collection[PhaseCost]) -> PhaseCost:
    total = PhaseCost()
    for cost in costs:
        total.seconds += cost.seconds
        total.device_seconds += cost.device_seconds
        total.flops += cost.flops
        total.tokens += cost.tokens
    possible = [cost.possible_flops for cost in costs]
    known = [value for value in possible if value is not None]
    total.possible_flops = sum(known) if len(known) == len(possible) else None
    return total


def cost_rows(costs: Mapping[str, PhaseCost]) -> list[tuple[str, PhaseCost]]:
    """(phase, cost) in the order of the ledger, then their total.

    Seconds of phases that run side by side (a pool beside the trainers) add up to more than the wall time.
    """
    return [*costs.items(), ("total", total_cost(costs.values()))]


def cost_cells(cost: PhaseCost) -> tuple[str, ...]:
    """As COST_HEADER names them."""
    mfu = words.ABSENT if cost.mfu is None else words.share(cost.mfu)
    amounts = words.si(cost.flops), words.si(cost.tokens)
    return f"{cost.seconds:,.1f}", f"{cost.device_seconds:,.1f}", *amounts, mfu


COST_HEADER = ("seconds", "device-seconds", "FLOPs", "tokens", "MFU")


def mixture_rows(mixtures: Sequence[Mapping[str, float]]) -> list[tuple[str, tuple[float, ...]]]:
    """(domain, weight in each run); a domain that a run does not have weighs 0 there."""
    domains = dict.fromkeys(domain for mixture in mixtures for domain in mixture)
    return [(domain, tuple(mixture.get(domain, 0.0) for mixture in mixtures)) for domain in domains]


def proposal_tables(proposal: Proposal) -> list[Table]:
    """What a search found: shares with intervals, losses of staying and of moving, and the gain."""
    return [_shares_table(proposal), _landing_table(proposal), *_gain_tables(proposal)]


def _shares_table(proposal: Proposal) -> Table:
    columns = ["before", "proposed"]
    if proposal.confidence is not None:
        columns.append(f"{words.percent(proposal.confidence)} interval")
    table = _table("Mixture", ["domain"], columns)
    for name, weight in proposal.weights.items():
        interval = proposal.intervals.get(name)
        ends = [f"{words.share(interval.low)} to {words.share(interval.high)}"] if interval else []
        table.add_row(Text(name), words.share(proposal.current[name]), words.share(weight), *ends)
    return table


def _landing_table(proposal: Proposal) -> Table:
    """Losses, or error rates, at the horizon of the probes."""
    units = Units.of(proposal)
    by_column = {
        "snapshot": proposal.snapshot,
        "stay\npredicted": proposal.predicted_current,
        "stay\nsimulated": proposal.simulated_current,
        "move\npredicted": proposal.predicted,
        "move\nsimulated": proposal.simulated,
    }
    title = f"Held-out {units.described}, {words.si(proposal.horizon_tokens)} tokens ahead"
    table = _table(title, ["domain"], [*by_column, "move − stay"])
    for name in proposal.weights:
        change = proposal.simulated[name] - proposal.simulated_current[name]
        losses = (words.loss(losses[name]) for losses in by_column.values())
        table.add_row(Text(units.label(name)), *losses, words.signed(change))
    return table


def _gain_tables(proposal: Proposal) -> Iterator[Table]:
    if proposal.gain is None:
        return
    objective = Units.of(proposal).objective(proposal.objective_name)
    title = f"Gain of moving ({objective}; above 0 is better)"
    table = _table(title, ["known from"], ["gain"])
    for what, text in words.gain(proposal.gain, proposal.confidence).items():
        table.add_row(what, text)
    yield table


def law_table(fit: Fit, units: Units) -> Table:
    """How well the laws hold."""
    columns = ["R2", f"left-out error, {units.unit}", "calibration"]
    table = _table(f"Laws ({fit.family})", ["domain"], columns)
    for row in zip(fit.domains, fit.r2, fit.loo_error, fit.calibration, strict=True):
        name, *numbers = row
        table.add_row(Text(units.label(name)), *(words.loss(number) for number in numbers))
    return table


def _table(title: str, first: Sequence[str], numbers: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for header in first:
        table.add_column(Text(header))
    for header in numbers:
        table.add_column(Text(header), justify="right")
    return table
