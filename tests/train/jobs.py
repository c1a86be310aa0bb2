"""Starting, watching and killing whole jobs of the tiny configuration."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from opmix_dist.exchange.rundir import RunDir
from tests.conftest import DOMAINS
from tests.helpers import ROOT, torchrun_command

STEPS, SEARCH_STEP, BATCH, LENGTH = 16, 4, 8, 64


def tiny_config(data: Path, run: Path, **sections: dict[str, Any] | Any) -> dict[str, Any]:
    """16 steps, a search at step 4; ``sections`` are merged in, one level deep."""
    config: dict[str, Any] = {
        "run_dir": str(run),
        "data": {"root": str(data), "domains": list(DOMAINS)},
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            }
        },
        "optimizer": {"lr": 5e-3},
        "train": {
            "steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_interval_steps": 8,
            "eval_samples_per_domain": 4, "log_interval_steps": 4,
        },
        "checkpoint": {"interval_steps": 3},
        "search": {
            "start_fraction": SEARCH_STEP / STEPS,
            # at the default rate the probes of so small a model blow rounding up to differences of 0.005 nats
            "probes": {"steps": 24, "batch_size": 2, "rank": 4, "lr_multiplier": 0.5},
            "candidates": {"count": 12, "samples_per_domain": 4},
            "refinement": {"rounds": 0},
            "proposal": {"no_move": False},  # what so short a search gains is within its noise
        },
        "pool": {"ranks": 1, "poll_interval_s": 0.1},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    return config


class Job:
    """A launch in a process group of its own, so that all of it can be killed at once."""

    def __init__(
        self, config: dict[str, Any], ranks: int, *, overrides: tuple[str, ...] = (), command: str = "train"
    ) -> None:
        self.run = RunDir(config["run_dir"])
        self.file = self.run.path.with_suffix(".yaml")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(yaml.safe_dump(config))
        self.log_file = self.run.path.with_suffix(".log")
        self._log = open(self.log_file, "ab")  # noqa: SIM115  (closed by finish)
        self.process = subprocess.Popen(
            torchrun_command(ranks, "opmix_dist.cli", command, str(self.file), *overrides),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def finish(self, timeout_s: float = 240.0) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()
            self._log.close()

    def kill(self) -> None:
        """SIGKILL to the launcher and everything it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        """Poll ``condition`` often; fails when the job ends first or the time is over."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before: {what}\n{self.log()}"
            assert time.monotonic() < end, f"not in time: {what}\n{self.log()}"
            time.sleep(0.02)

    def log(self) -> str:
        return self.log_file.read_text()[-6000:]

    def steps_done(self) -> int:
        return max((line.step for line in self.run.train_lines()), default=0)

    def pool_workers(self) -> list[int]:
        """Process ids of this launch's living pool workers."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may end while we look
                if "opmix_dist.pool.worker" in child.cmdline():
                    found.append(child.pid)
        return found


def complete(config: dict[str, Any], ranks: int, *, overrides: tuple[str, ...] = ()) -> RunDir:
    """Run a job to its end, which must be a good one."""
    job = Job(config, ranks, overrides=overrides)
    assert job.finish() == 0, job.log()
    return job.run


def curve(run: RunDir) -> list[tuple]:
    """Everything of the training log that must not depend on an interruption."""
    return [
        (line.step, line.loss, line.grad_norm, line.lr, line.domain_loss, line.mixture_version)
        for line in run.train_lines()
    ]


def schedule(run: RunDir) -> list[tuple]:
    return [(r.version, r.step, r.weights, r.changed) for r in run.mixtures()]
