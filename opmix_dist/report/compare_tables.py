"""What was compared, as a terminal, a Markdown file and a script take it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from opmix_dist.data.printable import printable
from opmix_dist.report import words
from opmix_dist.report.comparable import Check
from opmix_dist.report.compared import STAGES, Compared, Quantity, Row
from opmix_dist.report.groups import Group
from opmix_dist.report.samples import SampledDifference
from opmix_dist.report.seeds import Difference, Spread
from opmix_dist.report.tables import AVERAGES
from opmix_dist.report.transfer import Matrix

BEFORE = "before"
MEASURES = (
    "Forgetting: rise over the best loss so far, mean over old domains; above 0 is worse. Acquisition: fall "
    "in the stage in which a domain joins. Backward transfer: fall since then. Forward transfer: fall until "
    "then. Of these three, above 0 is better."
)


def notes(compared: Compared) -> Iterator[str]:
    """What the table's numbers are."""
    most = max(len(group.courses) for group in compared.groups)
    if most > 1:
        yield "Mean ± standard deviation over seeds (n - 1)."
    if len(compared.groups) > 1:
        if any(d is not None and d.n > 1 for row in compared.rows for d in row.differences):
            interval = f"{words.percent(compared.confidence)} t intervals"
            yield f"Differences are paired by seed, with {interval} of what other seeds would give."
        else:
            yield "One seed: nothing is known of what another one would give."
            if any(found for row in compared.rows for found in row.sampled):
                yield "Differences ± standard error over the same held-out samples."
    yield AVERAGES
    if any(row.quantity.section == STAGES for row in compared.rows):
        yield MEASURES


def header(compared: Compared) -> list[str]:
    """Names of the columns behind the first."""
    baseline, *others = compared.groups
    named = [f"{group.name} ({_count(group)})" for group in compared.groups]
    return [*named, *(f"{group.name} − {baseline.name}" for group in others)]


def _count(group: Group) -> str:
    return "1 seed" if len(group.courses) == 1 else f"{len(group.courses)} seeds"


def cells(row: Row) -> list[str]:
    """A text for each column of :func:`header`."""
    spreads = [_spread(row.quantity, spread) for spread in row.spreads]
    pairs = zip(row.differences, row.sampled, strict=True)
    return [*spreads, *(_difference(row.quantity, by_seed, by_sample) for by_seed, by_sample in pairs)]


def verdicts(row: Row) -> list[int]:
    """Of each difference: 1 where it is surely better, -1 where it is surely worse, else 0."""
    return [
        int(math.copysign(1, d.mean)) * row.quantity.better if d is not None and d.certain else 0
        for d in row.differences
    ]


def _spread(quantity: Quantity, spread: Spread | None) -> str:
    if spread is None:
        return words.ABSENT
    mean = _number(quantity, spread.mean)
    if spread.deviation is None or _settled(quantity, spread.deviation):
        return mean
    return f"{mean} ± {_number(quantity, spread.deviation)}"


def _difference(
    quantity: Quantity, difference: Difference | None, sampled: Mapping[int, SampledDifference]
) -> str:
    """Of several seeds with their interval; of one with the error over samples, where that is known."""
    if difference is None:
        return words.ABSENT
    mean = _signed(quantity, difference.mean)
    if difference.low is None or difference.high is None:
        return " ± ".join([mean, *(f"{one.stderr:.4f}" for one in sampled.values())])
    if _settled(quantity, difference.deviation):
        return mean
    return f"{mean} [{_signed(quantity, difference.low)}, {_signed(quantity, difference.high)}]"


def _settled(quantity: Quantity, deviation: float | None) -> bool:
    """Nothing that is measured: the same for every seed by the settings, such as tokens and FLOPs."""
    return quantity.better == 0 and not deviation


def _number(quantity: Quantity, value: float) -> str:
    if quantity.unit == "share":
        text = words.share(value)
    elif quantity.unit == "perplexity":
        text = f"{value:.2f}"
    else:
        text = words.si(value) if quantity.unit == "amount" else f"{value:.4f}"
    return text.replace("-", "−") if text.startswith("-") else text


def _signed(quantity: Quantity, value: float) -> str:
    text = _number(quantity, value)
    return text if text.startswith("−") else f"+{text}"


def comparison_table(compared: Compared) -> Table:
    """All of it for a terminal; green and red where a difference is sure to be one."""
    table = Table(
        title="Comparison", title_justify="left", caption=" ".join(notes(compared)), caption_justify="left"
    )
    table.add_column("")
    for name in header(compared):
        table.add_column(_text(name), justify="right")
    section = None
    for row in compared.rows:
        if row.quantity.section != section:
            section = row.quantity.section
            table.add_section()
            table.add_row(Text(section, "bold"))
        table.add_row(_text(f"  {row.quantity.label}"), *_coloured(row))
    return table


def _coloured(row: Row) -> list[Text]:
    styles = {1: "green", 0: "", -1: "red"}
    plain = len(row.spreads)
    shown = cells(row)
    found = zip(shown[plain:], verdicts(row), strict=True)
    return [*map(Text, shown[:plain]), *(Text(text, styles[verdict]) for text, verdict in found)]


def stage_tables(compared: Compared) -> list[Table]:
    """A group's losses after each stage, of those that have stages."""
    tables = []
    for group in compared.groups:
        if not group.losses.staged:
            continue
        title = _text(f"{group.name}: loss after each stage, and its rise over the best so far")
        table = Table(title=title, title_justify="left")
        table.add_column("stage")
        for name in group.losses.one.domains:
            table.add_column(_text(name), justify="right")
        for stage, losses in stage_rows(group):
            table.add_row(_text(stage), *losses)
        tables.append(table)
    return tables


def stage_rows(group: Group) -> Iterator[tuple[str, list[str]]]:
    """(stage, a text per domain): the loss, mean over seeds, with what became of the domain in the stage."""
    matrix = group.losses
    for number, stage in enumerate([BEFORE, *matrix.one.stages]):
        pairs = zip(matrix.values[number], matrix.forgetting[number], matrix.one.joined, strict=True)
        yield stage, [_stage_cell(loss, rise, join == number > 0) for loss, rise, join in pairs]


def _stage_cell(loss: float, rise: float, joins: bool) -> str:
    if math.isnan(loss):
        return words.ABSENT
    if joins:
        return f"{words.loss(loss)} joins"
    return words.loss(loss) if math.isnan(rise) else f"{words.loss(loss)} ({words.signed(rise)})"


def markdown(compared: Compared, sections: Sequence[str] | None = None) -> list[str]:
    """Lines of a table in Markdown; ``sections``: those to show, None: all."""
    names = header(compared)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    section = None
    for row in compared.rows:
        if sections is not None and row.quantity.section not in sections:
            continue
        if row.quantity.section != section:
            section = row.quantity.section
            lines.append(f"| **{section}** |" + " |" * len(names))
        lines.append(f"| {row.quantity.label} | " + " | ".join(cells(row)) + " |")
    return lines


def values(compared: Compared, found: Sequence[Check]) -> dict[str, Any]:
    """The whole comparison as JSON holds it; what is not a finite number is null."""
    names = [group.name for group in compared.groups]
    return {
        "confidence": compared.confidence,
        "groups": [
            {"name": group.name, "runs": {str(seed): str(c.path) for seed, c in group.courses.items()}}
            for group in compared.groups
        ],
        "checks": [{"what": check.what, "same": check.same, "text": check.text} for check in found],
        "quantities": [_row_values(row, names) for row in compared.rows],
        "compute": compared.compute_lines(),
        "stages": {
            group.name: {
                str(seed): [_matrix_values(course.losses), _matrix_values(course.errors)]
                for seed, course in group.courses.items()
            }
            for group in compared.groups
        },
        "warnings": list(compared.uncounted()),
    }


def _row_values(row: Row, names: Sequence[str]) -> dict[str, Any]:
    quantity = row.quantity
    return {
        "section": quantity.section,
        "label": quantity.label,
        "unit": quantity.unit,
        "better": {-1: "less", 0: None, 1: "more"}[quantity.better],
        "groups": {
            name: {
                "n": spread.n,
                "mean": _finite(spread.mean),
                "deviation": _finite(spread.deviation),
                "values": {str(seed): _finite(value) for seed, value in found.items()},
            }
            for name, spread, found in zip(names, row.spreads, row.values, strict=True)
            if spread is not None
        },
        "differences": {
            name: {"n": d.n} | {key: _finite(getattr(d, key)) for key in ("mean", "deviation", "low", "high")}
            for name, d in zip(names[1:], row.differences, strict=True)
            if d is not None
        },
        "by_sample": {
            name: {str(seed): _sampled_values(one) for seed, one in found.items()}
            for name, found in zip(names[1:], row.sampled, strict=True)
            if found
        },
    }


def _sampled_values(difference: SampledDifference) -> dict[str, float | None]:
    return {"mean": _finite(difference.mean), "stderr": _finite(difference.stderr)}


def _matrix_values(matrix: Matrix) -> dict[str, Any]:
    return {
        "metric": matrix.metric,
        "stages": list(matrix.stages),
        "domains": list(matrix.domains),
        "joined": matrix.joined.tolist(),
        "values": [[_finite(value) for value in row] for row in matrix.values.tolist()],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _text(text: str) -> Text:
    """Names are folders' names, which anybody may have chosen."""
    return Text(printable(text))
