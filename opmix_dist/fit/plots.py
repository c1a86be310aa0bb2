"""The page of a fit: one self-contained HTML file with the mixture, predictions and coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from opmix_dist.fit.analysis import Analysis, Outcome
from opmix_dist.report import page, words
from opmix_dist.report.charts import GREY, domain_colours, plain
from opmix_dist.report.page import Html
from opmix_dist.search.laws import LogLinearLaw

MOST_METRICS = 60
"""Charts of measured and predicted losses; more of them make a page slow."""


def fit_page(analysis: Analysis) -> bytes:
    """The page in UTF-8; it opens from disk and loads nothing."""
    figures, inputs = page.Figures(), analysis.inputs
    colours = domain_colours(inputs.domains)
    parts = [_warnings(analysis)] if analysis.warnings else []
    if analysis.outcome:
        parts.append(_mixture(analysis, analysis.outcome, colours, figures))
    parts += [_predictions(analysis, figures), *_coefficients(analysis, figures)]
    lead = f"{len(inputs.fitted.runs)} runs, {len(inputs.domains)} domains, {len(inputs.metrics)} metrics."
    return page.render(f"Laws: {analysis.fit.family}", lead, parts, figures)


def _warnings(analysis: Analysis) -> Html:
    return page.section("Warnings", *map(page.problem, analysis.warnings))


def _mixture(analysis: Analysis, outcome: Outcome, colours: dict[str, str], figures: page.Figures) -> Html:
    parts = [figures.place(weights_chart(analysis, outcome, colours))]
    if outcome.bootstrap:
        confidence = words.share(analysis.config.bootstrap.confidence)
        parts.append(page.caption(f"Bars: {confidence} intervals, from laws of resampled losses."))
    if outcome.decision:
        parts.append(page.caption(outcome.decision.reason))
    return page.section("Mixture", *parts)


def weights_chart(analysis: Analysis, outcome: Outcome, colours: dict[str, str]) -> go.Figure:
    """Share of each domain: prior, the mixture in use where there is one, and proposed with its interval."""
    domains = analysis.inputs.domains
    labels = [plain(name) for name in domains]
    series = [("prior", outcome.problem.prior, 0.3)]
    if analysis.inputs.current is not None:
        series.append(("current", analysis.inputs.current, 0.55))
    series.append(("proposed", outcome.proposal.mixture, 1.0))
    figure = _figure(
        90 + (14 + 12 * len(series)) * len(domains),
        xaxis={"title": {"text": "share of the mixture"}, "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "type": "category", "ticklabelstandoff": 4},
        barmode="group",
        bargap=0.3,
    )
    for name, weights, opacity in series:
        error = _errors(analysis, outcome) if name == "proposed" else None
        figure.add_bar(
            y=labels,
            x=weights.tolist(),
            name=name,
            orientation="h",
            error_x=error,
            marker={"color": [colours[domain] for domain in domains], "opacity": opacity},
            hovertemplate="%{y}: %{x:.2%}<extra>%{fullData.name}</extra>",
        )
    return figure


def _errors(analysis: Analysis, outcome: Outcome) -> dict[str, object] | None:
    if outcome.bootstrap is None:
        return None
    low, high = outcome.bootstrap.interval(analysis.config.bootstrap.confidence)
    mixture = outcome.proposal.mixture
    return {
        "type": "data",
        "symmetric": False,
        "array": np.maximum(high - mixture, 0).tolist(),
        "arrayminus": np.maximum(mixture - low, 0).tolist(),
        "color": GREY,
        "thickness": 1,
    }


def _predictions(analysis: Analysis, figures: page.Figures) -> Html:
    metrics = analysis.inputs.metrics
    shown = [prediction_chart(analysis, i) for i in range(min(len(metrics), MOST_METRICS))]
    note = "Each run predicted by a law of the others (dots), and runs that were in no fit (crosses)."
    if len(metrics) > MOST_METRICS:
        note += f" The first {MOST_METRICS} of {len(metrics)} metrics; predictions.csv has them all."
    return page.section("Predicted and measured", figures.grid(shown), page.caption(note))


def prediction_chart(analysis: Analysis, column: int) -> go.Figure:
    """Left-out prediction over measurement of one metric, and the diagonal."""
    fit, inputs = analysis.fit, analysis.inputs
    figure = _figure(
        280,
        title={"text": plain(inputs.metrics[column])},
        margin={"t": 40},
        xaxis={"title": {"text": "measured"}},
        yaxis={"title": {"text": "predicted"}},
        showlegend=False,
    )
    measured, predicted = fit.measured[:, column], fit.left_out[:, column]
    _dots(figure, inputs.fitted.runs, measured, predicted, "circle")
    ends = [*measured, *predicted[np.isfinite(predicted)]]
    if inputs.held_out and analysis.held_out_losses is not None:
        losses = inputs.held_out.losses[:, column], analysis.held_out_losses[:, column]
        _dots(figure, inputs.held_out.runs, *losses, "x")
        ends += [*losses[0], *losses[1]]
    low, high = float(min(ends)), float(max(ends))
    line = {"color": GREY, "dash": "dot", "width": 1}
    return figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)


def _dots(
    figure: go.Figure, runs: Sequence[str], measured: np.ndarray, predicted: np.ndarray, symbol: str
) -> None:
    figure.add_scatter(
        x=measured.tolist(),
        y=predicted.tolist(),
        customdata=[plain(run) for run in runs],
        mode="markers",
        marker={"symbol": symbol, "size": 6, "color": "#3f86c9", "line": {"width": 0.5, "color": GREY}},
        hovertemplate="%{customdata}: measured %{x:.4f}, predicted %{y:.4f}<extra></extra>",
    )


def _coefficients(analysis: Analysis, figures: page.Figures) -> list[Html]:
    law = analysis.fit.law
    if not isinstance(law, LogLinearLaw):
        return []
    note = "t of L(x) = exp(log c) + exp(t . x), less its mean over domains: below 0, the domain helps."
    chart = coefficient_chart(law, analysis.inputs.domains, analysis.inputs.metrics)
    return [page.section("Coefficients", figures.place(chart), page.caption(note))]


def coefficient_chart(law: LogLinearLaw, domains: Sequence[str], metrics: Sequence[str]) -> go.Figure:
    """Heat map of t [D, K] less the mean of each row: only differences between domains tell them apart."""
    values = law.t - law.t.mean(axis=1, keepdims=True)
    reach = float(np.abs(values).max()) or 1.0
    figure = _figure(
        140 + 22 * len(metrics),
        xaxis={"type": "category", "side": "bottom"},
        yaxis={"type": "category", "autorange": "reversed"},
        margin={"b": 110},
    )
    return figure.add_heatmap(
        x=[plain(name) for name in domains],
        y=[plain(name) for name in metrics],
        z=values.tolist(),
        zmin=-reach,
        zmax=reach,
        colorscale="RdBu_r",
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
    )


def _figure(height: int, **layout: object) -> go.Figure:
    return go.Figure(layout={"height": height, "template": None, **layout})
