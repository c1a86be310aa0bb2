"""torchrun on this machine, with the signals of a run: they reach the ranks, which save, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from opmix_dist.exchange.lifecycles import stopped_in
from opmix_dist.process import die_with_parent, leave_stopping_to_parent

REPEAT_S = 4.0
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def torchrun_command(
    arguments: Sequence[str],
    ranks: int,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    head: str = "",
    port: int = 29500,
) -> list[str]:
    """The launcher of one node, whose ranks run ``opmix`` with these arguments. SIGQUIT alone is for the
    launcher itself: it ends everything at once."""
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
        *("-m", "opmix_dist.cli", *arguments),
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


def run_here(command: Sequence[str], extra: dict[str, str], folder: Path) -> int:
    """Run a launcher to its end; returns 0, 128 + the number of the signal that stopped what is
    trained in ``folder``, or its code.

    The launcher is out of the terminal's reach and ignores what is sent to it; the ranks get the signals of
    this process: Ctrl-C, once or several times, is a checkpoint and an end.
    """
    before = stopped_in(folder)
    child = subprocess.Popen(
        command, env={**os.environ, **extra}, start_new_session=True, preexec_fn=_as_launcher
    )

    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        print("opmix: the ranks save and stop; Ctrl-\\ ends them at once", file=sys.stderr, flush=True)
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
        _signal_ranks(child.pid, asked[-1])

    def end(number: int, frame: FrameType | None) -> None:
        child.kill()  # its ranks die with it

    handlers = {number: signal.signal(number, forward) for number in FORWARDED}
    handlers[signal.SIGQUIT] = signal.signal(signal.SIGQUIT, end)
    try:
        code = _wait(child, asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stopped = stopped_in(folder)
    if stopped is not None and stopped != before:
        return 128 + signal.Signals[stopped.signal]
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes], asked: list[int]) -> int:
    """Its exit code. A rank that is still importing misses a signal, so it is sent again."""
    while True:
        try:
            return child.wait(REPEAT_S)
        except subprocess.TimeoutExpired:
            if asked:
                _signal_ranks(child.pid, asked[-1])


def _signal_ranks(launcher: int, number: int) -> None:
    """To the launcher's children. torchrun gives each a session, so its own group holds none of them."""
    for file in Path(f"/proc/{launcher}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread has ended
            for rank in file.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(rank), number)


def _as_launcher() -> None:
    """In the child, before it becomes the launcher. Ignored signals stay ignored over exec."""
    leave_stopping_to_parent()
    die_with_parent()
