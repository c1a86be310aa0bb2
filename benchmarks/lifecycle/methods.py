"""What is compared: each method is a few changes to the stages of one lifecycle."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opmix_dist.config import RunConfig
from opmix_dist.errors import UserError
from opmix_dist.lifecycle.config import StageKeys
from opmix_dist.settings import merged_settings

Settings = dict[str, Any]
MOST_TOKENS = 64
"""Of a reply to a task, and of those that are learnt from: the built-in chats' longest have 53."""


@dataclass(frozen=True)
class Method:
    """Changes to the settings of stages; those of ``last`` come on top of ``later``."""

    what: str
    first: Settings = field(default_factory=dict)
    later: Settings = field(default_factory=dict)
    last: Settings = field(default_factory=dict)
    fresh: bool = False
    """Each stage begins anew, on all domains so far and with the budgets of all stages so far."""
    teacher: str | None = None
    """Method whose model at the end, of the same seed, is ``method.distill.teacher`` of the last stage."""


def _static(initial: str | Mapping[str, float], **sections: Settings) -> Settings:
    return {"mixture": {"policy": "static", "initial": initial}, **sections}


def _naive(**sections: Settings) -> Settings:
    """New domains only."""
    return _static({"new": 1.0}, **sections)


def _method(name: str) -> Settings:
    return {"method": {"name": name}}


def _on_policy(name: str) -> Settings:
    """All replies of a step at once, since small batches cost about as much as one large one here."""
    own = {"max_new_tokens": MOST_TOKENS, "generation_batch_size": 128}
    return {"method": {"name": name, name: own}}


UNIFORM = _static("uniform")
NORM: Settings = {"search": {"candidates": {"interpolation": "norm"}}}
METHODS: dict[str, Method] = {
    "retrain": Method("from scratch at each stage, all domains so far alike", UNIFORM, UNIFORM, fresh=True),
    "opmix": Method("a search in each stage, as the configuration has it"),
    "opmix_norm": Method("the same with search.candidates.interpolation norm", NORM, NORM),
    "naive": Method("new domains only, one stage after the other", UNIFORM, _naive()),
    "replay": Method("10% old domains, 90% new ones", UNIFORM, _static({"old": 0.1, "new": 0.9})),
    "uniform": Method("all domains so far alike", UNIFORM, UNIFORM),
    "natural": Method("in proportion to samples", _static("natural"), _static("natural")),
    "ewc": Method("naive with elastic weight consolidation", UNIFORM, _naive(**_method("ewc"))),
    "mas": Method("naive with memory aware synapses", UNIFORM, _naive(**_method("mas"))),
    "gem": Method("naive with gradient episodic memory", UNIFORM, _naive(**_method("gem"))),
    "o_lora": Method(
        "naive with orthogonal adapters in later stages",
        UNIFORM,
        _naive(model={"lora": {}}, start={"optimizer": "fresh"}, **_method("o_lora")),
    ),
    "sdft": Method("naive, its last stage by self-distillation", UNIFORM, _naive(), _on_policy("sdft")),
    "distill": Method(
        "naive, its last stage distilled on-policy from the end of naive",
        UNIFORM,
        _naive(),
        _on_policy("distill"),
        teacher="naive",
    ),
}


def described(
    base: Mapping[str, Any],
    method: Method,
    *,
    run_dir: Path,
    seed: int,
    steps: Sequence[int],
    teacher: Path | None = None,
) -> Settings:
    """A lifecycle for ``opmix lifecycle``.

    Args:
        base: the configuration that is varied, as its YAML has it.
        steps: of each stage of ``base``.
        teacher: folder of the teacher's model, for a method that has one.
    """
    found = copy.deepcopy(dict(base)) | {"run_dir": str(run_dir), "seed": seed}
    stages = found["stages"]
    last = len(stages) - 1
    for i, stage in enumerate(stages):
        changes = [method.first if i == 0 else method.later, *([method.last] if i == last else [])]
        if i == last and teacher is not None:
            changes.append({"method": {"distill": {"teacher": str(teacher)}}})
        if method.fresh:
            changes.append(_from_scratch(base["stages"], i, steps))
            stage.pop("tokens", None)
            stage["fresh"] = i > 0
        keys = {name: value for name, value in stage.items() if name in StageKeys.model_fields}
        own = {name: value for name, value in stage.items() if name not in keys}
        for change in changes:
            own = merged_settings(RunConfig, own, change)
        stages[i] = {**keys, **own}
    return found


def _from_scratch(stages: Sequence[Mapping[str, Any]], i: int, steps: Sequence[int]) -> Settings:
    """Of stage i: as many steps as all up to it, the first stage's warm-up and the last one's decay, and
    nothing that needs a model to go on from."""
    schedule = {**stages[0].get("schedule", {}), **_decay(stages[-1].get("schedule", {}))}
    return {
        "train": {"steps": sum(steps[: i + 1])},
        "start": {"optimizer": "fresh"},
        "schedule": {"warmup_from": 0.0, **schedule},
        "data": {"replay_samples": None},
        "search": {"start_fraction": RunConfig.model_fields["search"].default.start_fraction},
    }


def _decay(schedule: Mapping[str, Any]) -> Settings:
    names = ("name", "decay_fraction", "min_lr_ratio")
    default = RunConfig.model_fields["schedule"].default
    return {name: schedule.get(name, getattr(default, name)) for name in names}


def chosen(names: Sequence[str] | None) -> dict[str, Method]:
    """Methods by name in the order of METHODS, with those that others have their teachers from.

    Raises:
        UserError: there is no such method.
    """
    if names is None:
        return dict(METHODS)
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: there is no {name}, only {', '.join(METHODS)}")
    wanted = {*names, *(t for t in (METHODS[name].teacher for name in names) if t)}
    return {name: method for name, method in METHODS.items() if name in wanted}
