"""The charts of the report: a function each, from plain records to a plotly figure.

A domain keeps one colour in all charts; what belongs to no domain is grey or slate. Colours of text, axes
and grid are left to the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, PhaseCost, Proposal
from opmix_dist.exchange.units import Units
from opmix_dist.report import tables, words
from opmix_dist.report.reading import Candidates, CurvePoint, RunView

GREY = "#8b929c"
# Middle lightness, so that each is readable on a white and on a nearly black page.
_COLOURS = ("#3f86c9", "#dd7a37", "#3c9d6e", "#c2599a", "#c29a22", "#7f6bc9",
            "#2b9fb0", "#cf5353", "#7f993b", "#a27659")  # fmt: skip
_SLATES = ("#4d6a8f", "#8fa3bd", "#6f8f95", "#b3bac4", "#5f6b7a", "#94a89a", "#7d7f99", "#a9a08f")
MOST_POINTS = 400


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """A colour per domain; after the first ten, hues that the golden angle keeps apart."""
    return {
        name: _COLOURS[i] if i < len(_COLOURS) else f"hsl({137.5 * i % 360:.0f}, 45%, 52%)"
        for i, name in enumerate(domains)
    }


def plain(text: str) -> str:
    """``text`` for plotly, which reads some HTML tags in labels; wrapped for a hover box."""
    lines = textwrap.wrap(text, 70) or [""]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def binned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: the mean of y over consecutive points, at the last x of each group."""
    groups = np.array_split(np.arange(len(x)), min(len(x), MOST_POINTS) or 1)
    groups = [g for g in groups if len(g)]
    return [float(x[g[-1]]) for g in groups], [float(np.mean([y[i] for i in g])) for g in groups]


def blank(height: int, title: str = "", **layout: object) -> go.Figure:
    """A figure of so many pixels without traces, whose look is left to the page."""
    heading = {"title": {"text": plain(title)}, "margin": {"t": 36}} if title else {}
    return go.Figure(layout={"height": height, "template": None, **heading, **layout})


def mixture_over_time(
    mixtures: Sequence[MixtureRecord], last_step: int, colours: Mapping[str, str]
) -> go.Figure:
    """Stacked shares by step; a line at each decision, with its reason in the hover box."""
    figure = blank(340, yaxis={"tickformat": ".0%", "range": [0, 1.06]}, xaxis={"title": {"text": "step"}})
    steps = [*(m.step for m in mixtures), max(last_step, mixtures[-1].step)]
    for name, colour in colours.items():
        shares = [m.weights.get(name, 0.0) for m in [*mixtures, mixtures[-1]]]
        figure.add_scatter(
            x=steps,
            y=shares,
            name=plain(name),
            stackgroup="mixture",
            mode="lines",
            line={"width": 0.5, "shape": "hv", "color": colour},
            fillcolor=colour,
            hovertemplate="%{y:.1%}",
        )
    _mark_decisions(figure, [m for m in mixtures if m.step > 0])
    return figure.update_layout(hovermode="x unified")


def _mark_decisions(figure: go.Figure, decisions: Sequence[MixtureRecord]) -> None:
    for decision in decisions:
        figure.add_vline(decision.step, line={"color": GREY, "width": 1, "dash": "dot"})
    figure.add_scatter(
        x=[m.step for m in decisions],
        y=[1.03] * len(decisions),
        mode="markers",
        name="decision",
        showlegend=False,
        marker={"symbol": ["triangle-down" if m.changed else "x-thin-open" for m in decisions],
                "size": 11, "color": GREY},
        text=[_decision_text(m) for m in decisions],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _decision_text(m: MixtureRecord) -> str:
    text = f"<b>step {m.step}: {'new mixture' if m.changed else 'mixture kept'}</b><br>{plain(m.why)}"
    if m.requested_step is not None:
        text += f"<br>asked at step {m.requested_step}"
    return text


def heldout_loss(
    domain: str, evals: Sequence[EvalLine], baseline: Sequence[EvalLine], colour: str
) -> go.Figure:
    """One domain's held-out loss over training tokens; the baseline dashed."""
    figure = blank(230, domain, xaxis={"title": {"text": "tokens"}}, showlegend=False)
    for lines, name, style in (
        (baseline, "baseline", {"dash": "dash", "color": GREY}),
        (evals, "this run", {"color": colour}),
    ):
        lines = [line for line in lines if domain in line.loss]
        figure.add_scatter(
            x=[line.tokens for line in lines],
            y=[line.loss[domain] for line in lines],
            customdata=[line.stderr.get(domain) for line in lines],
            name=name,
            mode="lines+markers",
            line={"width": 2} | style,
            marker={"size": 5},
            hovertemplate="%{y:.4f} ± %{customdata:.4f}",
        )
    return figure.update_layout(hovermode="x unified")


def final_comparison(rows: Sequence[tables.LossRow], colours: Mapping[str, str]) -> go.Figure:
    """Bars of the last run's loss minus the first's by domain; of the loss itself where there is one run."""
    compared = len(rows[0].losses) > 1
    values = [row.differences[-1] if compared else row.losses[-1] for row in rows]
    title = "loss minus the baseline's (left is better)" if compared else "loss"
    figure = _by_domain([row.label for row in rows], title)
    figure.add_bar(
        y=[plain(row.label) for row in rows],
        x=values,
        orientation="h",
        marker={"color": [colours.get(row.label, GREY) for row in rows]},
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )
    return figure


def _by_domain(domains: Sequence[str], x_title: str, title: str = "") -> go.Figure:
    """A figure with a row per domain, the first on top."""
    return blank(
        (90 if title else 70) + 34 * len(domains),
        title,
        xaxis={"title": {"text": x_title}},
        yaxis={"autorange": "reversed", "type": "category"},
        showlegend=False,
    )


def law_against_measured(domain: str, candidates: Candidates, colour: str, *, title: str) -> go.Figure:
    """Loss by the law against the measured one of each candidate (dots) and of the proposal (star, not in the
    fit); rings are what laws fitted to other candidates say."""
    figure = blank(
        270,
        title,
        xaxis={"title": {"text": "measured"}},
        yaxis={"title": {"text": "law"}},
        showlegend=False,
    )
    ends: list[float] = []
    for kind, values, name, symbol, size in (
        ("candidate", candidates.predicted, "candidate", "circle", 7),
        ("proposal", candidates.predicted, "proposal", "star", 13),
        ("candidate", candidates.left_out, "candidate left out", "circle-open", 7),
    ):
        rows = candidates.rows(domain, kind) & np.isfinite(values)
        measured, by_law = candidates.loss[rows], values[rows]
        ends += [*measured, *by_law]
        figure.add_scatter(
            x=measured.tolist(),
            y=by_law.tolist(),
            error_x={"array": candidates.stderr[rows].tolist(), "thickness": 0.6, "width": 0, "color": GREY},
            customdata=[_coefficients(candidates.components, u) for u in candidates.U[rows]],
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": colour, "line": {"width": 0.5, "color": GREY}},
            hovertemplate=f"{name}: measured %{{x:.4f}}, law %{{y:.4f}}<br>%{{customdata}}<extra></extra>",
        )
    if ends:
        figure.add_shape(type="line", x0=min(ends), y0=min(ends), x1=max(ends), y1=max(ends),
                         line={"color": GREY, "dash": "dot", "width": 1})  # fmt: skip
    return figure


def _coefficients(components: Sequence[str], u: np.ndarray) -> str:
    return "<br>".join(f"{plain(name)} {value:.2f}" for name, value in zip(components, u, strict=True))


def probe_curves(curves: Mapping[str, Sequence[CurvePoint]], colours: Mapping[str, str]) -> go.Figure:
    """Training loss of each probe on its own component."""
    figure = blank(330, xaxis={"title": {"text": "probe step"}}, yaxis={"title": {"text": "loss"}})
    for name, points in curves.items():
        x, y = binned([p.step for p in points], [p.loss for p in points])
        line = {"width": 1.6, "color": colours.get(name, GREY)}
        figure.add_scatter(x=x, y=y, name=plain(name), mode="lines", line=line, hovertemplate="%{y:.4f}")
    return figure.update_layout(hovermode="x unified")


def proposed_mixture(proposal: Proposal, colours: Mapping[str, str]) -> go.Figure:
    """Bars of each domain's share: before (pale) and proposed, with the interval of the latter."""
    rows = tables.mixture_rows([proposal.current, proposal.weights])
    figure = _by_domain([name for name, _ in rows], "share of the mixture")
    for i, (name, opacity) in enumerate((("before", 0.35), ("proposed", 1.0))):
        figure.add_bar(
            y=[plain(domain) for domain, _ in rows],
            x=[weights[i] for _, weights in rows],
            error_x=_whiskers(proposal) if name == "proposed" else None,
            name=name,
            orientation="h",
            marker={"color": [colours.get(domain, GREY) for domain, _ in rows], "opacity": opacity},
            text=[words.share(weights[i]) for _, weights in rows],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2%}<extra>%{fullData.name}</extra>",
        )
    figure.update_yaxes(ticklabelstandoff=4)
    return figure.update_layout(
        barmode="group", bargap=0.3, height=70 + 46 * len(rows), xaxis_tickformat=".0%"
    )


def _whiskers(proposal: Proposal) -> dict[str, object] | None:
    """To the ends of each proposed weight's interval, in the order of the weights."""
    if not proposal.intervals:
        return None
    ends = [(proposal.intervals[name], weight) for name, weight in proposal.weights.items()]
    return {
        "array": [max(0.0, interval.high - weight) for interval, weight in ends],
        "arrayminus": [max(0.0, weight - interval.low) for interval, weight in ends],
        "symmetric": False,
        "thickness": 1.2,
        "width": 4,
        "color": GREY,
    }


LANDINGS = {
    "staying, predicted": "circle-open",
    "staying, simulated": "circle",
    "moving, predicted": "diamond-open",
    "moving, simulated": "diamond",
    "realised": "star",
}
"""Marker of each loss that belongs to a proposal, in the order in which they are learnt."""


def landing_losses(proposal: Proposal, realised: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    """The losses by domain that belong to a proposal, keyed as LANDINGS."""
    staying = (proposal.predicted_current, proposal.simulated_current)
    moving = (proposal.predicted, proposal.simulated)
    return dict(zip(LANDINGS, (*staying, *moving, realised), strict=True))


def landing(
    title: str,
    losses: Mapping[str, Mapping[str, float]],
    snapshot: Mapping[str, float],
    units: Units,
    colours: Mapping[str, str],
) -> go.Figure:
    """Change of each domain's loss from the snapshot's, for the given keys of LANDINGS."""
    figure = _by_domain(list(snapshot), f"{units.quantity} minus the snapshot's", title)
    for name, values in losses.items():
        shown = [domain for domain in snapshot if domain in values]
        figure.add_scatter(
            y=[plain(units.label(domain)) for domain in shown],
            x=[values[domain] - snapshot[domain] for domain in shown],
            name=name,
            mode="markers",
            marker={"symbol": LANDINGS[name], "size": 11, "color": [colours.get(d, GREY) for d in shown]},
            hovertemplate="%{y}: %{x:+.4f}<extra>%{fullData.name}</extra>",
        )
    return figure


def compute_shares(ledgers: Mapping[str, Mapping[str, PhaseCost]]) -> go.Figure:
    """Each phase's share of the FLOPs and of the device-seconds of its run, from run name to phases."""
    bars = [(run, unit, name) for run in ledgers for unit, name in _UNITS.items()]
    figure = blank(110 + 40 * len(bars), barmode="stack", xaxis={"tickformat": ".0%"},
                     yaxis={"autorange": "reversed", "type": "category"})  # fmt: skip
    phases = list(dict.fromkeys(phase for costs in ledgers.values() for phase in costs))
    for i, phase in enumerate(phases):
        amounts = [getattr(ledgers[run].get(phase, PhaseCost()), unit) for run, unit, _ in bars]
        totals = [getattr(tables.total_cost(ledgers[run].values()), unit) for run, unit, _ in bars]
        figure.add_bar(
            y=[f"{plain(run)} · {name}" for run, _, name in bars],
            x=[amount / total if total else 0.0 for amount, total in zip(amounts, totals, strict=True)],
            customdata=[words.si(amount) for amount in amounts],
            name=plain(phase),
            orientation="h",
            marker={"color": _SLATES[i % len(_SLATES)]},
            hovertemplate="%{x:.1%} (%{customdata})",
        )
    return figure


_UNITS = {"flops": "FLOPs", "device_seconds": "device-seconds"}


def training_loss(views: Sequence[RunView]) -> go.Figure:
    """Training loss over tokens in means of consecutive logged steps; the last run solid, others dashed."""
    figure = blank(320, xaxis={"title": {"text": "tokens"}}, yaxis={"title": {"text": "training loss"}})
    for view in views:
        x, y = binned([line.tokens for line in view.train], [line.loss for line in view.train])
        line = {"color": _SLATES[0]} if view is views[-1] else {"color": GREY, "dash": "dash"}
        figure.add_scatter(
            x=x,
            y=y,
            name=plain(view.name),
            mode="lines",
            line=line | {"width": 1.8},
            hovertemplate="%{y:.4f}",
        )
    return figure.update_layout(hovermode="x unified")
