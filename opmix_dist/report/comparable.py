"""Whether what is compared can be: the same tokens, data order, held-out samples, model?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from opmix_dist.report import words
from opmix_dist.report.courses import Course, Stage
from opmix_dist.report.groups import Group


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    what: str
    same: bool | None
    """None: not known."""
    text: str
    """What is the same, or what differs and where."""


def checks(groups: Sequence[Group]) -> list[Check]:
    """In the order in which they are shown; none where there is nothing to compare."""
    if sum(len(group.courses) for group in groups) < 2:
        return []
    return [_seeds(groups), _tokens(groups), _order(groups), _heldout(groups), _model(groups)]


def _seeds(groups: Sequence[Group]) -> Check:
    found = {group.name: ", ".join(map(str, sorted(group.courses))) for group in groups}
    if len(set(found.values())) == 1:
        return Check("seeds", True, f"the same: {found[groups[0].name]}")
    shown = "; ".join(f"{seeds} in {name}" for name, seeds in found.items())
    return Check("seeds", False, f"{shown}. Differences are of the seeds that both have")


def _tokens(groups: Sequence[Group]) -> Check:
    different = _differences(groups, lambda course: {"tokens": f"{course.tokens:,}"})
    if different:
        return Check("tokens", False, different[0])
    return Check("tokens", True, f"the same: {words.si(groups[0].one.tokens)} read by the model at the end")


def _order(groups: Sequence[Group]) -> Check:
    """A domain's order follows from the seed, its content and these settings; which domain comes when also
    from the mixtures and the size of a batch."""

    def settings(course: Course) -> dict[str, str]:
        return {
            "data.shuffle_block": _over_stages(course, lambda stage: stage.config.data.shuffle_block),
            "data.replay_samples": _over_stages(course, lambda stage: stage.config.data.replay_samples),
        }

    def batch(course: Course) -> dict[str, str]:
        size = _over_stages(course, lambda stage: stage.config.train.global_batch_size)
        return {"train.global_batch_size": size}

    within = [*_differences(groups, settings), *_differences(groups, _content)]
    if within:
        return Check("data order", False, "; ".join(within))
    across = [*_differences(groups, batch), *_other_mixtures(groups)]
    text = "the same within each domain, for the same seed"
    if across:
        text += f". Which domain comes when differs: {'; '.join(across)}"
    return Check("data order", None if _unknown(groups) else True, text + _unknown(groups))


def _heldout(groups: Sequence[Group]) -> Check:
    """Chosen by seed and domain, behind those that searches take."""

    def settings(course: Course) -> dict[str, str]:
        searched = _over_stages(course, lambda stage: stage.config.search.candidates.samples_per_domain)
        return {
            "train.eval_samples_per_domain": str(course.last.config.train.eval_samples_per_domain),
            "search.candidates.samples_per_domain": searched,
            "data.mask_documents": _over_stages(course, lambda stage: stage.config.data.mask_documents),
        }

    different = [*_differences(groups, settings), *_differences(groups, _content)]
    if different:
        return Check("held-out samples", False, "; ".join(different))
    count = groups[0].one.last.config.train.eval_samples_per_domain
    text = f"the same for the same seed: at most {count} of each domain"
    return Check("held-out samples", None if _unknown(groups) else True, text + _unknown(groups))


def _model(groups: Sequence[Group]) -> Check:
    def settings(course: Course) -> dict[str, str]:
        first = course.stages[0]
        plain = first.config.model.model_dump(mode="json")
        parameters = {"parameters": f"{first.summary.parameters:,}"}
        return parameters | {f"model.{key}": str(value) for key, value in plain.items()}

    different = _differences(groups, settings)
    if different:
        return Check("model", False, "; ".join(different))
    return Check(
        "model", True, f"the same: {words.si(groups[0].one.stages[0].summary.parameters)} parameters"
    )


def _content(course: Course) -> dict[str, str]:
    known: dict[str, str] = {}
    for stage in course.stages:
        known |= {f"documents of {name}": text[:12] for name, text in (stage.content or {}).items()}
    return known


def _unknown(groups: Sequence[Group]) -> str:
    without = [
        group.name
        for group in groups
        if any(stage.content is None for course in group.courses.values() for stage in course.stages)
    ]
    return f"; whether of the same documents is not known of {', '.join(without)}" if without else ""


def _over_stages(course: Course, value: Callable[[Stage], object]) -> str:
    """What all stages have, or what each has in turn."""
    return " then ".join(dict.fromkeys(str(value(stage)) for stage in course.stages))


def _differences(groups: Sequence[Group], values: Callable[[Course], Mapping[str, str]]) -> list[str]:
    """Of each key that has several values, who has which; what a course does not name is left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        for course in group.courses.values():
            for key, value in values(course).items():
                names = found.setdefault(key, {}).setdefault(value, [])
                names += [group.name] if group.name not in names else []
    return [
        f"{key}: " + ", ".join(f"{value} in {' and '.join(names)}" for value, names in by_value.items())
        for key, by_value in found.items()
        if len(by_value) > 1
    ]


def _other_mixtures(groups: Sequence[Group]) -> Iterator[str]:
    """Where each group's mixtures part from the baseline's, by the first seed that both have."""
    for group in groups[1:]:
        for seed, course in group.courses.items():
            if seed in groups[0].courses:
                parted = _parted(groups[0].courses[seed], course)
                if parted:
                    yield f"mixtures of {group.name} from {parted} on"
                break


def _parted(course: Course, other: Course) -> str | None:
    """The first stage and step at which the weights differ."""
    for mine, its in zip(course.stages, other.stages, strict=False):
        steps = sorted({record.step for record in [*mine.mixtures, *its.mixtures]})
        for step in steps:
            if _weights(mine, step) != _weights(its, step):
                where = f"{its.name}, " if len(other.stages) > 1 else ""
                return f"{where}step {step}"
    return None


def _weights(stage: Stage, step: int) -> dict[str, float]:
    """Those in force at a step, of the domains that have any."""
    records = [record for record in stage.mixtures if record.step <= step]
    return {name: weight for name, weight in records[-1].weights.items() if weight} if records else {}
