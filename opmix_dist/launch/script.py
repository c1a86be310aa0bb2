"""The job script of a run: a header of options and variables, then the templates beside this file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib import resources

from opmix_dist.exchange.lifecycles import STAGES
from opmix_dist.launch.records import SlurmOptions


def job_script(
    options: SlurmOptions, runs: Sequence[str], stages: Sequence[str], *, cwd: str, folder: str
) -> str:
    """The text of a script for sbatch.

    Args:
        runs: absolute folder of each task's run or lifecycle; more than one make a job array.
        stages: names of the stages, where the tasks are lifecycles.
        cwd: folder that relative paths of the configuration start from.
        folder: where the job's output goes; must exist when it starts.
    """
    body = "heterogeneous.sh" if options.pool_nodes else "homogeneous.sh"
    parts = ["\n".join([*_header(options, runs, cwd, folder), *_variables(options, runs, stages)]) + "\n"]
    parts += [_template(name) for name in ("environment.sh", "ranks.sh", "ending.sh", body)]
    return "\n".join(parts)


def _template(name: str) -> str:
    return (resources.files("opmix_dist.launch") / "templates" / name).read_text()


def _header(options: SlurmOptions, runs: Sequence[str], cwd: str, folder: str) -> Iterator[str]:
    array = len(runs) > 1
    yield "#!/bin/bash"
    yield "# Written by `opmix launch slurm`, which can write it again with other options."
    yield from _directives(
        {
            "job-name": options.job_name or "opmix",
            "chdir": cwd,
            "output": f"{folder}/slurm-%{'A_%a' if array else 'j'}.out",
            "open-mode": "append",  # a requeued job goes on in the same file
            "array": _array(options, len(runs)) if array else None,
            "requeue": "",
            "signal": f"B:USR1@{options.grace_s}",
        }
    )
    yield from _component(options, options.nodes, options.gpus_per_node, options.partition)
    if options.pool_nodes:
        yield "#SBATCH hetjob"
        yield from _component(
            options,
            str(options.pool_nodes),
            options.pool_gpus_per_node,
            options.pool_partition or options.partition,
        )
    yield ""


def _array(options: SlurmOptions, tasks: int) -> str:
    limit = f"%{options.array_limit}" if options.array_limit else ""
    return f"0-{tasks - 1}{limit}"


def _component(options: SlurmOptions, nodes: str, gpus_per_node: int, partition: str | None) -> Iterator[str]:
    """One task on each node: it starts the ranks of its node."""
    yield from _directives(
        {
            "nodes": nodes,
            "ntasks-per-node": "1",
            "gpus-per-node": str(gpus_per_node) if gpus_per_node else None,
            "cpus-per-task": str(options.cpus_per_task) if options.cpus_per_task else None,
            "mem": options.mem,
            "time": options.time,
            "partition": partition,
            "account": options.account,
            "qos": options.qos,
            "constraint": options.constraint,
        }
    )
    yield from (f"#SBATCH {option}" for option in options.sbatch)


def _directives(values: dict[str, str | None]) -> Iterator[str]:
    for name, value in values.items():
        if value is not None:
            yield f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "")


def _quoted(value: str) -> str:
    """sbatch reads double quotes, and takes a # after a space for a comment."""
    return f'"{value}"' if any(character.isspace() or character == "#" for character in value) else value


def _variables(options: SlurmOptions, runs: Sequence[str], stages: Sequence[str]) -> Iterator[str]:
    yield "set -uo pipefail"
    yield from options.setup
    if len(runs) > 1:
        yield from ("RUNS=(", *(f"  {shlex.quote(run)}" for run in runs), ")")
        yield "RUN=${RUNS[$SLURM_ARRAY_TASK_ID]}"
    else:
        yield f"RUN={shlex.quote(runs[0])}"
    # folders of what is trained, in its order
    trained = [f'"$RUN"/{STAGES}/{shlex.quote(stage)}' for stage in stages] or ['"$RUN"']
    yield f"TRAINED=({' '.join(trained)})"
    yield f"COMMAND={'lifecycle' if stages else 'train'}"
    yield "CONFIG=$RUN/launch/config.yaml"
    yield f"PYTHON={shlex.quote(options.python)}"
    yield f"RANKS_PER_NODE={options.ranks_per_node}"
    if options.pool_nodes:
        yield f"POOL_RANKS_PER_NODE={options.pool_ranks_per_node}"
    # sbatch's does not reach srun, which would give each task one CPU
    cpus = [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
    yield f"SRUN_OPTIONS=({shlex.join([*cpus, *options.srun])})"
    yield f"GRACE_S={options.grace_s}"
    yield f"RETRIES={options.retries}"
    yield f"MAX_REQUEUES={options.max_requeues}"
