"""validate.html: what a validation found, in pictures and tables; loads nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from opmix_dist.atomic import write_bytes
from opmix_dist.report import charts, page, words
from opmix_dist.validate import tables
from opmix_dist.validate.records import PointResult, SimulatorResult, Validation, ValidationDir

SYMBOLS = {"design": "circle", "proposal": "star", "component": "diamond", "average": "x"}
BLUE, ORANGE = "#3f86c9", "#dd7a37"


def write_page(found: Validation, folder: ValidationDir) -> Path:
    write_bytes(folder.page_file, validation_page(found))
    return folder.page_file


def validation_page(found: Validation) -> bytes:
    """The page in UTF-8."""
    figures = page.Figures()
    rows = {title: page.table(header, cells) for title, header, cells in tables.all_rows(found)}
    simulators, domains, sources, points, calibrations, costs = (
        page.subsection(title, table) for title, table in rows.items()
    )
    shown = [
        page.section("In short", *(page.element("p", line) for line in tables.sentences(found))),
        page.section(
            "Simulated against real",
            page.caption(
                "Changes of the mean loss from the snapshot's. On the grey line the simulation is exact; a "
                "slope below it means that simulated differences are larger than real ones, above it that "
                "they are compressed. Stars: the proposal. Diamonds: components alone. Crosses: old's "
                "mixture by averages of probes."
            ),
            figures.grid(scatter(found, one) for one in found.simulators),
            simulators,
        ),
        page.section(
            "By domain",
            page.caption("The search's own probes; each domain's loss at every mixture."),
            figures.grid(domain_scatter(found, name) for name in found.domains),
            domains,
        ),
        page.section(
            "Where the gap comes from",
            page.caption(
                "Simulated minus real mean loss of each mixture, by the number of components that its u "
                "mixes in effect, 1 / sum u^2: averaging lowers a simulated loss whatever the data."
            ),
            figures.place(gaps(found)),
            sources,
        ),
        page.section(
            "Corrections",
            page.caption(
                "Each is fitted to the other mixtures and asked of the one left out. A search reads "
                "calibration.json as search.calibration."
            ),
            figures.place(errors(found)),
            calibrations,
        ),
        page.section("All mixtures", points),
        page.section("Compute", costs),
    ]
    subtitle = (
        f"{len(found.points)} simulated points, real runs of {found.steps} steps ({words.si(found.tokens)} "
        f"tokens) from the {found.start}, {found.samples} held-out samples, seeds "
        f"{', '.join(map(str, found.seeds))}."
    )
    return page.render(f"Validation of search {found.search}", subtitle, shown, figures)


def _mean(losses: dict[str, float]) -> float:
    return float(np.mean(list(losses.values())))


def scatter(found: Validation, simulator: SimulatorResult) -> go.Figure:
    """Change of the mean loss, simulated (x) and real (y), a dot for each point."""
    start = _mean(found.snapshot)
    points = [
        (point, _mean(point.simulated[simulator.name]) - start, _mean(point.real) - start)
        for point in found.points
    ]
    return _against(simulator.name, points)


def domain_scatter(found: Validation, domain: str) -> go.Figure:
    """The same of one domain's loss, by the search's probes."""
    name, start = found.simulators[0].name, found.snapshot[domain]
    points = [
        (point, point.simulated[name][domain] - start, point.real[domain] - start) for point in found.points
    ]
    return _against(domain, points)


def _against(title: str, points: list[tuple[PointResult, float, float]]) -> go.Figure:
    figure = charts.blank(
        300,
        title,
        xaxis={"title": {"text": "simulated change"}},
        yaxis={"title": {"text": "real change"}},
        showlegend=False,
    )
    ends = [min(min(x, y) for _, x, y in points), max(max(x, y) for _, x, y in points)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": charts.GREY, "dash": "dot"},
                       hoverinfo="skip")  # fmt: skip
    figure.add_scatter(
        x=[x for _, x, _ in points],
        y=[y for _, _, y in points],
        text=[charts.plain(point.name) for point, _, _ in points],
        mode="markers",
        marker={
            "symbol": [SYMBOLS[point.kind] for point, _, _ in points],
            "size": 9,
            "color": [ORANGE if point.kind == "proposal" else BLUE for point, _, _ in points],
        },
        hovertemplate="%{text}<br>simulated %{x:+.4f}, real %{y:+.4f}<extra></extra>",
    )
    return figure


def gaps(found: Validation) -> go.Figure:
    """Gap of the mean loss by effective number of components, a colour for each simulator."""
    figure = charts.blank(
        360,
        xaxis={"title": {"text": "components mixed in effect, 1 / sum u²"}},
        yaxis={"title": {"text": "simulated minus real mean loss"}},
    )
    colours = charts.domain_colours([one.name for one in found.simulators])
    mixed = [1 / sum(share**2 for share in point.u.values()) for point in found.points]
    for name, colour in colours.items():
        figure.add_scatter(
            x=mixed,
            y=[_mean(point.simulated[name]) - _mean(point.real) for point in found.points],
            text=[charts.plain(point.name) for point in found.points],
            name=charts.plain(name),
            mode="markers",
            marker={"symbol": [SYMBOLS[point.kind] for point in found.points], "size": 9, "color": colour},
            hovertemplate="%{text}: %{y:+.4f}<extra>%{fullData.name}</extra>",
        )
    return figure


def errors(found: Validation) -> go.Figure:
    """Bars: cross-validated errors of each correction."""
    figure = charts.blank(
        300, barmode="group", yaxis={"title": {"text": "root mean square error, nats per token"}}
    )
    names = [one.calibration.method for one in found.calibrations]
    for label, values, colour in (
        ("losses", [one.error for one in found.calibrations], charts.GREY),
        ("differences from old", [one.difference_error for one in found.calibrations], BLUE),
    ):
        figure.add_bar(x=names, y=values, name=label, marker={"color": colour}, hovertemplate="%{y:.4f}")
    return figure
