"""A comparison as one self-contained HTML page: what can be compared, a picture, a table, the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opmix_dist.report import charts, compare_charts, page
from opmix_dist.report.comparable import Check
from opmix_dist.report.compare_tables import cells, header, notes, stage_rows, verdicts
from opmix_dist.report.compared import AVERAGE, LOSSES, Compared, Row
from opmix_dist.report.page import Html


def compare_page(compared: Compared, found: Sequence[Check]) -> bytes:
    """The page; it opens from disk and loads nothing from a network."""
    figures = page.Figures()
    colours = charts.domain_colours([group.name for group in compared.groups])
    parts = [
        _comparable(found),
        _picture(compared, figures, colours),
        *_tables(compared),
        _compute(compared),
        *_stages(compared, figures),
    ]
    title = " · ".join(group.name for group in compared.groups)
    return page.render(title, _lead(compared), filter(None, parts), figures)


def _lead(compared: Compared) -> str:
    """The result in one sentence."""
    row = compared.row(LOSSES, AVERAGE)
    means = (
        {}
        if row is None
        else {
            group.name: spread.mean
            for group, spread in zip(compared.groups, row.spreads, strict=True)
            if spread is not None
        }
    )
    if not means:
        return "No average loss is known."
    best = min(means, key=means.__getitem__)
    return f"Lowest average held-out loss: {best}, {means[best]:.4f} nats per token."


def _comparable(found: Sequence[Check]) -> Html:
    if not found:
        return Html()
    verdict = {True: "yes", False: "no", None: "not known"}
    rows = [[check.what, verdict[check.same], check.text] for check in found]
    items = [
        page.element("p", page.element("strong", f"{what}: {same}. "), text) for what, same, text in rows
    ]
    return page.section("Is it comparable?", *items)


def _picture(compared: Compared, figures: page.Figures, colours: dict[str, str]) -> Html:
    text = "Everything that was computed counts: training, searches, evaluations, what methods add. Bars are "
    text += "standard deviations over seeds."
    figure = compare_charts.loss_against_compute(compared, colours)
    return page.section("Loss against compute", page.caption(text), figures.place(figure))


def _tables(compared: Compared) -> Iterator[Html]:
    sections: dict[str, list[Row]] = {}
    for row in compared.rows:
        sections.setdefault(row.quantity.section, []).append(row)
    text = page.caption(" ".join(notes(compared)))
    for title, rows in sections.items():
        table = page.table(["", *header(compared)], map(_cells, rows))
        yield page.section(title, text, table)
        text = Html()


def _cells(row: Row) -> list[str]:
    """Differences that are sure are emphasised."""
    plain, shown = len(row.spreads), cells(row)
    changes = zip(shown[plain:], verdicts(row), strict=True)
    return [
        row.quantity.label,
        *shown[:plain],
        *(page.Strong(text) if verdict else text for text, verdict in changes),
    ]


def _compute(compared: Compared) -> Html:
    lines = [page.element("p", line) for line in compared.compute_lines()]
    lines += [page.problem(line) for line in compared.uncounted()]
    return page.section("Compute against the baseline's", *lines) if lines else Html()


def _stages(compared: Compared, figures: page.Figures) -> Iterator[Html]:
    for group in compared.groups:
        if group.losses.staged:
            text = "Held-out loss after each stage; in brackets its rise over the best so far."
            table = page.table(
                ["stage", *group.losses.one.domains],
                ([stage, *losses] for stage, losses in stage_rows(group)),
            )
            chart = figures.place(compare_charts.stage_heat_map(group))
            yield page.section(f"Stages of {group.name}", page.caption(text), chart, table)
