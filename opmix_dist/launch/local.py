"""torchrun on this machine, with the signals of a run: they reach the ranks, which save, and nothing else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from types import FrameType

from opmix_dist.exchange.rundir import RunDir
from opmix_dist.process import die_with_parent, leave_stopping_to_parent

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def torchrun_command(
    config_file: str, ranks: int, *, nodes: int = 1, node_rank: int = 0, head: str = "", port: int = 29500
) -> list[str]:
    """The launcher of one node. SIGQUIT alone is for the launcher itself: it ends everything at once."""
    place = ["--standalone"]
    if nodes > 1:
        place = [
            f"--nnodes={nodes}",
            f"--node-rank={node_rank}",
            f"--master-addr={head}",
            f"--master-port={port}",
        ]
    return [
        *(sys.executable, "-m", "torch.distributed.run", *place),
        *(f"--nproc-per-node={ranks}", "--signals-to-handle=SIGQUIT"),
        *("-m", "opmix_dist.cli", "train", config_file),
    ]


def environment(ranks: int) -> dict[str, str]:
    """What ranks on one machine need, where the user has not set it."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    wanted = {
        "OMP_NUM_THREADS": str(threads),  # torchrun would set 1; none at all lets each rank take all cores
        "TOKENIZERS_PARALLELISM": "false",  # does not survive the forks of loader processes
        "NCCL_DEBUG": "WARN",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def shown(command: Sequence[str], extra: Iterable[tuple[str, str]]) -> str:
    """The command as a shell takes it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in extra), shlex.join(command)])


def run_here(command: Sequence[str], extra: dict[str, str], run: RunDir) -> int:
    """Run a launcher to its end; returns 0, 128 + the number of the signal that stopped the run, or its code.

    The launcher gets a process group of its own, whose members ignore the signals that are forwarded to it
    except the ranks: Ctrl-C, once or several times, is a checkpoint and an end.
    """
    before = run.stopped()
    child = subprocess.Popen(
        command, env={**os.environ, **extra}, start_new_session=True, preexec_fn=_as_launcher
    )

    def forward(number: int, frame: FrameType | None) -> None:
        if child.poll() is None:
            print("opmix: the ranks save and stop; Ctrl-\\ ends them at once", file=sys.stderr, flush=True)
            os.killpg(child.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def end(number: int, frame: FrameType | None) -> None:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)

    handlers = {number: signal.signal(number, forward) for number in FORWARDED}
    handlers[signal.SIGQUIT] = signal.signal(signal.SIGQUIT, end)
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stopped = run.stopped()
    if stopped is not None and stopped != before:
        return 128 + signal.Signals[stopped.signal]
    return code if code >= 0 else 128 - code


def _as_launcher() -> None:
    """In the child, before it becomes the launcher. Ignored signals stay ignored over exec."""
    leave_stopping_to_parent()
    die_with_parent()
