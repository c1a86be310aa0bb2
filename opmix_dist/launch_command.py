"""``opmix launch``: what starts a run or a lifecycle."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from opmix_dist.errors import UserError
from opmix_dist.telling import tell

if TYPE_CHECKING:
    from opmix_dist.launch.records import SlurmOptions
    from opmix_dist.launch.work import Work

NO_ANSWER = 69
"""Exit status where SLURM could not be asked (EX_UNAVAILABLE of sysexits.h): nothing is known."""


def add_launch_command(commands: Any) -> None:
    """Add it to the subcommands of ``opmix``."""
    launch = commands.add_parser(
        "launch", help="start a run or a lifecycle: on this machine, on several, or on SLURM"
    )
    kinds = launch.add_subparsers(dest="launcher", required=True)
    _add_local(kinds)
    _add_torchrun(kinds)
    _add_slurm(kinds)


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
    add_allocation(slurm, again=False)
    slurm.set_defaults(run=asking(_slurm))


def add_allocation(parser: argparse.ArgumentParser, *, again: bool) -> None:
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


def asking(command: Callable[..., int]) -> Callable[..., int]:
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
    return run_and_record(work, ranks, **place)


def _torchrun_command(work: Work, ranks: int, **place: Any) -> list[str]:
    from opmix_dist.launch.local import torchrun_command
    from opmix_dist.launch.records import LaunchDir

    return torchrun_command([work.command, str(LaunchDir(work.folder).config_file)], ranks, **place)


def run_and_record(work: Work, ranks: int, **place: Any) -> int:
    """On this machine to its end; the code as of ``run_here``.

    Args:
        place: of this machine among several, as of ``torchrun_command``.

    Raises:
        UserError: something works on it already; NoAnswerError: that cannot be known.
    """
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


def slurm_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, unchecked."""
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

    given = slurm_options(arguments)
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
