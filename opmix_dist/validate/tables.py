"""What a validation found, as rows for the console and the page, and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from opmix_dist.data.printable import printable
from opmix_dist.report import words
from opmix_dist.validate.records import Validation

Rows = tuple[str, Sequence[str], list[list[str]]]
"""Title, header, cells."""


def all_rows(found: Validation) -> list[Rows]:
    """Every table, in the order of the page."""
    tables = [simulator_rows(found), domain_rows(found), source_rows(found), point_rows(found)]
    return [*tables, calibration_rows(found), cost_rows(found)]


def console_tables(found: Validation) -> Iterator[Table]:
    for title, header, rows in all_rows(found):
        table = Table(title=printable(title))
        for i, name in enumerate(header):
            table.add_column(printable(name), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(printable, row))
        yield table


def number(value: float | None) -> str:
    return words.ABSENT if value is None else f"{value:.3f}".replace("-", "−")


def simulator_rows(found: Validation) -> Rows:
    rows = [
        [
            one.name,
            words.signed(one.mean_gap),
            number(max(one.largest_gap.values())),
            number(one.spearman_objective),
            number(_mean(list(one.spearman.values()))),
            number(_mean(list(one.slope.values()))),
            words.loss(one.regret),
            words.loss(one.divergence),
        ]
        for one in found.simulators
    ]
    header = ["simulated by", "mean gap", "largest gap", f"Spearman, {found.objective}", "Spearman, domains",
              "slope", "regret", "KL"]  # fmt: skip
    return "Simulated minus real losses over mixtures (nats per token)", header, rows


def domain_rows(found: Validation) -> Rows:
    first = found.simulators[0]
    rows = [
        [
            name,
            words.loss(found.snapshot[name]),
            words.signed(first.gap[name]),
            number(first.largest_gap[name]),
            number(first.spearman[name]),
            number(first.slope[name]),
        ]
        for name in found.domains
    ]
    header = ["domain", "snapshot's loss", "mean gap", "largest gap", "Spearman", "slope"]
    return f"By domain: {first.about}", header, rows


def source_rows(found: Validation) -> Rows:
    parts = found.sources
    rows = [
        ["mean gap of the probes", words.signed(parts.gap)],
        ["of it: LoRA probes against full-parameter deltas", words.signed(parts.lora)],
        ["of it: interpolating full-parameter deltas against real training", words.signed(parts.averaging)],
        ["gap where u is one component alone: nothing is averaged", words.signed(parts.at_components)],
    ]
    for kind, bonus in (("probes", parts.bonus), ("full-parameter deltas", parts.bonus_full)):
        rows += [
            [f"gain of averaging {kind} at old's mixture: {n}", words.signed(v)] for n, v in bonus.items()
        ]
    rows.append(["standard deviation of a real run's mean loss over seeds", words.loss(parts.noise)])
    return "Where the gap comes from (mean over domains, nats per token)", ["part", "nats"], rows


def point_rows(found: Validation) -> Rows:
    names = [one.name for one in found.simulators]
    rows = [
        [
            point.name,
            point.kind,
            words.loss(_mean(list(point.real.values()))),
            *(words.loss(_mean(list(point.simulated[name].values()))) for name in names),
            ", ".join(f"{name} {words.share(x)}" for name, x in point.x.items() if x >= 0.0005),
        ]
        for point in found.points
    ]
    return "Mean loss of each mixture", ["mixture", "kind", "real", *names, "shares"], rows


def calibration_rows(found: Validation) -> Rows:
    rows = [
        [
            one.calibration.method + (" *" if one.calibration.method == found.chosen else ""),
            words.loss(one.error),
            words.loss(one.difference_error),
            number(one.spearman_objective),
            words.loss(one.regret),
            number(_mean(list(one.calibration.slope.values()))),
            words.signed(_mean(list(one.calibration.averaging.values()))),
        ]
        for one in found.calibrations
    ]
    title = "Corrections, each on mixtures that it was not fitted to (* is written)"
    header = ["correction", "error of losses", "of differences from old", f"Spearman, {found.objective}",
              "regret", "slope", "averaging"]  # fmt: skip
    return title, header, rows


def cost_rows(found: Validation) -> Rows:
    rows = [
        [name, f"{cost.seconds:.1f}", words.si(cost.flops), words.si(cost.tokens)]
        for name, cost in found.costs.items()
    ]
    return "What it cost", ["phase", "seconds", "FLOPs", "tokens"], rows


def sentences(found: Validation) -> list[str]:
    """What a reader must know first."""
    lines = [
        f"Of {found.mixtures} mixtures that were trained on for real, the proposal ranks "
        f"{found.proposal_rank}; it is {found.proposal_regret:.4f} nats above the best "
        f"({found.objective} loss).",
        f"Moving from old to the proposal changed the real {found.objective} loss by "
        f"{words.signed(-found.proposal_gain)}, the simulated one by {words.signed(-found.simulated_gain)}.",
    ]
    if found.tokens != found.probe_tokens:
        lines.append(
            f"A real run reads {words.si(found.tokens)} tokens, a probe has read "
            f"{words.si(found.probe_tokens)}: part of the gap is that of the horizon."
        )
    if found.sources.noise is None:
        lines.append(
            "One seed: how far real runs differ by their data order alone is not known (real.seeds)."
        )
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
