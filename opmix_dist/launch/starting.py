"""From configurations and options to runs that are ready to start, and their start on SLURM."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opmix_dist.config import RunConfig, load_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch import slurm
from opmix_dist.launch.records import Launch, LaunchDir, SlurmOptions, Submission, now
from opmix_dist.launch.script import job_script
from opmix_dist.launch.watching import require_idle
from opmix_dist.settings import to_yaml
from opmix_dist.train.ranks import check_ranks


def load_run(path: Path, overrides: Sequence[str], *, external_pool: bool | None = None) -> RunConfig:
    """The configuration of a run, with its folder absolute, as a job may start elsewhere.

    Args:
        external_pool: whether the launch starts the pool as a world of its own; None leaves the setting.

    Raises:
        UserError: as of ``load_config``; or the pool is to be in two places.
    """
    wanted = list(overrides)
    if external_pool:
        wanted += ["--pool.external", "true", "--pool.ranks", "0"]
    config = load_config(path, wanted)
    if external_pool is False and config.pool.external:
        raise UserError(
            "pool.external is set, but nothing would start the pool: give it --pool-nodes, or set pool.ranks "
            "and leave pool.external out"
        )
    return config.model_copy(update={"run_dir": os.path.abspath(config.run_dir)})


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


@dataclass(frozen=True)
class Sweep:
    """Runs of every configuration with every combination of values, such as sizes x seeds."""

    configs: Sequence[Path]
    vary: Mapping[str, Sequence[str]]
    """Dotted setting to its values."""

    def load(self, overrides: Sequence[str], *, external_pool: bool) -> list[RunConfig]:
        """In a fixed order: values vary fastest. Where settings vary, run directories get folders of their
        names: ``RUN/seed_0``.

        Raises:
            UserError: as of :func:`load_run`; or two runs would share a directory.
        """
        runs = [
            self._one(path, dict(zip(self.vary, values, strict=True)), overrides, external_pool)
            for path, values in itertools.product(self.configs, itertools.product(*self.vary.values()))
        ]
        folders = [run.run_dir for run in runs]
        for folder in folders:
            if folders.count(folder) > 1:
                raise UserError(f"two runs would share {folder}: give the configurations other run_dirs")
        return runs

    def _one(
        self, path: Path, values: Mapping[str, str], overrides: Sequence[str], external_pool: bool
    ) -> RunConfig:
        wanted = [*overrides, *(part for key, value in values.items() for part in (f"--{key}", value))]
        config = load_run(path, wanted, external_pool=external_pool)
        name = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in values.items())
        folder = os.path.join(config.run_dir, name.replace("/", "_")) if name else config.run_dir
        return config.model_copy(update={"run_dir": folder})


def parse_vary(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``["seed=0,1"]`` to ``{"seed": ["0", "1"]}``."""
    found: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(f"--vary {argument}: write dotted.key=value,value")
        found[key] = values.split(",")
    return found


class SlurmStart:
    """Runs that one job script starts: a single run, or the tasks of an array."""

    def __init__(self, options: SlurmOptions, configs: Sequence[RunConfig], cwd: str) -> None:
        """UserError when a run cannot be trained by the allocation."""
        self.options, self.configs, self.cwd = options, configs, cwd
        for config in configs:
            check_allocation(config, options.node_counts, options.ranks_per_node)
        self.runs = [RunDir(config.run_dir) for config in configs]
        if self.is_array and len(self.home.path.parent.parts) < 3:
            raise UserError(
                f"an array's script lies in the folder that its runs share, here {self.home.path.parent}: "
                "give the configurations run_dirs in one folder"
            )

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1

    @property
    def home(self) -> LaunchDir:
        """Where the script lies: the run's folder, or the one that all runs of an array are below."""
        folders = [str(run.path) for run in self.runs]
        return LaunchDir(RunDir(os.path.commonpath(folders) if self.is_array else folders[0]))

    def script(self) -> str:
        paths = [str(run.path) for run in self.runs]
        return job_script(self.options, paths, cwd=self.cwd, folder=str(self.home.path))

    def submit(self) -> str:
        """Write what the job needs, submit it, and record it; the job's id.

        Raises:
            UserError: a job runs or waits for one of the runs, or SLURM refuses this one.
            NoAnswerError: SLURM could not be asked; nothing was recorded.
        """
        for run in self.runs:
            launched = LaunchDir(run)
            if launched.file.exists():
                require_idle(run, launched.read())
        for run, config in zip(self.runs, self.configs, strict=True):
            launched = LaunchDir(run)
            launched.write_text(launched.config_file, to_yaml(config))
            launched.begin_anew()
        self.home.write_text(self.home.script, self.script())
        job = slurm.submit(self.home.script)
        self._record(job)
        return job

    def _record(self, job: str) -> None:
        tasks: Iterator[tuple[LaunchDir, str, list[str]]]
        tasks = ((LaunchDir(run), f"{job}_{task}", []) for task, run in enumerate(self.runs))
        if self.is_array:
            tasks = itertools.chain(tasks, [(self.home, job, [str(run.path) for run in self.runs])])
        else:
            tasks = iter([(self.home, job, [])])
        for launched, name, runs in tasks:
            earlier = launched.read().submissions if launched.file.exists() else []
            submission = Submission(job=name, at=now(), nodes=self.options.nodes)
            launched.write(
                Launch(cwd=self.cwd, options=self.options, submissions=[*earlier, submission], runs=runs)
            )


def resume_on_slurm(run: RunDir, changes: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Submit a run again as it was recorded, but for ``changes`` of its options; the job's id.

    Raises:
        UserError: it is active, was not started here, is an array's folder, or the changes do not fit.
        NoAnswerError: SLURM could not be asked.
    """
    launched = LaunchDir(run)
    launch = launched.read_own()
    assert launch.options is not None
    options = SlurmOptions.model_validate({**launch.options.model_dump(), **changes})
    config = load_run(launched.config_file, overrides, external_pool=bool(options.pool_nodes))
    config = config.model_copy(update={"run_dir": str(run.path.absolute())})
    return SlurmStart(options, [config], launch.cwd).submit()
