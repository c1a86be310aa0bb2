"""``opmix lifecycle``: stages in one YAML, and the run that each of them is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from opmix_dist.config import DataConfig, RunConfig, check_config
from opmix_dist.data.build import open_data
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.errors import UserError
from opmix_dist.exchange.lifecycles import STAGES
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import Name
from opmix_dist.settings import (
    Section,
    check_settings,
    merged_settings,
    parse_overrides,
    read_settings,
    set_dotted,
)

NEW_WEIGHTS = ("checkpoint", "config")
MANAGED = {
    "run_dir": "each stage has its folder in that of the lifecycle",
    "seed": "the lifecycle's holds for all stages",
    "data.domains": "joins and leaves decide it",
    "data.watch": "the domains of all other stages are watched",
    "start.run": "a stage goes on from the one before it",
}
"""Settings of a stage that follow from the lifecycle, and from what."""


class LifecycleConfig(Section):
    """What the YAML holds. A stage's settings stand beside its own keys."""

    run_dir: str = Field(description="folder of the lifecycle; its stages are in RUN_DIR/stages")
    seed: int = Field(0, ge=0, description="of all stages")
    all: dict[str, Any] = Field(
        default_factory=dict, description="settings of a run that hold for every stage"
    )
    stages: list[dict[str, Any]] = Field(
        min_length=1,
        max_length=1000,
        description="name, joins, leaves, tokens, fresh; and settings of a run, before those of `all`",
    )


class StageKeys(Section):
    """What a stage has besides the settings of a run."""

    name: Name = Field(description="of its folder")
    joins: list[str] = Field(default_factory=list, description="domains that are trained on from here on")
    leaves: list[str] = Field(default_factory=list, description="domains that are not any more")
    tokens: int | None = Field(
        None, ge=1, description="budget, in place of train.steps; rounded up to a step"
    )
    fresh: bool = Field(
        False,
        description="start from fresh weights without a history, as retraining does, not from the last stage",
    )


@dataclass(frozen=True)
class Stage:
    """A run of the lifecycle, ready to start once those before it have ended."""

    name: str
    config: RunConfig
    joins: tuple[str, ...]

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.run_dir)

    @property
    def has_ended(self) -> bool:
        return self.run.summary_file.exists()


def load_lifecycle(path: str | Path, overrides: Sequence[str] = ()) -> LifecycleConfig:
    """Read a YAML file with dotted overrides: ``--run_dir X``, ``--all.train.steps 10`` or, of one stage,
    ``--stages.NAME.train.steps 10``.

    Raises:
        UserError: naming the file, the key or the stage.
    """
    data = read_settings(path)
    for key, value in parse_overrides(overrides):
        first, _, rest = key.partition(".")
        if first != STAGES or not rest:
            set_dotted(data, key, value)
            continue
        name, _, setting = rest.partition(".")
        stages = data.get(STAGES)
        found = [one for one in stages if _is_named(one, name)] if isinstance(stages, list) else []
        if not found or not setting:
            raise UserError(f"--{key}: there is no stage `{name}`, or no setting of it is named")
        set_dotted(found[0], setting, value)
    return check_settings(LifecycleConfig, data)


def _is_named(stage: object, name: str) -> bool:
    return isinstance(stage, dict) and stage.get("name") == name


def resolve(config: LifecycleConfig) -> list[Stage]:
    """Every stage's whole configuration, before any of them has begun.

    Raises:
        UserError: naming the stage and the setting or domain.
    """
    keys = [_keys_of(entry, number) for number, entry in enumerate(config.stages, 1)]
    names = [key.name for key in keys]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two stages are named `{repeated[0]}`: each needs a folder of its own")
    domains = _domains_by_stage(keys)
    everything = list(dict.fromkeys(name for key in keys for name in key.joins))
    catalogue = _catalogue(config, everything)
    stages: list[Stage] = []
    for key, entry, trained in zip(keys, config.stages, domains, strict=True):
        try:
            settings = _settings_of(config, entry, stages, key)
            settings["data"] |= {
                "domains": trained,
                "watch": [name for name in everything if name not in trained],
            }
            if key.tokens is not None:
                _set_steps(settings, key.tokens, catalogue.sequence_length)
            stages.append(Stage(key.name, check_config(settings), tuple(key.joins)))
        except UserError as error:
            raise UserError(f"stage {key.name}: {error}") from None
    return stages


def _keys_of(entry: Mapping[str, Any], number: int) -> StageKeys:
    own = {name: value for name, value in entry.items() if name in StageKeys.model_fields}
    name = own.get("name")
    try:
        return check_settings(StageKeys, own)
    except UserError as error:
        raise UserError(f"stage {name if isinstance(name, str) else number}: {error}") from None


def _domains_by_stage(keys: Sequence[StageKeys]) -> list[list[str]]:
    """What each stage trains on, in the order in which domains have joined."""
    present: list[str] = []
    found = []
    for key in keys:
        for name in key.leaves:
            if name not in present:
                raise UserError(f"stage {key.name}: `{name}` cannot leave, it is not there")
            present.remove(name)
        for name in key.joins:
            if name in present:
                raise UserError(f"stage {key.name}: `{name}` joins, and is there already")
            present.append(name)
        if not present:
            raise UserError(f"stage {key.name} has no domain to train on: give it some with joins")
        found.append([*present])
    return found


def _catalogue(config: LifecycleConfig, domains: Sequence[str]) -> Catalogue:
    """Of all domains of the lifecycle, to know early whether they are there."""
    return open_data(check_settings(DataConfig, _section(config.all, "data", "all.")), domains)


def _settings_of(
    config: LifecycleConfig, entry: Mapping[str, Any], before: Sequence[Stage], key: StageKeys
) -> dict[str, Any]:
    """Those of ``all``, those of the stage, and those that follow from its place."""
    own = {name: value for name, value in entry.items() if name not in StageKeys.model_fields}
    goes_on = bool(before) and not key.fresh
    for where, given in (("all", config.all), (f"stages.{key.name}", own)):
        for setting, reason in MANAGED.items():
            if _has(given, setting) and (setting != "start.run" or before):
                raise UserError(f"{where}.{setting} cannot be set: {reason}")
    settings = merged_settings(RunConfig, config.all, own)
    settings |= {"run_dir": str(Path(config.run_dir) / STAGES / key.name), "seed": config.seed}
    settings["train"] = {"eval_at_start": True, **_section(settings, "train")}
    settings["data"] = _section(settings, "data")
    if not goes_on:
        return settings
    # absolute, so that it is the same setting for a launch that starts in another folder
    last = os.path.abspath(before[-1].run.path)
    settings["start"] = {**_section(settings, "start"), "run": last}
    for name in NEW_WEIGHTS:
        if _has(own, f"model.{name}"):
            raise UserError(f"model.{name} is for the first stage, and for those that are fresh")
    model = _section(settings, "model")
    settings["model"] = {name: value for name, value in model.items() if name not in NEW_WEIGHTS}
    return settings


def _section(settings: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    found = settings.get(name, {})
    if not isinstance(found, Mapping):
        raise UserError(f"{where}{name} must hold settings, not {type(found).__name__}")
    return dict(found)


def _has(settings: Mapping[str, Any], dotted: str) -> bool:
    value: Any = settings
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _set_steps(settings: dict[str, Any], tokens: int, sequence_length: int) -> None:
    """``train.steps`` that read ``tokens`` at least."""
    train = settings["train"]
    if "steps" in train:
        raise UserError("give tokens or train.steps, not both")
    samples = train.get("global_batch_size")
    if not isinstance(samples, int) or samples < 1:
        raise UserError("tokens needs train.global_batch_size, a number of samples")
    train["steps"] = math.ceil(tokens / (samples * sequence_length))
