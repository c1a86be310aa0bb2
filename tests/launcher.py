"""What torchrun does on one machine, with ranks that are forked from a process that has imported torch,
transformers and the job already: to import them takes some six seconds of every rank's life.

Ranks find the environment that torchrun gives them, and a store in their launcher; when one fails, the
others are ended. Launches by torchrun itself are in the tests of the commands, of stopping, of SLURM and of
the soak.

``python -m tests.launcher FD`` is that process: it accepts connections on a socket that it inherits, one for
each launch, until its standard input ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "opmix_dist.train.job",
    "opmix_dist.engines.fsdp",
    "opmix_dist.pool.run_search",
    "opmix_dist.train.checkpoint",
    "tests.helpers",
)
END_GRACE_S = 30.0


@dataclass(frozen=True)
class Request:
    ranks: int
    module: str
    arguments: Sequence[str]
    log: str
    environment: Mapping[str, str]


class Launch:
    """``python -m MODULE ARGUMENTS`` on ``ranks`` ranks, in a process group of its own; returns at once.

    Args:
        log: takes what they print, behind what is in it.
    """

    def __init__(self, ranks: int, module: str, arguments: Sequence[str], log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        request = Request(ranks, module, arguments, str(log), environment)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        self._connection.sendall(json.dumps(asdict(request)).encode() + b"\n")
        self._answers = self._connection.makefile("r")
        self._code: int | None = None
        self.pid = int(self._answers.readline())
        """Of the launcher, whose children are the ranks in their order."""

    def poll(self) -> int | None:
        """The launcher's exit code, 1 when a rank has failed; None while it runs."""
        with contextlib.suppress(TimeoutError):
            return self._ended_within(0.0)
        return None

    def wait(self, timeout_s: float) -> int:
        """The same, when it has ended; what still runs then is killed.

        Raises:
            TimeoutError: it has not ended by itself.
        """
        try:
            return self._ended_within(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the launcher and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._ended_within(END_GRACE_S)
        self._connection.close()

    def _ended_within(self, timeout_s: float) -> int:
        if self._code is None:
            if not select.select([self._connection], [], [], timeout_s)[0]:
                raise TimeoutError(f"the launch has not ended within {timeout_s} s")
            self._code = int(self._answers.readline() or -signal.SIGKILL)
        return self._code


@functools.cache
def _server() -> str:
    """The address of this process's server, which is started first."""
    address = f"\0opmix-tests-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    assert server.stdin is not None
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # the last that is registered comes first
    return address


def serve(listener: socket.socket) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in ranks would write to these pages, and copy them
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 0.5)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _launch(connection)
            connection.close()


def _launch(connection: socket.socket) -> NoReturn:
    os.setsid()
    with connection.makefile("r") as lines:
        request = Request(**json.loads(lines.readline()))
    connection.sendall(f"{os.getpid()}\n".encode())
    code = 1
    try:
        _use(request)
        importlib.import_module(request.module)  # and all that it needs, once for all ranks
        code = _run_ranks(request, connection)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    connection.sendall(f"{code}\n".encode())
    os._exit(code)


def _use(request: Request) -> None:
    """Its output and environment in place of the server's."""
    output = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request.environment)


def _run_ranks(request: Request, connection: socket.socket) -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    shared = {
        "WORLD_SIZE": request.ranks,
        "LOCAL_WORLD_SIZE": request.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": uuid.uuid4(),
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "GROUP_RANK": 0,
    }
    children = set()
    for rank in range(request.ranks):
        child = os.fork()
        if child == 0:
            listener.close()
            connection.close()
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            _run(request)
        children.add(child)

    from torch.distributed import TCPStore

    # only now: its thread would not live on in a forked process
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    failed = _wait(children)
    del store
    return int(failed)


def _run(request: Request) -> NoReturn:
    """As ``python -m`` does."""
    code: object = 0
    try:
        del sys.modules[request.module]
        sys.argv = [request.module, *request.arguments]
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _wait(children: set[int]) -> bool:
    """Until all have ended; whether one has failed, which ends the others."""
    failed, end = False, float("inf")
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        if child and status and not failed:
            failed, end = True, time.monotonic() + END_GRACE_S
            print(f"launcher: rank process {child} ended with {os.waitstatus_to_exitcode(status)}")
            for other in children:
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > end:
            for other in children:
                os.kill(other, signal.SIGKILL)
            end = float("inf")
        if not child:
            time.sleep(0.05)
    return failed


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
