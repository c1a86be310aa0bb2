"""What RUN/launch holds: how the run was started, so that it can be watched, cancelled and started again."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.lifecycles import is_lifecycle
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.exchange.schemas import Record

JobId = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,11}(_[0-9]{1,7})?$")]


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(f"must be one line, got {text!r}")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


class SlurmOptions(Record):
    """What a job script is made of, besides the configuration. None leaves the cluster's default."""

    nodes: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})?$")]
    """Nodes that train: ``4``, or ``2-4`` for as many of them as there are."""
    gpus_per_node: int = Field(0, ge=0)
    ranks_per_node: int = Field(ge=1)
    pool_nodes: int = Field(0, ge=0)
    """Nodes of a second component of the job that searches; 0: ``pool.ranks`` of the ranks search."""
    pool_gpus_per_node: int = Field(0, ge=0)
    pool_ranks_per_node: int = Field(1, ge=1)
    pool_partition: Line | None = None
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Line | None = None
    mem: Line | None = None
    cpus_per_task: int | None = Field(None, ge=1)
    job_name: Line | None = None
    grace_s: int = Field(120, ge=10)
    """Seconds before the end of the allocation in which the ranks save and stop."""
    retries: int = Field(2, ge=0)
    """Failures in a row without a new checkpoint after which the job is tried again."""
    max_requeues: int = Field(100, ge=0)
    array_limit: int | None = Field(None, ge=1)
    """Tasks of an array that run at once."""
    setup: list[Line] = Field(default_factory=list)
    """Lines of shell before anything runs: modules, environments, NCCL's settings."""
    sbatch: list[Line] = Field(default_factory=list)
    """Further options of sbatch, for each component."""
    srun: list[Line] = Field(default_factory=list)
    """Further options of srun, such as a container's."""
    python: Line
    """The interpreter that has opmix_dist, as the nodes see it."""

    @property
    def node_counts(self) -> range:
        least, _, most = self.nodes.partition("-")
        return range(int(least), int(most or least) + 1)


class Submission(Record):
    job: JobId
    at: str
    """UTC, ISO 8601."""
    nodes: str


class LocalProcess(Record):
    """A launch without a scheduler."""

    host: str
    pid: int = Field(ge=1)
    ranks: int = Field(ge=1)
    at: str


class Launch(Record):
    """launch.json of a run, of a lifecycle, or of the folder of an array."""

    cwd: Line
    options: SlurmOptions | None = None
    submissions: list[Submission] = Field(default_factory=list)
    local: LocalProcess | None = None
    runs: list[Line] = Field(default_factory=list)
    """Folders of the tasks of an array, in order; empty in that of a run or a lifecycle."""


class Cancelled(Record):
    """cancelled.json: the next end of an attempt is the last one."""

    at: str


class LaunchDir:
    """RUN/launch."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.launch
        self.file = self.path / "launch.json"
        self.config_file = self.path / "config.yaml"
        self.script = self.path / "job.sh"
        self.cancelled_file = self.path / "cancelled.json"
        self.failures_file = self.path / "failures"

    def read(self) -> Launch:
        """UserError when nothing of ours started the run, or a lifecycle that it is a stage of."""
        if not self.file.exists():
            missing = f"there is no {self.file}{self._whole()}"
            raise UserError(f"{self.path.parent} was not started by `opmix launch`: {missing}")
        return read_record(self.file, Launch)

    def _whole(self) -> str:
        """What to name in place of a stage."""
        above = self.path.absolute().parent.parent.parent
        return f"; it is a stage, name {above}" if is_lifecycle(above) else ""

    def read_own(self) -> Launch:
        """As :meth:`read`, of what will be run again: nobody else may say what this user runs.

        Raises:
            UserError: the file belongs to another user.
        """
        launch = self.read()
        if self.file.stat().st_uid != os.getuid():
            raise UserError(f"{self.file} belongs to another user: start the run anew with `opmix launch`")
        return launch

    def write(self, launch: Launch) -> None:
        write_record(self.file, launch)

    def cancel(self) -> None:
        write_record(self.cancelled_file, Cancelled(at=now()))

    def begin_anew(self) -> None:
        """Forget a cancellation and the failures of earlier attempts."""
        self.cancelled_file.unlink(missing_ok=True)
        self.failures_file.unlink(missing_ok=True)

    def write_text(self, path: Path, text: str) -> None:
        files.write_bytes(path, text.encode())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
