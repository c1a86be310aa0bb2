"""What a pool rank of the shared launch is: a thin parent that starts the worker and starts it again.

``torchrun`` ends the whole launch when one of its ranks dies. A supervisor therefore does no work that
could fail; its child does. Workers of one generation share a process group; when one dies, all supervisors
start theirs again in the next generation, and the search goes on from what is on disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from torch.distributed import Store

from opmix_dist.config import RunConfig
from opmix_dist.distributed import Placement, Role, has_launcher, launch_attempt, launch_store
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import SearchStage
from opmix_dist.logs import set_up_logging
from opmix_dist.pool.heart import PIPE_VARIABLE, Pulse
from opmix_dist.pool.status import StatusWriter
from opmix_dist.pool.team import require_whole_teams
from opmix_dist.pool.worker import oldest_open_search
from opmix_dist.process import die_with_parent
from opmix_dist.settings import to_yaml
from opmix_dist.stopping import launch_is_told, take_held_signals

log = logging.getLogger(__name__)
END_GRACE_S = 5.0
GENERATION_KEY = "opmix/pool_generation"
SILENCE = 0.5
"""Share of pool.heartbeat_timeout_s after which workers are started again: before the trainers, who wait for
all of it, give the search up."""


class Supervisor:
    """Runs in each pool rank until the run has ended. Never raises for a worker's death."""

    def __init__(self, run: RunDir, config: RunConfig, placement: Placement) -> None:
        self.run, self.config, self.placement = run, config, placement
        self.store = launch_store()
        self.generations = Generations(self.store)
        self.deaths: dict[str, int] = {}
        self.child: subprocess.Popen[bytes] | None = None

    def supervise(self) -> None:
        """Start workers until the run is over, or its trainers were stopped on request."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._stop)
        take_held_signals()
        while True:
            generation = self.generations.current()
            code = self._work(generation)
            if code == 0 or self._over():
                return
            try:
                restart = self._may_restart(code)
            except Exception:  # a file that cannot be read or written now: the launch must live on
                log.exception("pool rank %d cannot look at its searches", self.placement.rank)
                restart = True
            if not restart:
                log.warning("pool rank %d is given up: no more searches in this launch", self.placement.rank)
                self._wait_for_the_end()
                return
            time.sleep(self.config.pool.poll_interval_s)

    def _work(self, generation: int) -> int:
        """One worker from start to end; its exit code."""
        beats = self.generations.key(f"beats/{generation}")
        pulse = Pulse(self.store, beats, SILENCE * self.config.pool.heartbeat_timeout_s)
        try:
            self.child = self._start(generation, pulse)
            return self._wait(generation, pulse)
        finally:
            pulse.close()

    def _over(self) -> bool:
        """The run has ended, or the trainers of this launch have, as they were asked to."""
        return self.run.summary_file.exists() or launch_is_told(self.store)

    def _start(self, generation: int, pulse: Pulse) -> subprocess.Popen[bytes]:
        own = {"OPMIX_POOL_GENERATION": str(generation), PIPE_VARIABLE: str(pulse.writing)}
        environment = os.environ | own
        if self.config.pool.threads:
            environment["OMP_NUM_THREADS"] = str(self.config.pool.threads)
        place = [str(self.placement.rank), str(self.placement.size), str(os.getpid())]
        child = subprocess.Popen(
            [sys.executable, "-m", "opmix_dist.pool.worker", *place],
            env=environment,
            stdin=subprocess.PIPE,
            pass_fds=[pulse.writing],
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: _wait tells
            child.stdin.write(to_yaml(self.config).encode())
            child.stdin.close()
        return child

    def _wait(self, generation: int, pulse: Pulse) -> int:
        """The worker's exit code. The start of another generation ends it, and so does a pool that hangs, and
        the end of the run, whatever it still computes: nobody waits for that any more."""
        assert self.child is not None
        while (code := self.child.poll()) is None:
            if self.generations.current() != generation:
                self.child.kill()
            elif self._over():
                self._end_child()
            elif pulse.silent():
                log.warning("pool worker %d is killed: the pool hangs", self.placement.rank)
                self.child.kill()
                self.child.wait()
            time.sleep(self.config.pool.poll_interval_s)
        if code != 0 and not self._over():
            self.generations.advance_from(generation)
        return code

    def _end_child(self) -> None:
        assert self.child is not None
        try:
            self.child.wait(END_GRACE_S)  # an idle worker leaves by itself
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def _wait_for_the_end(self) -> None:
        while not self._over():
            time.sleep(self.config.pool.poll_interval_s)

    def _may_restart(self, code: int) -> bool:
        """Count a death against the search that was open; the leader gives that search up when it has had
        its restarts. Without a search open, a pool rank that used up its restarts is given up."""
        search = oldest_open_search(self.run)
        name = search.name if search else ""
        self.deaths[name] = self.deaths.get(name, 0) + 1
        left = self.config.pool.max_restarts - self.deaths[name] + 1
        log.warning(
            "pool worker %d ended with code %d; %d restart(s) left", self.placement.rank, code, max(0, left)
        )
        if left > 0:
            return True
        if search is None:
            return False
        reason = f"the pool worker died {self.deaths[name]} time(s), last with exit code {code}"
        StatusWriter(search, writes=self.placement.rank == 0).enter(SearchStage.FAILED, reason=reason)
        return True

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Quietly: where a launcher watches, another code would end the trainers before they have saved."""
        if self.child is not None:
            self.child.kill()
        os._exit(0 if has_launcher() else 128 + signum)


class Generations:
    """The pool's generation in the launch's store, 0 at first. Any supervisor may advance it, once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = f"{GENERATION_KEY}/{launch_attempt()}"

    def key(self, name: str) -> str:
        """For something else in the store that torchrun's restarts must not meet again."""
        return f"{self._key}/{name}"

    def current(self) -> int:
        return self._store.add(self._key, 0)

    def advance_from(self, generation: int) -> None:
        """No-op when another supervisor has advanced from the same generation already."""
        if self.current() == generation:
            self._store.compare_set(self._key, str(generation), str(generation + 1))


def run_pool(run_dir: Path) -> None:
    """``opmix pool --run DIR``: every rank of this launch is a pool rank of the run in ``run_dir``.

    Waits for the trainers to write the run's configuration. A dead pool of this kind cannot touch training:
    the trainers notice its silence after ``pool.heartbeat_timeout_s``.
    """
    if has_launcher():
        die_with_parent()
    run = RunDir(run_dir)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(f"pool {rank}")
    while not run.config_file.exists():
        log.info("waiting for %s", run.config_file)
        time.sleep(2.0)
    config = run.config()
    if not config.pool.external:
        raise UserError(f"{run.config_file} does not set pool.external: its pool is in its own launch")
    require_whole_teams(config.pool.ranks_per_model, size)
    config = config.model_copy(update={"run_dir": str(run_dir)})
    Supervisor(run, config, Placement(Role.POOL, rank, size)).supervise()
