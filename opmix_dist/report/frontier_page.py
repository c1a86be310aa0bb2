"""The page of a Pareto front: one chart and its table, in a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from opmix_dist.report import charts, page, words
from opmix_dist.report.what_if import ASKED, CURRENT, EXTRAPOLATED, PROPOSAL, Answer, Searched, Trade
from opmix_dist.search.what_if import Band

BARS = 0.15
"""Room for bars beside the outermost points, as a share of what the points take."""
LINE, MARKED = "#3f86c9", "#dd7a37"
_SYMBOLS = {CURRENT: "circle", PROPOSAL: "diamond", ASKED: "star"}


def frontier_page(answer: Answer, trade: Trade) -> bytes:
    """The page in UTF-8.

    Args:
        answer: what is said of the current mixture, the proposal and the mixture that was asked about, which
            are shown beside the front.
    """
    searched, figures = answer.searched, page.Figures()
    text = (
        "Each point of the line is a mixture for which the law predicts that no other, within the search's "
        "floors, caps and loss bounds, is lower in both. Bars: "
        f"{words.percent(searched.confidence)} intervals from resampled laws, of each alone. "
        "Dots: candidates as they were measured. Hover for the mixture. "
        f"Open circles: {EXTRAPOLATED}."
    )
    shown = page.section(
        "Pareto front",
        page.caption(text),
        *(page.problem(warning) for warning in answer.warnings()),
        figures.place(frontier_chart(answer, trade)),
        _table(searched, trade),
    )
    title = f"{trade.labels[0]} against {trade.labels[1]}"
    return page.render(title, f"What {searched.title} predicts, {searched.units.unit}.", [shown], figures)


def _table(searched: Searched, trade: Trade) -> page.Html:
    band = _band(searched, trade, trade.front.u)
    rows = [
        [
            str(p + 1),
            *(words.loss(value) for value in band.value[p]),
            *map(words.share, trade.front.mixtures[p]),
        ]
        for p in range(len(trade.front.u))
    ]
    return page.table(["point", *trade.titles(searched), *searched.domains], rows)


def frontier_chart(answer: Answer, trade: Trade) -> go.Figure:
    """The front with its intervals, the mixtures of ``answer`` likewise, and the candidates as measured."""
    searched = answer.searched
    horizontal, vertical = trade.titles(searched)
    figure = go.Figure(
        layout={
            "height": 520,
            "template": None,
            "xaxis": {"title": {"text": charts.plain(horizontal)}},
            "yaxis": {"title": {"text": charts.plain(vertical)}},
        }
    )
    _add_candidates(figure, searched, trade)
    _add_mixtures(
        figure,
        "front",
        _band(searched, trade, trade.front.u),
        [_shares(searched.domains, x) for x in trade.front.mixtures],
        {
            "symbol": ["circle" if covered else "circle-open" for covered in trade.covered(searched)],
            "size": 7,
            "color": LINE,
        },
        mode="lines+markers",
    )
    for p, name in enumerate(answer.names):
        _add_mixtures(
            figure,
            name,
            _band(searched, trade, answer.U[name][None]),
            [_shares(searched.domains, answer.mixtures[p])],
            {"symbol": _SYMBOLS[name], "size": 13, "color": MARKED},
        )
    return figure.update_layout(
        xaxis_range=_range([x for trace in figure.data for x in trace.x]),
        yaxis_range=_range([y for trace in figure.data for y in trace.y]),
    )


def _range(values: Sequence[float]) -> list[float]:
    """Of an axis: all values, but not all of their bars, which may be long where the law extrapolates."""
    margin = BARS * (max(values) - min(values))
    return [min(values) - margin, max(values) + margin]


def _band(searched: Searched, trade: Trade, U: np.ndarray) -> Band:
    """The two sums of losses at U [P, K], each [P, 2]."""
    return searched.forecast(U).joined(trade.of).levels(searched.confidence)


def _shares(domains: Sequence[str], mixture: np.ndarray) -> str:
    return "<br>".join(
        f"{charts.plain(name)} {words.share(x)}" for name, x in zip(domains, mixture, strict=True)
    )


def _add_candidates(figure: go.Figure, searched: Searched, trade: Trade) -> None:
    observations = searched.fit.observations
    measured = trade.of(observations.losses)
    mixtures = observations.candidates @ searched.problem.expanded
    figure.add_scatter(
        x=measured[:, 0].tolist(),
        y=measured[:, 1].tolist(),
        customdata=[_shares(searched.domains, x) for x in mixtures],
        name="candidates, measured",
        mode="markers",
        marker={"size": 6, "color": charts.GREY, "opacity": 0.7},
        hovertemplate="%{x:.4f}, %{y:.4f}<br>%{customdata}<extra>candidate</extra>",
    )


def _add_mixtures(
    figure: go.Figure,
    name: str,
    band: Band,
    shares: Sequence[str],
    marker: dict[str, object],
    *,
    mode: str = "markers",
) -> None:
    """Points with the intervals of both losses."""
    bars = [
        {
            "array": (band.high - band.value)[:, i].tolist(),
            "arrayminus": (band.value - band.low)[:, i].tolist(),
            "thickness": 0.8,
            "width": 0,
            "color": marker["color"],
        }
        for i in range(2)
    ]
    figure.add_scatter(
        x=band.value[:, 0].tolist(),
        y=band.value[:, 1].tolist(),
        error_x=bars[0],
        error_y=bars[1],
        customdata=list(shares),
        name=charts.plain(name),
        mode=mode,
        line={"width": 1.6, "color": marker["color"]},
        marker=marker,
        hovertemplate="%{x:.4f}, %{y:.4f}<br>%{customdata}<extra>%{fullData.name}</extra>",
    )
