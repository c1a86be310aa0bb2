"""Asking SLURM. An answer and no answer are different things: a controller that is down, a command that is
missing or that hangs say nothing about a job, and raise :class:`NoAnswerError`."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from opmix_dist.errors import UserError

TIMEOUT_S = 30.0
_NO_ANSWER = re.compile(
    r"unable to contact|connection (refused|timed out)|connect failure|socket timed out|"
    r"zero bytes were transmitted|protocol authentication|configuration source|"
    r"communication (connection|shutdown)|not responding|temporarily unable",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"invalid job id", re.IGNORECASE)
_SUBMITTED = re.compile(r"^([1-9]\d*)(;\S+)?$")


class NoAnswerError(Exception):
    """SLURM could not be asked, so nothing is known. The message says why."""


class JobPhase(StrEnum):
    """Where a job is, in what matters to whoever waits for it."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    FORGOTTEN = "forgotten"
    """SLURM answers that it knows no such job: it ended so long ago that its record was purged."""

    @property
    def is_active(self) -> bool:
        return self in (JobPhase.WAITING, JobPhase.RUNNING)


_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
}


@dataclass(frozen=True)
class JobState:
    """``state`` and ``reason`` in SLURM's words; ``nodes`` in its short form, "" while it has none."""

    job: str
    phase: JobPhase
    state: str = ""
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def text(self) -> str:
        if self.phase is JobPhase.FORGOTTEN:
            return f"{self.job}: SLURM knows no such job any more"
        parts = [f"{self.job} {self.state}"]
        parts += [f"on {self.nodes}"] if self.nodes else []
        parts += [f"({self.reason})"] if self.reason not in ("", "None") else []
        parts += [f"requeued {self.restarts} time(s)"] if self.restarts else []
        return " ".join(parts)


def submit(script: Path) -> str:
    """The id of the new job.

    Raises:
        UserError: SLURM refuses it, in its words.
        NoAnswerError: SLURM could not be asked.
    """
    answer = _ask("sbatch", "--parsable", str(script))
    match = _SUBMITTED.match(answer.strip().splitlines()[-1] if answer.strip() else "")
    if match is None:
        raise NoAnswerError(f"sbatch answered {answer!r}, which names no job: look at `squeue --me`")
    return match[1]


def job_state(job: str) -> JobState:
    """Raises NoAnswerError."""
    try:
        answer = _ask("scontrol", "--oneliner", "show", "job", job)
    except UserError as error:
        if _UNKNOWN_JOB.search(str(error)):
            return JobState(job, JobPhase.FORGOTTEN)
        raise NoAnswerError(str(error)) from None
    if not answer.strip():
        raise NoAnswerError(f"scontrol says nothing about job {job}")
    return parse_job(job, answer.splitlines()[0])  # of a heterogeneous job, the trainers' component


def parse_job(job: str, line: str) -> JobState:
    """From a line of ``scontrol --oneliner show job``. A state that no SLURM has yet counts as ended."""
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
    state = fields.get("JobState", "")
    if not state:
        raise NoAnswerError(f"scontrol says no state of job {job}")
    nodes = fields.get("NodeList", "")
    return JobState(
        job=job,
        phase=_phase(state),
        state=state,
        reason=fields.get("Reason", ""),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(fields.get("Restarts", "0")),
    )


def _phase(state: str) -> JobPhase:
    if state in _WAITING:
        return JobPhase.WAITING
    return JobPhase.RUNNING if state in _RUNNING else JobPhase.ENDED


def ask_to_stop(job: str) -> None:
    """Signal the job's script, which lets the ranks save. Raises UserError or NoAnswerError."""
    _ask("scancel", "--batch", "--signal=USR1", job)


def cancel(job: str) -> None:
    """End the job, waiting or running. Raises UserError or NoAnswerError."""
    _ask("scancel", job)


def _ask(*command: str) -> str:
    """Standard output of a command of SLURM's.

    Raises:
        UserError: its own words, where it answers that it will not.
        NoAnswerError: anything that leaves open what the answer would have been.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        raise NoAnswerError(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{command[0]} gave no answer in {TIMEOUT_S:.0f} s") from None
    words = " ".join(done.stderr.split())
    if done.returncode == 0:
        return done.stdout
    if _NO_ANSWER.search(words) or done.returncode < 0 or not words:
        raise NoAnswerError(f"{command[0]} could not ask: {words or f'exit code {done.returncode}'}")
    raise UserError(words)
