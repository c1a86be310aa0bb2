"""Groups of courses in numbers: each quantity's spread over seeds, and its difference from the baseline's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opmix_dist.errors import UserError
from opmix_dist.report.compute import UNITS, amounts, less_compute, mean_amounts
from opmix_dist.report.courses import Course
from opmix_dist.report.groups import Group
from opmix_dist.report.samples import SampledDifference, average_difference, sampled_differences
from opmix_dist.report.seeds import Difference, Spread, paired
from opmix_dist.report.tables import perplexity
from opmix_dist.report.transfer import Matrix

Unit = Literal["loss", "perplexity", "share", "amount"]
LOSSES, STAGES = "Held-out loss (nats per token)", "Over the stages (nats per token)"
ERRORS, MIXTURE, TOKENS = "Task error rates", "Final mixture", "Tokens"
AVERAGE, AVERAGE_PERPLEXITY = "average", "average perplexity"
FORGETTING, ACQUISITION = "forgetting", "acquisition"
BACKWARD, FORWARD = "backward transfer", "forward transfer"
TOTAL = "total"


@dataclass(frozen=True)
class Quantity:
    """A row of the table."""

    section: str
    label: str
    unit: Unit
    better: Literal[-1, 0, 1]
    """Whether less (-1) or more (1) of it is better; 0: it is neither."""


@dataclass(frozen=True)
class Row:
    """A quantity of G groups."""

    quantity: Quantity
    values: list[dict[int, float]]
    """[G] by seed; empty where a group does not have it."""
    spreads: list[Spread | None]
    """[G]."""
    differences: list[Difference | None]
    """[G - 1] of the groups behind the baseline, paired by seed."""
    sampled: list[dict[int, SampledDifference]]
    """[G - 1] the same by seed, paired by held-out sample: of losses, where the samples' were kept."""


@dataclass(frozen=True)
class Compared:
    """Groups side by side, the baseline first."""

    groups: list[Group]
    confidence: float
    rows: list[Row]

    @classmethod
    def of(cls, groups: Sequence[Group], confidence: float) -> Compared:
        """Raises UserError where the courses were evaluated on different domains."""
        _require_one_set_of_domains(groups)
        measured = [{seed: measures(course) for seed, course in group.courses.items()} for group in groups]
        everything = [found for by_seed in measured for found in by_seed.values()]
        sampled = [_by_sample(group, groups[0]) for group in groups[1:]]
        rows = [_row(quantity, measured, sampled, confidence) for quantity in _in_order(everything)]
        return cls(list(groups), confidence, rows)

    def row(self, section: str, label: str) -> Row | None:
        found = (r for r in self.rows if (r.quantity.section, r.quantity.label) == (section, label))
        return next(found, None)

    def compute_lines(self) -> list[str]:
        """How each group's compute, the mean over its seeds, stands to the baseline's, with its parts."""
        baseline, *others = self.groups
        return [
            less_compute(group.name, _mean(group, unit), baseline.name, _mean(baseline, unit), unit)
            for group in others
            for unit in UNITS
        ]

    def uncounted(self) -> Iterator[str]:
        """Costs that nobody knows, a sentence each."""
        for group in self.groups:
            for course in group.courses.values():
                for search in course.uncounted:
                    yield f"{course.path}: {search} left no proposal, so that its cost is not counted"


def measures(course: Course) -> dict[Quantity, float]:
    """All that is known of a course by its end, in the order of the table's sections."""
    found = [*_losses(course), *_over_stages(course.losses, STAGES, "loss"), *_errors(course)]
    found += [*_mixture(course), *_compute(course)]
    return {quantity: value for quantity, value in found if not math.isnan(value)}


def _losses(course: Course) -> Iterator[tuple[Quantity, float]]:
    matrix = course.losses
    last = matrix.last
    for name, value in zip(matrix.domains, matrix.values[last].tolist(), strict=True):
        yield Quantity(LOSSES, name, "loss", -1), value
    yield Quantity(LOSSES, AVERAGE, "loss", -1), matrix.average(last)
    if matrix.old(last).any():
        yield Quantity(LOSSES, "average of old domains", "loss", -1), matrix.average(last, matrix.old(last))
        yield Quantity(LOSSES, "average of new domains", "loss", -1), matrix.average(last, matrix.new(last))
    perplexities = [perplexity(loss) for loss in matrix.values[last].tolist()]
    mean = sum(perplexities) / len(perplexities)
    yield Quantity(LOSSES, AVERAGE_PERPLEXITY, "perplexity", -1), mean


def _over_stages(matrix: Matrix, section: str, unit: Unit) -> Iterator[tuple[Quantity, float]]:
    """What is nan, because there was no earlier stage or nobody measured it, is left out by the caller."""
    yield Quantity(section, FORGETTING, unit, -1), matrix.mean_forgetting(matrix.last)
    yield Quantity(section, ACQUISITION, unit, 1), matrix.mean_acquisition()
    yield Quantity(section, BACKWARD, unit, 1), matrix.backward_transfer()
    yield Quantity(section, FORWARD, unit, 1), matrix.forward_transfer()


def _errors(course: Course) -> Iterator[tuple[Quantity, float]]:
    matrix = course.errors
    for name, value in zip(matrix.domains, matrix.values[matrix.last].tolist(), strict=True):
        yield Quantity(ERRORS, name, "share", -1), value
    if matrix.domains:
        yield Quantity(ERRORS, AVERAGE, "share", -1), matrix.average(matrix.last)
        yield from _over_stages(matrix, ERRORS, "share")


def _mixture(course: Course) -> Iterator[tuple[Quantity, float]]:
    for name, weight in course.last.summary.mixture.items():
        yield Quantity(MIXTURE, name, "share", 0), weight


def _compute(course: Course) -> Iterator[tuple[Quantity, float]]:
    yield Quantity(TOKENS, "read by the model at the end", "amount", 0), float(course.tokens)
    for unit, name in UNITS.items():
        parts = amounts(course.costs, unit)
        for phase, amount in parts.items():
            yield Quantity(name, phase, "amount", 0), amount
        yield Quantity(name, TOTAL, "amount", 0), float(sum(parts.values()))


def _in_order(measured: Sequence[Mapping[Quantity, float]]) -> list[Quantity]:
    """Every quantity once, those of a section together, totals behind the parts."""
    found = dict.fromkeys(quantity for one in measured for quantity in one)
    sections = list(dict.fromkeys(quantity.section for quantity in found))
    totals = {Quantity(section, TOTAL, "amount", 0) for section in UNITS.values()}
    return sorted(found, key=lambda quantity: (sections.index(quantity.section), quantity in totals))


def _by_sample(group: Group, baseline: Group) -> dict[int, dict[str, SampledDifference]]:
    """By seed and domain, with the average where all domains are there."""
    found = {}
    for seed, course in group.courses.items():
        if seed in baseline.courses:
            by_domain = sampled_differences(course.last.samples, baseline.courses[seed].last.samples)
            if by_domain.keys() == set(course.losses.domains):
                by_domain[AVERAGE] = average_difference(by_domain)
            found[seed] = by_domain
    return found


def _row(
    quantity: Quantity,
    measured: Sequence[Mapping[int, Mapping[Quantity, float]]],
    sampled: Sequence[Mapping[int, Mapping[str, SampledDifference]]],
    confidence: float,
) -> Row:
    """A phase or a domain that a course does not have cost nothing and weighs 0 there; of the rest, what is
    not known stays out.

    Args:
        measured: what was measured, by group and seed.
        sampled: of :func:`_by_sample`, by group behind the baseline.
    """
    absent = 0.0 if quantity.section in (MIXTURE, *UNITS.values()) else math.nan
    values = [{seed: found.get(quantity, absent) for seed, found in group.items()} for group in measured]
    values = [{seed: value for seed, value in group.items() if not math.isnan(value)} for group in values]
    spreads = [Spread.of(list(found.values())) if found else None for found in values]
    by_sample: list[dict[int, SampledDifference]] = [{} for _ in sampled]
    if quantity.section == LOSSES:
        label = quantity.label
        by_sample = [{seed: one[label] for seed, one in group.items() if label in one} for group in sampled]
    differences = [paired(found, values[0], confidence) for found in values[1:]]
    return Row(quantity, values, spreads, differences, by_sample)


def _mean(group: Group, unit: str) -> dict[str, float]:
    return mean_amounts([course.costs for course in group.courses.values()], unit)


def _require_one_set_of_domains(groups: Sequence[Group]) -> None:
    first = groups[0].one
    domains = set(first.losses.domains)
    for group in groups:
        for course in group.courses.values():
            if set(course.losses.domains) != domains or not domains:
                raise UserError(
                    f"courses that were evaluated on different domains cannot be compared: {first.path} on "
                    f"{', '.join(first.losses.domains) or 'none'}, {course.path} on "
                    f"{', '.join(course.losses.domains) or 'none'}"
                )
