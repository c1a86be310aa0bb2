"""A real SLURM on this machine: munged, slurmctld and virtual nodes, all of their state in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
INSTALLER = Path(__file__).parents[2] / "scripts" / "install_slurm.sh"


def missing() -> list[str]:
    return [name for name in DAEMONS if shutil.which(name, path=PATH) is None]


def install() -> None:
    """Debian's packages, where that is allowed and they can be had."""
    subprocess.run(["bash", str(INSTALLER)], timeout=400)


class Cluster:
    """``nodes`` virtual nodes of 4 CPUs; their names are addresses of this machine, so they resolve anywhere.

    Nodes that stop answering are noticed within some 15 s, and requeued jobs start after 6 s: the least that
    SLURM takes.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"127.0.0.{11 + i}" for i in range(nodes)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        for name in ("munge", "state", "log", "pid", "spool"):
            (self.folder / name).mkdir(mode=0o755, parents=True)
        self.folder.chmod(0o755)  # munged refuses a socket below a folder that others may not enter
        self._configure()
        self._start_munge()
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(lambda: self._idle() == len(self.nodes), "all nodes idle", 30)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node, "-f", self.environment["SLURM_CONF"])

    def _start_munge(self) -> None:
        key, socket_file = self.folder / "munge" / "key", self.folder / "munge" / "socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.run(
            *("munged", "--force", f"--key-file={key}", f"--socket={socket_file}", "--num-threads=2"),
            *(f"--pid-file={self.folder}/pid/munged.pid", f"--log-file={self.folder}/log/munged.log"),
            f"--seed-file={self.folder}/munge/seed",
        )

    def _configure(self) -> None:
        here, user, folder = socket.gethostname().split(".")[0], getpass.getuser(), self.folder
        port, *ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={here} NodeAddr={node} Port={port} CPUs=4 RealMemory=4000"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        (folder / "slurm.conf").write_text(f"""
ClusterName=tests
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=10
MailProg=/bin/true
SlurmdTimeout=10
InactiveLimit=0
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes={",".join(self.nodes)} Default=YES MaxTime=60 State=UP
""")
        version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
        # pinned: without a mounted hierarchy, asking for it ends slurmd, which uses none of it here
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v{version}\n")

    def run(self, *command: str) -> str:
        """Output of a command of this SLURM's, which must succeed."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def _idle(self) -> int:
        return len(self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())

    def state_of(self, node: str) -> str:
        """In sinfo's words: ``idle``, ``allocated``, ``down*``."""
        return self.run("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T").strip()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("log/*.log")))

    def kill_node(self, node: str) -> None:
        """SIGKILL to its slurmd, the managers of its steps, and whatever runs in them."""
        steps = self._steps(node)
        os.kill(int((self.folder / "pid" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        _kill(steps)

    def _steps(self, *nodes: str) -> list[psutil.Process]:
        """What runs on these nodes: the managers of steps, then their processes."""
        conf = self.environment["SLURM_CONF"]
        running = [process for process in psutil.process_iter() if _is_of(process, conf, nodes)]
        return [*(one for one in psutil.process_iter() if _manages(one, running)), *running]

    def stop(self) -> None:
        """End all jobs, then exactly the daemons that were started, and what is left of their jobs."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--full", f"--user={getpass.getuser()}")
            self.wait_until(lambda: not self.run("squeue", "--noheader"), "no jobs", 20)
        daemons = []
        for file in self.folder.glob("pid/*.pid"):
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                daemons.append(psutil.Process(int(file.read_text())))
                daemons[-1].terminate()
        for daemon in psutil.wait_procs(daemons, timeout=10)[1]:
            daemon.kill()
        _kill(self._steps(*self.nodes))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_of(process: psutil.Process, conf: str, nodes: Sequence[str]) -> bool:
    with contextlib.suppress(psutil.Error):
        found = process.environ()
        return found.get("SLURM_CONF") == conf and found.get("SLURMD_NODENAME") in nodes
    return False


def _manages(manager: psutil.Process, running: list[psutil.Process]) -> bool:
    with contextlib.suppress(psutil.Error):
        return manager.name() == "slurmstepd" and any(child in running for child in manager.children())
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
