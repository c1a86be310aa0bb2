"""``opmix launch``, ``status``, ``cancel`` and ``resume``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from opmix_dist.errors import UserError
from opmix_dist.telling import tell

if TYPE_CHECKING:
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.launch.records import LaunchDir, SlurmOptions
    from opmix_dist.launch.work import Work

FAILED = 1
NO_ANSWER = 69
"""Exit status where SLURM could not be asked (EX_UNAVAILABLE of sysexits.h): nothing is known."""


def add_launch_commands(commands: Any) -> None:
    """Add what starts, watches and stops runs to the subcommands of ``opmix``."""
    launch = commands.add_parser(
        "launch", help="start a run or a lifecycle: on this machine, on several, or on SLURM"
    )
    kinds = launch.add_subparsers(dest="launcher", required=True)
    _add_local(kinds)
    _add_torchrun(kinds)
    _add_slurm(kinds)

    status = commands.add_parser(
        "status",
        help="where runs are, by their folders and by SLURM",
        description=f"Ends with status {FAILED} when a run failed, and {NO_ANSWER} when SLURM could not be "
        "asked, which says nothing about the run.",
    )
    status.add_argument("run_dirs", nargs="+", type=Path, help="folders of runs, lifecycles or arrays")
    status.add_argument("--json", action="store_true", help="a line of JSON for each")
    status.set_defaults(run=_asking(_status))

    cancel = commands.add_parser(
        "cancel", help="let a run save and stop, or take it from the queue", description="It can be resumed."
    )
    cancel.add_argument("run_dir", type=Path)
    cancel.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    cancel.set_defaults(run=_asking(_cancel))

    resume = commands.add_parser(
        "resume",
        help="start a run again as it was started; settings that may change as --dotted.key value",
    )
    resume.add_argument("run_dir", type=Path)
    _add_allocation(resume, again=True)
    resume.add_argument("--ranks", type=int, help="of a run on this machine")
    resume.set_defaults(run=_asking(_resume))


def _add_local(kinds: Any) -> None:
    local = kinds.add_parser("local", help="on this machine; Ctrl-C saves and stops")
    local.add_argument("config", type=Path)
    local.add_argument("--ranks", type=int, default=1, help="trainers and pool (default: 1)")
    local.add_argument("--dry-run", action="store_true", help="print the command and stop")
    local.set_defaults(run=_local)


def _add_torchrun(kinds: Any) -> None:
    several = kinds.add_parser(
        "torchrun", help="on several machines: the same command on each, with its own --node-rank"
    )
    several.add_argument("config", type=Path)
    several.add_argument("--nodes", type=int, required=True)
    several.add_argument("--node-rank", type=int, required=True, help="of this machine, from 0")
    several.add_argument("--ranks-per-node", type=int, required=True)
    several.add_argument("--head", required=True, help="address of machine 0, as the others reach it")
    several.add_argument("--port", type=int, default=29500, help="free on machine 0 (default: 29500)")
    several.add_argument("--dry-run", action="store_true", help="print the command and stop")
    several.set_defaults(run=_torchrun)


def _add_slurm(kinds: Any) -> None:
    slurm = kinds.add_parser(
        "slurm",
        help="as a job that saves before its allocation ends, is requeued, and resumes",
        description="Several configurations, or --vary, make an array of runs.",
    )
    slurm.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    slurm.add_argument("--vary", action="append", default=[], metavar="KEY=V,V", help="a run for each value")
    slurm.add_argument("--array-limit", type=int, help="runs of an array that are active at once")
    slurm.add_argument("--dry-run", action="store_true", help="print script and command; needs no SLURM")
    _add_allocation(slurm, again=False)
    slurm.set_defaults(run=_asking(_slurm))


def _add_allocation(parser: argparse.ArgumentParser, *, again: bool) -> None:
    """Options bear the names of SlurmOptions' fields. What is not given is left out: defaults are there, or
    what was recorded."""

    def add(name: str, help: str, **more: Any) -> None:
        parser.add_argument(name, help=help, default=argparse.SUPPRESS, **more)

    add("--nodes", "that train: 4, or 2-4 for as many as there are", required=not again)
    add("--gpus-per-node", "GPUs to ask for, each for a rank; 0 on CPUs", type=int)
    add("--ranks-per-node", "default: --gpus-per-node, or 1", type=int)
    add("--pool-nodes", "a second component of the job, which searches (pool.external)", type=int)
    add("--pool-gpus-per-node", "default: --gpus-per-node", type=int)
    add("--pool-ranks-per-node", "default: --pool-gpus-per-node, or 1", type=int)
    add("--pool-partition", "default: --partition")
    add("--partition", "as of sbatch")
    add("--account", "as of sbatch")
    add("--qos", "as of sbatch")
    add("--constraint", "as of sbatch")
    add("--time", "as of sbatch; the job goes on in as many allocations as it takes")
    add("--mem", "as of sbatch, for each node")
    add("--cpus-per-task", "as of sbatch, for all ranks of a node together", type=int)
    add("--job-name", "default: the run directory's name")
    add("--grace-s", "seconds for a checkpoint before the allocation ends (default: 120)", type=int)
    add("--retries", "failures without a new checkpoint after which it is tried again (default: 2)", type=int)
    add("--max-requeues", "of one submission (default: 100)", type=int)
    add("--setup", "a line of shell before anything runs, such as a module; repeatable", action="append")
    add("--sbatch", "a further option of sbatch; repeatable: --sbatch=--exclusive", action="append")
    add("--srun", "a further option of srun; repeatable: --srun=--container-image=...", action="append")
    add("--python", "interpreter with opmix_dist, as the nodes see it (default: this one)")


def _asking(command: Callable[..., int]) -> Callable[..., int]:
    """No answer of SLURM is an outcome of its own."""

    def run(arguments: argparse.Namespace, rest: list[str]) -> int:
        from opmix_dist.launch.slurm import NoAnswerError

        try:
            return command(arguments, rest)
        except NoAnswerError as error:
            tell(f"opmix: could not ask SLURM: {error}", sys.stderr)
            return NO_ANSWER

    return run


def _local(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.launch.work import load_work

    work = load_work(arguments.config, rest)
    work.check_allocation(range(1, 2), arguments.ranks)
    return _start_here(arguments, work, arguments.ranks)


def _torchrun(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.launch.work import load_work

    if not 0 <= arguments.node_rank < arguments.nodes:
        raise UserError(f"--node-rank {arguments.node_rank} is none of 0 to {arguments.nodes - 1}")
    work = load_work(arguments.config, rest)
    work.check_allocation(range(arguments.nodes, arguments.nodes + 1), arguments.ranks_per_node)
    place = {name: getattr(arguments, name) for name in ("nodes", "node_rank", "head", "port")}
    return _start_here(arguments, work, arguments.ranks_per_node, **place)


def _start_here(arguments: argparse.Namespace, work: Work, ranks: int, **place: Any) -> int:
    from opmix_dist.launch.local import environment, shown

    if arguments.dry_run:
        print(shown(_torchrun_command(work, ranks, **place), environment(ranks).items()))
        return 0
    return _run_and_record(work, ranks, **place)


def _torchrun_command(work: Work, ranks: int, **place: Any) -> list[str]:
    from opmix_dist.launch.local import torchrun_command
    from opmix_dist.launch.records import LaunchDir

    return torchrun_command([work.command, str(LaunchDir(work.folder).config_file)], ranks, **place)


def _run_and_record(work: Work, ranks: int, **place: Any) -> int:
    from opmix_dist.launch.local import environment, run_here
    from opmix_dist.launch.records import Launch, LaunchDir, LocalProcess, now
    from opmix_dist.launch.watching import require_idle

    launched, records = LaunchDir(work.folder), place.get("node_rank", 0) == 0
    if records and launched.file.exists():
        require_idle(work.folder, launched.read())
    work.write()  # machines that share the folder write the same
    if records:
        launched.begin_anew()
        local = LocalProcess(host=os.uname().nodename, pid=os.getpid(), ranks=ranks, at=now())
        launched.write(Launch(cwd=os.getcwd(), local=local))
    return run_here(_torchrun_command(work, ranks, **place), environment(ranks), work.folder.path)


def _slurm_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from opmix_dist.launch.records import SlurmOptions

    given = vars(arguments)
    return {name: given[name] for name in SlurmOptions.model_fields if given.get(name) is not None}


def _checked(options: dict[str, Any]) -> SlurmOptions:
    from opmix_dist.launch.records import SlurmOptions

    try:
        return SlurmOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{name} {first['input']}: {first['msg']}") from None


def _slurm(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.launch.starting import SlurmStart, Sweep, parse_vary

    given = _slurm_options(arguments)
    gpus = given.get("gpus_per_node", 0)
    given.setdefault("ranks_per_node", gpus or 1)
    given.setdefault("pool_gpus_per_node", gpus)
    given.setdefault("pool_ranks_per_node", given["pool_gpus_per_node"] or 1)
    given.setdefault("python", sys.executable)
    sweep = Sweep(arguments.configs, parse_vary(arguments.vary))
    works = sweep.load(rest, external_pool=bool(given.get("pool_nodes")))
    given.setdefault("job_name", works[0].folder.path.name)
    start = SlurmStart(_checked(given), works, os.getcwd())
    if arguments.dry_run:
        print(start.script())
        print(f"# submitted by: sbatch --parsable {start.home.script}")
        return 0
    job = start.submit()
    tell(f"job {job}: {start.home.path.parent}")
    return 0


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
        tell(f"job {resume_on_slurm(run, _slurm_options(arguments), rest)}: {run.path}")
        return 0
    assert launch.local is not None
    ranks = arguments.ranks or launch.local.ranks
    work = load_work(launched.config_file, rest, place=lambda _: str(run.path))
    work.check_allocation(range(1, 2), ranks)
    return _run_and_record(work, ranks)


def _enter(folder: str, launched: LaunchDir) -> None:
    """Relative paths of the configuration start there."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{launched.file}: cannot enter {folder}, where it was started: {error.strerror}"
        ) from None
