"""From configurations and options to runs that are ready to start, and their start on SLURM."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch import slurm
from opmix_dist.launch.records import Launch, LaunchDir, SlurmOptions, Submission, now
from opmix_dist.launch.script import job_script
from opmix_dist.launch.watching import require_idle
from opmix_dist.launch.work import Work, load_work


@dataclass(frozen=True)
class Sweep:
    """Runs, or lifecycles, of every configuration with every combination of values, such as sizes x seeds."""

    configs: Sequence[Path]
    vary: Mapping[str, Sequence[str]]
    """Dotted setting to its values."""

    def load(self, overrides: Sequence[str], *, external_pool: bool) -> list[Work]:
        """In a fixed order: values vary fastest. Where settings vary, run directories get folders of their
        names: ``RUN/seed_0``.

        Raises:
            UserError: as of :func:`load_work`; or two runs would share a directory.
        """
        works = [
            self._one(path, dict(zip(self.vary, values, strict=True)), overrides, external_pool)
            for path, values in itertools.product(self.configs, itertools.product(*self.vary.values()))
        ]
        folders = [work.config.run_dir for work in works]
        for folder in folders:
            if folders.count(folder) > 1:
                raise UserError(f"two runs would share {folder}: give the configurations other run_dirs")
        return works

    def _one(
        self, path: Path, values: Mapping[str, str], overrides: Sequence[str], external_pool: bool
    ) -> Work:
        wanted = [*overrides, *(part for key, value in values.items() for part in (f"--{key}", value))]
        name = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in values.items())

        def place(folder: str) -> str:
            return (
                os.path.join(os.path.abspath(folder), name.replace("/", "_"))
                if name
                else os.path.abspath(folder)
            )

        return load_work(path, wanted, external_pool=external_pool, place=place)


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
    """What one job script starts: a run or a lifecycle, or the tasks of an array."""

    def __init__(self, options: SlurmOptions, works: Sequence[Work], cwd: str) -> None:
        """UserError when the allocation cannot train a run, or one script cannot start all of them."""
        self.options, self.works, self.cwd = options, works, cwd
        self.stages = works[0].stages
        for work in works:
            work.check_allocation(options.node_counts, options.ranks_per_node)
            if work.stages != self.stages:
                raise UserError(
                    f"{work.folder.path} has other stages than {works[0].folder.path}: an array is of runs, "
                    "or of lifecycles whose stages have the same names"
                )
        self.runs = [work.folder for work in works]
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
        return job_script(self.options, paths, self.stages, cwd=self.cwd, folder=str(self.home.path))

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
        for work in self.works:
            work.write()
            LaunchDir(work.folder).begin_anew()
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
    work = load_work(
        launched.config_file,
        overrides,
        external_pool=bool(options.pool_nodes),
        place=lambda _: os.path.abspath(run.path),
    )
    return SlurmStart(options, [work], launch.cwd).submit()
