"""Courses that differ in nothing but their seeds belong together."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opmix_dist.errors import UserError
from opmix_dist.report import words
from opmix_dist.report.courses import Course
from opmix_dist.report.transfer import MeanMatrix

OF_A_RUN = ("run_dir", "resume", "seed", "logging", "start.run")
"""Settings that runs of one group may have each for itself."""
_SEED_AT_END = re.compile(r"[-_. ]*(seed[-_. ]*|(?<![a-z])s)?[0-9]+$", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """Courses of training, one for each seed."""

    name: str
    courses: dict[int, Course]
    """By seed."""

    @cached_property
    def losses(self) -> MeanMatrix:
        """Held-out losses after each stage, mean over seeds."""
        return MeanMatrix.of([course.losses for course in self.courses.values()])

    @property
    def one(self) -> Course:
        """Any of them: what they have in common can be read off it."""
        return next(iter(self.courses.values()))


def group_by_settings(courses: Sequence[Course]) -> list[Group]:
    """Groups in the order of their first course. One seed once more, with the same settings, stands in a
    group of its own, so that a repetition can be looked at."""
    found: dict[tuple[str, int], list[Course]] = {}
    for course in courses:
        settings, repetition = _settings(course), 0
        while course.seed in (other.seed for other in found.get((settings, repetition), ())):
            repetition += 1
        found.setdefault((settings, repetition), []).append(course)
    return named_apart([_group(_name(members), members) for members in found.values()])


def group_as_named(named: Sequence[tuple[str, Sequence[Course]]]) -> list[Group]:
    """As the user has it: (name, courses), the baseline first.

    Raises:
        UserError: a name twice, two courses of one seed in a group, or courses of other stages.
    """
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--group {name} is given twice: name each group once, with all of its runs")
    return [_group(name, courses) for name, courses in named]


def _group(name: str, courses: Sequence[Course]) -> Group:
    by_seed: dict[int, Course] = {}
    for course in courses:
        other = by_seed.setdefault(course.seed, course)
        if other is not course:
            raise UserError(
                f"group {name}: {other.path} and {course.path} both have seed {course.seed}: pairs go by "
                "seed, so leave one out"
            )
        first = courses[0]
        if course.losses.stages != first.losses.stages:
            theirs = ", ".join(first.losses.stages), ", ".join(course.losses.stages)
            raise UserError(
                f"group {name}: {first.path} has the stages {theirs[0]} and {course.path} has {theirs[1]}: "
                "put them into groups of their own"
            )
    return Group(name, by_seed)


def named_apart(groups: Sequence[Group]) -> list[Group]:
    """Groups of the same name get a number."""
    names = words.apart(group.name for group in groups)
    return [Group(name, group.courses) for name, group in zip(names, groups, strict=True)]


def _settings(course: Course) -> str:
    """All settings but those of OF_A_RUN, of all stages."""
    stages: list[dict[str, Any]] = []
    for stage in course.stages:
        plain = stage.config.model_dump(mode="json")
        for key in OF_A_RUN:
            *parents, leaf = key.split(".")
            section = plain
            for parent in parents:
                section = section[parent]
            section.pop(leaf)
        stages.append(plain)
    return json.dumps(stages, sort_keys=True)


def _name(members: Sequence[Course]) -> str:
    """By the folders: ``opmix`` of one or of ``a/opmix`` and ``b/opmix``, of ``opmix-seed0`` and
    ``opmix-seed1``, and of ``opmix/0`` and ``opmix/1``."""
    paths = [course.path.resolve() for course in members]
    names = {path.name for path in paths}
    if len(names) > 1:
        names = {_SEED_AT_END.sub("", name) for name in names}
    if all(_SEED_AT_END.sub("", name) == "" for name in names):
        names = {path.parent.name for path in paths}
    return names.pop() if len(names) == 1 else paths[0].name
