"""What a finished search says of mixtures: tables for a terminal, the same as plain values for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from opmix_dist.exchange.units import LOSSES, Units
from opmix_dist.report import words
from opmix_dist.search.frontier import Frontier
from opmix_dist.search.laws import Law, LawFit
from opmix_dist.search.problem import Problem
from opmix_dist.search.what_if import Band, Forecast, Reach

CURRENT, PROPOSAL, ASKED = "current", "proposal", "what if"
EXTRAPOLATED = (
    "outside of what the candidates span: the law extrapolates, and its interval does not cover that"
)


@dataclass(frozen=True)
class Searched:
    """A finished search, or a fit of tables, with its laws as it fitted them.

    title: what it is called; resampled: the laws of its bootstrap; current, proposal: u [K], the former where
    it is known; confidence: of the intervals; notes: what to mind of it, besides its law's own warnings;
    units: of its losses.
    """

    title: str
    fit: LawFit
    problem: Problem
    resampled: Sequence[Law]
    current: np.ndarray | None
    proposal: np.ndarray
    confidence: float
    notes: tuple[str, ...] = ()
    units: Units = LOSSES

    @cached_property
    def reach(self) -> Reach:
        return Reach.of(self.fit.observations.candidates)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the D losses."""
        return tuple(self.fit.observations.names)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the X domains."""
        return tuple(self.problem.domains)

    def forecast(self, U: np.ndarray) -> Forecast:
        """Of the losses at coefficients U [P, K]."""
        return Forecast.of(self.fit.law, self.resampled, U)


class Answer:
    """The mixtures that are compared, by name, and all that is said of them.

    asked: u [K] of the mixture that was asked about, or None.
    """

    def __init__(self, searched: Searched, asked: np.ndarray | None) -> None:
        self.searched = searched
        given = {CURRENT: searched.current, PROPOSAL: searched.proposal, ASKED: asked}
        self.U = {name: u for name, u in given.items() if u is not None}
        self.names = list(self.U)
        rows = np.stack(list(self.U.values()))
        self.mixtures = rows @ searched.problem.expanded  # [P, X]
        self.rows = [*map(searched.units.label, searched.losses), f"objective ({searched.problem.objective})"]
        self.forecast = searched.forecast(rows).joined(self._with_objective)
        self.distances = [searched.reach.distance(u) for u in rows]

    def _with_objective(self, losses: np.ndarray) -> np.ndarray:
        return np.concatenate([losses, self.searched.problem.value(losses)[..., None]], axis=-1)

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """(mixture, what it is compared with), the newer first."""
        return [(name, other) for i, name in enumerate(self.names) for other in self.names[:i]]

    def levels(self) -> Band:
        return self.forecast.levels(self.searched.confidence)

    def changes(self, name: str, other: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, low and high [D + 1] of the losses and the objective of ``name`` minus ``other``."""
        band = self.forecast.changes(self.names.index(other), self.searched.confidence)
        row = self.names.index(name)
        return band.value[row], band.low[row], band.high[row]

    def warnings(self) -> list[str]:
        """What to mind of the answer, a sentence each."""
        reach = self.searched.reach
        found = [
            f"{name}: {words.share(distance)} of its coefficients lie outside of what the candidates span; "
            f"nine of ten candidates lie within {words.share(reach.ordinary)} of the others. The law "
            "extrapolates, and its interval does not cover that"
            for name, distance in zip(self.names, self.distances, strict=True)
            if not reach.covers(self.U[name])
        ]
        if ASKED in self.U:
            losses = self.forecast.losses[self.names.index(ASKED), :-1]
            broken = self.searched.problem.violations(losses, self.U[ASKED])
            found += [f"{ASKED}: {text}, so that the search would not propose it" for text in broken]
        return [*found, *self.searched.notes, *self.searched.fit.warnings]


def answer_tables(answer: Answer) -> list[Table]:
    """Shares, predicted losses, and their differences with paired intervals."""
    interval = f"{words.percent(answer.searched.confidence)} intervals"
    shares = _table("Mixture", "domain", answer.names)
    for j, domain in enumerate(answer.searched.domains):
        shares.add_row(Text(domain), *(words.share(x) for x in answer.mixtures[:, j]))
    band = answer.levels()
    units = answer.searched.units
    levels = _table(f"Predicted {units.quantity} ({units.unit}, {interval})", units.quantity, answer.names)
    for i, name in enumerate(answer.rows):
        cells = (_level(band.value[p, i], band.low[p, i], band.high[p, i]) for p in range(len(answer.names)))
        _add_row(levels, name, cells, last=i == len(answer.rows) - 1)
    if not answer.comparisons:
        return [shares, levels]
    pairs = [answer.changes(*pair) for pair in answer.comparisons]
    titles = [f"{name} − {other}" for name, other in answer.comparisons]
    changes = _table(f"Difference ({units.unit}, paired {interval})", units.quantity, titles)
    for i, name in enumerate(answer.rows):
        _add_row(
            changes,
            name,
            (_change(*(part[i] for part in pair)) for pair in pairs),
            last=i == len(answer.rows) - 1,
        )
    return [shares, levels, changes]


def _table(title: str, first: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(Text(name), justify="right")
    return table


def _add_row(table: Table, name: str, cells: Any, *, last: bool) -> None:
    if last:  # the objective stands below the losses that it is made of
        table.add_section()
    table.add_row(Text(name), *cells)


def _level(value: float, low: float, high: float) -> str:
    return f"{words.loss(value)} [{low:.4f}, {high:.4f}]"


def _change(value: float, low: float, high: float) -> Text:
    """Green where the whole interval is below 0, red where it is above."""
    style = "green" if high < 0 else "red" if low > 0 else ""
    return Text(f"{words.signed(value)} [{words.signed(low)}, {words.signed(high)}]", style)


def answer_values(answer: Answer) -> dict[str, Any]:
    """The whole answer as JSON holds it."""
    searched, band = answer.searched, answer.levels()
    mixtures = {
        _key(name): {
            "weights": _named(searched.domains, answer.mixtures[p]),
            "coefficients": _named(searched.fit.observations.components, answer.U[name]),
            **_with_objective(searched, band.value[p], band.low[p], band.high[p]),
            "outside_of_candidates": answer.distances[p],
            "extrapolated": not searched.reach.covers(answer.U[name]),
        }
        for p, name in enumerate(answer.names)
    }
    return {
        "search": searched.title,
        "family": searched.fit.family,
        "objective": searched.problem.objective,
        "error_rates": [name for name in searched.losses if name in searched.units.error_rates],
        "confidence": searched.confidence,
        "mixtures": mixtures,
        "differences": [
            {"of": _key(name), "minus": _key(other)} | _with_objective(searched, *answer.changes(name, other))
            for name, other in answer.comparisons
        ],
        "warnings": answer.warnings(),
    }


def _key(name: str) -> str:
    return name.replace(" ", "_")


def _with_objective(
    searched: Searched, value: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Of D losses and the objective behind them, each [D + 1]."""
    return {
        "predicted": _intervals(searched.losses, value[:-1], low[:-1], high[:-1]),
        "objective": _interval(value[-1], low[-1], high[-1]),
    }


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))


def _intervals(
    names: Sequence[str], value: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, dict[str, float]]:
    return {name: _interval(value[i], low[i], high[i]) for i, name in enumerate(names)}


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Trade:
    """A Pareto front between two sums of losses: labels, weights [2, D], and the front itself."""

    labels: tuple[str, str]
    weights: np.ndarray
    front: Frontier

    def of(self, losses: np.ndarray) -> np.ndarray:
        """The two sums [..., 2] of losses [..., D]."""
        return losses @ self.weights.T

    def titles(self, searched: Searched) -> list[str]:
        """The labels, with their units where losses differ in those."""
        names = np.array(searched.losses)
        both = zip(self.labels, self.weights, strict=True)
        return [searched.units.label_of(label, names[weights > 0]) for label, weights in both]

    def covered(self, searched: Searched) -> list[bool]:
        """Of each point of the front, whether the candidates vouch for it."""
        return [searched.reach.covers(u) for u in self.front.u]


def trade_table(searched: Searched, trade: Trade, *, points: int = 7) -> Table:
    """Some points of the front, ends included."""
    band = searched.forecast(trade.front.u).joined(trade.of).levels(searched.confidence)
    title = f"Pareto front ({searched.units.unit}, {words.percent(searched.confidence)} intervals)"
    table = _table(title, "point", [*trade.titles(searched), *searched.domains])
    count, covered = len(trade.front.u), trade.covered(searched)
    for p in np.unique(np.linspace(0, count - 1, min(points, count)).round().astype(int)):
        losses = [_level(band.value[p, i], band.low[p, i], band.high[p, i]) for i in range(2)]
        name = f"{p + 1}" if covered[p] else f"{p + 1} *"
        table.add_row(name, *losses, *map(words.share, trade.front.mixtures[p]))
    if not all(covered):
        table.caption, table.caption_justify = f"* {EXTRAPOLATED}", "left"
    return table


def trade_values(searched: Searched, trade: Trade) -> dict[str, Any]:
    """All points of the front as JSON holds them."""
    band = searched.forecast(trade.front.u).joined(trade.of).levels(searched.confidence)
    covered = trade.covered(searched)
    return {
        "between": [
            {"label": label, "weights": _named(searched.losses, weights)}
            for label, weights in zip(trade.labels, trade.weights, strict=True)
        ],
        "points": [
            {
                "weights": _named(searched.domains, trade.front.mixtures[p]),
                "coefficients": _named(searched.fit.observations.components, trade.front.u[p]),
                "predicted": _intervals(trade.labels, band.value[p], band.low[p], band.high[p]),
                "extrapolated": not covered[p],
            }
            for p in range(len(trade.front.u))
        ],
    }
