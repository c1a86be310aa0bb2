"""What a launch carries out: a run, or the stages of a lifecycle one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opmix_dist.config import RunConfig, check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.lifecycles import LIFECYCLE_FILE, STAGES
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch.records import LaunchDir
from opmix_dist.settings import read_settings, to_yaml
from opmix_dist.train.ranks import check_ranks

if TYPE_CHECKING:
    from opmix_dist.lifecycle.config import LifecycleConfig

Place = Callable[[str], str]
"""From the ``run_dir`` of a configuration to the folder, absolute, that is to be taken."""


@dataclass(frozen=True)
class Work:
    """``runs``: what is trained, in its order: the run itself, or that of each stage."""

    config: RunConfig | LifecycleConfig
    runs: tuple[RunConfig, ...]
    stages: tuple[str, ...] = ()
    """Names of a lifecycle's; none of a run."""

    @property
    def command(self) -> str:
        """Of ``opmix``, on every rank; it takes the configuration's file."""
        return "lifecycle" if self.stages else "train"

    @property
    def folder(self) -> RunDir:
        return RunDir(self.config.run_dir)

    def check_allocation(self, nodes: range, ranks_per_node: int) -> None:
        """UserError when one of these numbers of nodes cannot train a run that has not ended; names it."""
        if not self.stages:
            return check_allocation(self.runs[0], nodes, ranks_per_node)
        for name, config in zip(self.stages, self.runs, strict=True):
            if RunDir(config.run_dir).summary_file.exists():
                continue
            try:
                check_allocation(config, nodes, ranks_per_node)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None

    def write(self) -> None:
        """What the ranks read, and which stages there will be, for those who look before the first begins."""
        launched, text = LaunchDir(self.folder), to_yaml(self.config)
        launched.write_text(launched.config_file, text)
        if self.stages:
            files.write_bytes(self.folder.path / LIFECYCLE_FILE, text.encode())


def load_work(
    path: Path,
    overrides: Sequence[str],
    *,
    external_pool: bool | None = None,
    place: Place = os.path.abspath,
) -> Work:
    """From the YAML of a run, or of a lifecycle, which has ``stages``.

    Args:
        external_pool: whether the launch starts the pool as a world of its own; None leaves the setting.
        place: a job may start in another folder than this process.

    Raises:
        UserError: as of ``check_config`` and ``resolve``; the pool is to be in two places; or a stage has
            ended with other settings.
    """
    data = read_settings(path)
    work = (
        _lifecycle(path, overrides, place) if STAGES in data else _run(path, overrides, external_pool, place)
    )
    if work.stages and external_pool:
        raise UserError(
            "--pool-nodes is for single runs: the pool of a lifecycle is the last pool.ranks of its ranks"
        )
    if external_pool is False and any(config.pool.external for config in work.runs):
        nodes = "" if work.stages else "give it --pool-nodes, or "
        raise UserError(
            f"pool.external is set, but nothing would start the pool: {nodes}set pool.ranks and leave "
            "pool.external out"
        )
    return work


def _run(path: Path, overrides: Sequence[str], external_pool: bool | None, place: Place) -> Work:
    wanted = list(overrides)
    if external_pool:
        wanted += ["--pool.external", "true", "--pool.ranks", "0"]
    config = check_config(read_settings(path, wanted))
    config = config.model_copy(update={"run_dir": place(config.run_dir)})
    return Work(config, (config,))


def _lifecycle(path: Path, overrides: Sequence[str], place: Place) -> Work:
    # two seconds of imports, which the launch of a run does without
    from opmix_dist.lifecycle.config import load_lifecycle, resolve
    from opmix_dist.lifecycle.running import require_same_stages

    config = load_lifecycle(path, overrides)
    config = config.model_copy(update={"run_dir": place(config.run_dir)})
    stages = resolve(config)
    require_same_stages(stages)
    return Work(config, tuple(stage.config for stage in stages), tuple(stage.name for stage in stages))


def check_allocation(config: RunConfig, nodes: range, ranks_per_node: int) -> None:
    """UserError when one of these numbers of nodes cannot train ``config``; names it."""
    for count in nodes:
        trainers = count * ranks_per_node - config.pool.ranks
        if trainers < 1:
            raise UserError(
                f"pool.ranks {config.pool.ranks} leaves no trainer of {count} node(s) x {ranks_per_node} "
                "rank(s): start more, or set pool.ranks to 0"
            )
        try:
            check_ranks(config, trainers)
        except UserError as error:
            raise UserError(f"with {count} node(s) of {ranks_per_node} rank(s): {error}") from None
