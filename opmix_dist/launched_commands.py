"""``opmix status``, ``cancel`` and ``resume``: of what ``opmix launch`` has started."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError
from opmix_dist.launch_command import NO_ANSWER, add_allocation, asking, run_and_record, slurm_options
from opmix_dist.telling import tell

if TYPE_CHECKING:
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.launch.records import LaunchDir

FAILED = 1


def add_launched_commands(commands: Any) -> None:
    """Add what watches, stops and resumes runs to the subcommands of ``opmix``."""
    status = commands.add_parser(
        "status",
        help="where runs are, by their folders and by SLURM",
        description=f"Ends with status {FAILED} when a run failed, and {NO_ANSWER} when SLURM could not be "
        "asked, which says nothing about the run.",
    )
    status.add_argument("run_dirs", nargs="+", type=Path, help="folders of runs, lifecycles or arrays")
    status.add_argument("--json", action="store_true", help="a line of JSON for each")
    status.set_defaults(run=asking(_status))

    cancel = commands.add_parser(
        "cancel", help="let a run save and stop, or take it from the queue", description="It can be resumed."
    )
    cancel.add_argument("run_dir", type=Path)
    cancel.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    cancel.set_defaults(run=asking(_cancel))

    resume = commands.add_parser(
        "resume",
        help="start a run again as it was started; settings that may change as --dotted.key value",
    )
    resume.add_argument("run_dir", type=Path)
    add_allocation(resume, again=True)
    resume.add_argument("--ranks", type=int, help="of a run on this machine")
    resume.set_defaults(run=asking(_resume))


def _status(arguments: argparse.Namespace, rest: list[str]) -> int:
    import json

    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.launch.records import LaunchDir
    from opmix_dist.launch.watching import look

    runs: list[RunDir] = []
    for path in arguments.run_dirs:
        launched = LaunchDir(RunDir(path))
        tasks = launched.read().runs if launched.file.exists() else []
        runs += [RunDir(task) for task in tasks] or [RunDir(path)]
    found = [look(run) for run in runs]
    for status in found:
        if arguments.json:
            print(json.dumps({"run": status.run, "no_answer": status.no_answer, **status.facts}))
            continue
        tell(status.run)
        width = max(12, *(len(what) + 1 for what, _ in status.lines))
        for what, how in status.lines:
            tell(f"  {what:<{width}}{how}")
    if any(status.no_answer for status in found):
        return NO_ANSWER
    return FAILED if any(status.failed for status in found) else 0


def _cancel(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.launch import slurm
    from opmix_dist.launch.records import LaunchDir
    from opmix_dist.launch.slurm import JobPhase

    run = RunDir(arguments.run_dir)
    launched = LaunchDir(run)
    launch = launched.read()
    if not launch.submissions:
        return _cancel_here(run, now=arguments.now)
    job = launch.submissions[-1].job
    state = slurm.job_state(job)
    if not state.phase.is_active:
        tell(f"nothing to cancel: {state.text}")
        return 0
    for place in [launched, *(LaunchDir(RunDir(task)) for task in launch.runs)]:
        place.cancel()  # before SLURM acts: the job's script reads it when it decides about a requeue
    if state.phase is JobPhase.RUNNING and not arguments.now and not launch.runs:
        slurm.ask_to_stop(job)
        tell(f"job {job} saves and stops; `opmix status {run.path}` tells when it has")
    else:
        slurm.cancel(job)
        print(f"job {job} is cancelled")
    return 0


def _cancel_here(run: RunDir, *, now: bool) -> int:
    from opmix_dist.launch.records import LaunchDir
    from opmix_dist.launch.watching import lives

    launch = LaunchDir(run).read()
    alive = lives(launch)
    if launch.local is None or alive is None:
        raise UserError(f"{run.path} was started on another machine: cancel it there")
    if not alive:
        print("nothing to cancel: its process has ended")
        return 0
    os.kill(launch.local.pid, signal.SIGQUIT if now else signal.SIGTERM)
    print(f"process {launch.local.pid} {'ends' if now else 'saves and stops'}")
    return 0


def _resume(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.exchange.lifecycles import has_ended
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.launch.records import LaunchDir
    from opmix_dist.launch.starting import resume_on_slurm
    from opmix_dist.launch.work import load_work

    run = RunDir(arguments.run_dir.absolute())
    if has_ended(run.path):
        raise UserError(f"{run.path} has ended: there is nothing to resume")
    launched = LaunchDir(run)
    launch = launched.read_own()
    if launch.runs:
        raise UserError(f"{run.path} is an array of runs: resume those of {launch.runs[0]} ... that want it")
    _enter(launch.cwd, launched)
    if launch.options is not None:
        tell(f"job {resume_on_slurm(run, slurm_options(arguments), rest)}: {run.path}")
        return 0
    assert launch.local is not None
    ranks = arguments.ranks or launch.local.ranks
    work = load_work(launched.config_file, rest, place=lambda _: str(run.path))
    work.check_allocation(range(1, 2), ranks)
    return run_and_record(work, ranks)


def _enter(folder: str, launched: LaunchDir) -> None:
    """Relative paths of the configuration start there."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{launched.file}: cannot enter {folder}, where it was started: {error.strerror}"
        ) from None
