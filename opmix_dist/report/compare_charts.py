"""Pictures of a comparison: loss against compute, and losses after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from opmix_dist.report.charts import GREY, blank, plain
from opmix_dist.report.compare_tables import BEFORE
from opmix_dist.report.compared import AVERAGE, LOSSES, TOTAL, Compared, Row
from opmix_dist.report.compute import UNITS
from opmix_dist.report.groups import Group
from opmix_dist.report.seeds import Spread


def loss_against_compute(compared: Compared, colours: Mapping[str, str]) -> go.Figure:
    """A small dot for each seed, and a large one with deviations for the mean of each group: the lower left
    is better."""
    figure = blank(
        420,
        xaxis={"title": {"text": "FLOPs in all"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "average held-out loss at the end"}},
    )
    across, up = compared.row(UNITS["flops"], TOTAL), compared.row(LOSSES, AVERAGE)
    if across is None or up is None:
        return figure
    for i, group in enumerate(compared.groups):
        _group(figure, i, group, (across, up), colours[group.name])
    return figure


def _group(figure: go.Figure, i: int, group: Group, rows: tuple[Row, Row], colour: str) -> None:
    across, up = rows
    seeds = [seed for seed in group.courses if seed in across.values[i] and seed in up.values[i]]
    x, y = across.spreads[i], up.spreads[i]
    if x is None or y is None:
        return
    if len(seeds) > 1:
        figure.add_scatter(
            x=[across.values[i][seed] for seed in seeds],
            y=[up.values[i][seed] for seed in seeds],
            text=[f"{plain(group.name)}, seed {seed}" for seed in seeds],
            mode="markers",
            showlegend=False,
            marker={"color": colour, "size": 6, "opacity": 0.55},
            hovertemplate="%{text}: %{y:.4f}, %{x:.4s} FLOPs<extra></extra>",
        )
    figure.add_scatter(
        x=[x.mean],
        y=[y.mean],
        error_x=_bar(x),
        error_y=_bar(y),
        name=plain(group.name),
        mode="markers",
        marker={"color": colour, "size": 13, "line": {"width": 1, "color": GREY}},
        hovertemplate="%{y:.4f}, %{x:.4s} FLOPs",
    )


def _bar(spread: Spread) -> dict[str, object]:
    return {"array": [spread.deviation or 0.0], "thickness": 1.2, "width": 4, "visible": spread.n > 1}


def stage_heat_map(group: Group) -> go.Figure:
    """Rows are stages, columns domains; a colour is the loss relative to the domain's worst and best one, so
    that domains of different difficulty can be read side by side; the number is the loss."""
    matrix = group.losses
    rows = [BEFORE, *matrix.one.stages]
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.fmin.reduce(matrix.values), np.fmax.reduce(matrix.values)  # [D]
        share = (matrix.values - low) / np.where(high > low, high - low, 1.0)  # [S + 1, D]
    figure = blank(
        120 + 34 * len(rows),
        group.name,
        yaxis={"autorange": "reversed", "type": "category"},
        xaxis={"type": "category"},
        margin={"t": 36, "l": 90},
    )
    figure.add_heatmap(
        x=[plain(name) for name in matrix.one.domains],
        y=_apart(rows),
        z=_nulls(share),
        customdata=_nulls(matrix.values),
        text=[["" if np.isnan(v) else f"{v:.3f}" for v in row] for row in matrix.values],
        texttemplate="%{text}",
        colorscale=[[0, "#3c9d6e"], [0.5, "#e3dcc4"], [1, "#cf5353"]],
        zmin=0,
        zmax=1,
        colorbar={"title": {"text": "best to worst"}, "tickvals": [0, 1], "ticktext": ["best", "worst"]},
        hovertemplate="after %{y}, %{x}: %{customdata:.4f}<extra></extra>",
    )
    return figure


def _apart(names: Sequence[str]) -> list[str]:
    """A stage may be called as the first row is."""
    return [plain(name) if names.index(name) == i else f"{plain(name)} ({i})" for i, name in enumerate(names)]


def _nulls(values: np.ndarray) -> list[list[float | None]]:
    """Rows with None for nan, which JSON does not know."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]
