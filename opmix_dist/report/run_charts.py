"""Charts with a curve or a bar for each of several runs, which keeps one colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from opmix_dist.report import tables, words
from opmix_dist.report.charts import binned, blank, plain
from opmix_dist.report.reading import RunView


def heldout_losses(domain: str, views: Sequence[RunView], colours: Mapping[str, str]) -> go.Figure:
    """One domain's held-out loss over training tokens."""
    figure = blank(250, domain, xaxis={"title": {"text": "tokens"}}, showlegend=False)
    for view in views:
        lines = [line for line in view.evals if domain in line.loss]
        figure.add_scatter(
            x=[line.tokens for line in lines],
            y=[line.loss[domain] for line in lines],
            customdata=[line.stderr.get(domain) for line in lines],
            name=plain(view.name),
            mode="lines+markers",
            line={"width": 2, "color": colours[view.name]},
            marker={"size": 5},
            hovertemplate="%{y:.4f} ± %{customdata:.4f}",
        )
    return figure.update_layout(hovermode="x unified")


def latest_mixtures(views: Sequence[RunView], colours: Mapping[str, str]) -> go.Figure:
    """Bars of each domain's share, one for each run."""
    rows = tables.mixture_rows([view.mixtures[-1].weights for view in views])
    figure = blank(
        80 + (14 + 18 * len(views)) * len(rows),
        xaxis={"title": {"text": "share of the mixture"}, "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "type": "category"},
        barmode="group",
        bargap=0.3,
    )
    for i, view in enumerate(views):
        figure.add_bar(
            y=[plain(domain) for domain, _ in rows],
            x=[weights[i] for _, weights in rows],
            name=plain(view.name),
            orientation="h",
            marker={"color": colours[view.name]},
            text=[words.share(weights[i]) for _, weights in rows],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2%}<extra>%{fullData.name}</extra>",
        )
    return figure


def training_losses(views: Sequence[RunView], colours: Mapping[str, str]) -> go.Figure:
    """Training loss over tokens, in means of consecutive logged steps."""
    figure = blank(320, xaxis={"title": {"text": "tokens"}}, yaxis={"title": {"text": "training loss"}})
    for view in views:
        x, y = binned([line.tokens for line in view.train], [line.loss for line in view.train])
        figure.add_scatter(
            x=x,
            y=y,
            name=plain(view.name),
            mode="lines",
            line={"color": colours[view.name], "width": 1.8},
            hovertemplate="%{y:.4f}",
        )
    return figure.update_layout(hovermode="x unified")
