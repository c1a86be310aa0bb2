"""Where a run is: what its folder says, and what SLURM says, which may be nothing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opmix_dist.errors import UserError
from opmix_dist.exchange.lifecycles import has_ended, is_lifecycle, runs_in, stopped_in
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch import slurm
from opmix_dist.launch.records import Launch, LaunchDir
from opmix_dist.launch.slurm import JobPhase, JobState, NoAnswerError


@dataclass
class RunStatus:
    """``no_answer`` says why SLURM could not be asked; then ``job`` is None and nothing is known of it."""

    run: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    """What and how it is, for people."""
    has_ended: bool = False
    was_stopped: bool = False
    is_active: bool | None = None
    """Whether something works on it now; None: not known."""
    no_answer: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """For programs."""

    @property
    def failed(self) -> bool:
        """Nothing works on it, and it neither ended nor was it asked to stop."""
        return self.is_active is False and not (self.has_ended or self.was_stopped)


def look(run: RunDir) -> RunStatus:
    """Reads a few small files and the metrics, and asks SLURM once.

    Args:
        run: the folder of a run, or of a lifecycle.

    Raises:
        UserError: the folder is neither of them nor a launch's, or a file in it is not what it should be.
    """
    launched, has_stages = LaunchDir(run), is_lifecycle(run.path)
    if not (run.config_file.exists() or launched.file.exists() or has_stages):
        raise UserError(f"{run.path} is no run directory: it has neither config.yaml nor launch/launch.json")
    status = RunStatus(str(run.path))
    _look_at_launch(status, launched)
    if has_stages:
        _look_at_stages(status, run.path)
    elif run.config_file.exists():
        _look_at_training(status, run, "training")
    else:
        status.lines.append(("training", "not begun"))
    _look_at_end(status, run, launched, has_stages)
    return status


def _look_at_launch(status: RunStatus, launched: LaunchDir) -> None:
    if not launched.file.exists():
        status.lines.append(("job", "not started by `opmix launch`"))
        return
    launch = launched.read()
    if launch.submissions:
        try:
            state = slurm.job_state(launch.submissions[-1].job)
        except NoAnswerError as error:
            status.no_answer = str(error)
            asked = f"{launch.submissions[-1].job}: could not ask SLURM ({error}); its state is not known"
            status.lines.append(("job", asked))
        else:
            status.is_active = state.phase.is_active
            status.lines.append(("job", state.text))
            status.facts["job"] = {**vars(state), "phase": str(state.phase)}
    elif launch.local is not None:
        status.is_active = lives(launch)
        words = {True: "running", False: "ended", None: "not known from this machine"}[status.is_active]
        local = launch.local
        status.lines.append(("job", f"{local.ranks} rank(s), process {local.pid} on {local.host}: {words}"))


def lives(launch: Launch) -> bool | None:
    """Whether a launch without a scheduler goes on; None on another machine than its own."""
    local = launch.local
    if local is None or local.host != os.uname().nodename:
        return None
    try:
        return b"opmix" in Path(f"/proc/{local.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _look_at_stages(status: RunStatus, folder: Path) -> None:
    """The facts of a stage are those of the last one that has begun and not ended."""
    found = {}
    for stage in runs_in(folder):
        name, label = stage.path.name, f"stage {stage.path.name}"
        if stage.summary_file.exists():
            found[name] = "ended"
            status.lines.append((label, f"ended: {stage.summary().steps} steps"))
        elif stage.config_file.exists():
            found[name] = "begun"
            status.facts["stage"] = name
            _look_at_training(status, stage, label)
        else:
            found[name] = "waiting"
            status.lines.append((label, "waiting"))
    status.facts["stages"] = found


def _look_at_training(status: RunStatus, run: RunDir, label: str) -> None:
    steps = run.config().train.steps
    lines = run.train_lines()
    if lines:
        last = lines[-1]
        status.facts |= {"step": last.step, "steps": steps, "loss": last.loss}
        status.lines.append(
            (
                label,
                f"step {last.step}/{steps}, loss {last.loss:.4f}, {last.tokens_per_second:,.0f} tokens/s, "
                f"{_ago(run.train_file)}",
            )
        )
    else:
        status.lines.append((label, f"step 0/{steps}"))
    for search in run.search_dirs():
        at = search.status()
        told = (
            "requested" if at is None else f"{at.stage} {at.done}/{at.total}" if at.total else str(at.stage)
        )
        sign = _ago(search.status_file) if at else _ago(search.request_file)
        status.lines.append((f"search {search.name}", f"{told}{_reason(at.reason if at else '')}, {sign}"))
    kept = run.complete_checkpoints()
    if kept:
        status.facts["checkpoint"] = kept[-1]
        status.lines.append(("checkpoint", f"step {kept[-1]}, {_ago(run.checkpoint(kept[-1]))}"))


def _reason(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _look_at_end(status: RunStatus, run: RunDir, launched: LaunchDir, has_stages: bool) -> None:
    stopped = stopped_in(run.path)
    status.has_ended, status.was_stopped = has_ended(run.path), stopped is not None
    status.facts |= {"ended": status.has_ended, "stopped": status.was_stopped, "active": status.is_active}
    if stopped is not None:
        status.lines.append(("stopped", f"{stopped.text} ({stopped.at})"))
    if status.has_ended:
        status.lines.append(("ended", "all stages" if has_stages else f"{run.summary().steps} steps"))
    elif launched.cancelled_file.exists():
        status.lines.append(("cancelled", "`opmix resume` goes on"))


def _ago(path: Path) -> str:
    """By the file system's clock of the file and this machine's, which may differ by some seconds."""
    seconds = max(0.0, time.time() - path.stat().st_mtime)
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"


def require_idle(run: RunDir, launch: Launch) -> None:
    """UserError when the job of ``launch`` waits or runs; NoAnswerError when that cannot be known."""
    if launch.submissions:
        state: JobState = slurm.job_state(launch.submissions[-1].job)
        if state.phase.is_active:
            raise UserError(
                f"job {state.job} {'waits' if state.phase is JobPhase.WAITING else 'runs'} for {run.path} "
                f"already ({state.text}): `opmix cancel {run.path}` first"
            )
    elif lives(launch):
        raise UserError(
            f"{run.path} is in use by process {launch.local.pid if launch.local else ''}: stop it"
        )
