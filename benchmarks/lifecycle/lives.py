"""One lifecycle of one method and seed: written, run, scored on its tasks, and not done again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lifecycle.methods import MOST_TOKENS, Method, described
from opmix_dist.data.builtin_chat import RECIPES
from opmix_dist.data.catalogue import TASKS_FILE
from opmix_dist.exchange.lifecycles import stage_folders
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.scores import FILE as SCORES
from opmix_dist.lifecycle.config import LifecycleConfig, Stage, resolve
from opmix_dist.settings import changed_settings, check_settings, to_yaml

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Life:
    """A method with a seed.

    folder: of the lifecycle; its configuration and its log stand beside it.
    """

    name: str
    method: Method
    seed: int
    folder: Path
    settings: Mapping[str, Any]

    @property
    def file(self) -> Path:
        return self.folder.with_suffix(".yaml")

    @property
    def stages(self) -> list[str]:
        return [stage["name"] for stage in self.settings["stages"]]

    @property
    def has_ended(self) -> bool:
        names = self.stages
        return all(RunDir(self.folder / "stages" / name).summary_file.exists() for name in names)


def life(
    base: Mapping[str, Any], steps: Sequence[int], runs: Path, name: str, method: Method, seed: int
) -> Life:
    """The lifecycle in RUNS/NAME/seedSEED."""
    last = base["stages"][-1]["name"]
    teacher = None
    if method.teacher is not None:
        teacher = RunDir(runs / method.teacher / f"seed{seed}" / "stages" / last).export
    folder = runs / name / f"seed{seed}"
    settings = described(base, method, run_dir=folder, seed=seed, steps=steps, teacher=teacher)
    return Life(name, method, seed, folder, settings)


def checked(life: Life) -> LifecycleConfig:
    """Raises UserError where a change of the method does not fit the configuration."""
    return check_settings(LifecycleConfig, life.settings)


def run(life: Life, others: Sequence[Life], tasks: Sequence[Path], most_tasks: int) -> bool:
    """Whether it has come to its end, with its scores. ``opmix lifecycle`` itself passes over stages that
    have ended, and goes on in one that has not.

    Args:
        others: lifecycles whose first stages are taken over where they are the same and have ended.
    """
    life.folder.mkdir(parents=True, exist_ok=True)
    life.file.write_text(yaml.safe_dump(dict(life.settings), sort_keys=False))
    log = life.folder.with_suffix(".log")
    if not life.has_ended:
        take_over(resolve(checked(life)), [resolve(checked(one)) for one in others])
        if not _call(log, "lifecycle", str(life.file)):
            return False
    return all(_score(stage, tasks, most_tasks, log) for stage in _scored_stages(life, tasks))


def take_over(stages: Sequence[Stage], others: Sequence[Sequence[Stage]]) -> None:
    """Copy the first stages from another lifecycle that has ended them with the same settings. A run with
    the same settings and seed ends the same to the last bit, so to train it again would tell nothing."""
    for i, stage in enumerate(stages):
        same = [other[i] for other in others if _begin_alike(stages, other, i + 1) and other[i].has_ended]
        if stage.run.path.exists() or not same:
            return
        part = stage.run.path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(same[0].run.path, part)
        RunDir(part).config_file.write_text(to_yaml(stage.config))
        part.rename(stage.run.path)


def _begin_alike(stages: Sequence[Stage], others: Sequence[Stage], count: int) -> bool:
    """Whether the first ``count`` differ in their folders alone."""
    pairs = list(zip(stages, others, strict=False))[:count]
    return len(pairs) == count and not any(
        changed_settings(one.config, other.config, ("run_dir", "start.run")) for one, other in pairs
    )


def _scored_stages(life: Life, tasks: Sequence[Path]) -> list[Path]:
    """Those after which tasks have joined, and the one before: what is learnt shows against it."""
    names = {path.name for path in tasks}
    joins = [bool(names & {*stage.get("joins", ())}) for stage in life.settings["stages"]]
    if not any(joins):
        return []
    return stage_folders(life.folder)[max(joins.index(True) - 1, 0) :]


def _score(stage: Path, tasks: Sequence[Path], most: int, log: Path) -> bool:
    if (stage / SCORES).exists():
        return True
    options = ["--limit", str(most), "--max-new-tokens", str(MOST_TOKENS), "--json"]
    command = ["score", str(RunDir(stage).export), "--tasks", *map(str, tasks), *options]
    part = stage / f"{SCORES}.part"
    with open(part, "wb") as output:
        done = _call(log, *command, output=output)
    if done:
        part.rename(stage / SCORES)
    return done


def _call(log: Path, *arguments: str, output: Any = None) -> bool:
    """One ``opmix`` command on one thread; whether it ended well. What it says goes to the log."""
    command = [sys.executable, "-m", "opmix_dist.cli", *arguments]
    with open(log, "ab") as messages:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, stdout=output or messages, stderr=messages, cwd=ROOT, env=environment, check=False
        )
    return done.returncode == 0


def prepare(base: Mapping[str, Any], log: Path) -> Path:
    """The data of the configuration, prepared if they are not there: its domains are built-in ones.

    Returns:
        Their folder.
    """
    root = ROOT / base["all"]["data"]["root"]
    if root.is_dir():
        return root
    joining = [name for stage in base["stages"] for name in stage.get("joins", ())]
    chats = [word for name in RECIPES if name in joining for word in ("--builtin-chat", name)]
    options = ["--eval-fraction", "0.1", "--vocab-size", "2048", "--out", str(root)]
    print(f"preparing {root}", flush=True)
    if not _call(log, "prepare", "--builtin", *chats, *options):
        raise SystemExit(f"the data could not be prepared: see {log}")
    return root


def tasks_of(base: Mapping[str, Any], root: Path) -> list[Path]:
    """Folders of the domains that have tasks, in the order in which they join."""
    joining = [name for stage in base["stages"] for name in stage.get("joins", ())]
    return [root / name for name in dict.fromkeys(joining) if (root / name / TASKS_FILE).exists()]
