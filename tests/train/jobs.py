"""Starting, watching and killing whole jobs of the tiny configuration."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from opmix_dist.exchange.rundir import RunDir
from tests.conftest import DOMAINS
from tests.launcher import Launch

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
        arguments = [command, str(self.file), *overrides]
        self.process = Launch(ranks, "opmix_dist.cli", arguments, self.log_file)

    def finish(self, timeout_s: float = 240.0) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to the launcher and everything it started."""
        self.process.kill()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        """Poll ``condition`` often; fails when the job ends first or the time is over."""
        end = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"ended before, or not in time: {what}\n{self.log()}")
            time.sleep(0.02)

    @contextlib.contextmanager
    def trainers_held(self, number: int) -> Iterator[None]:
        """SIGSTOP to the first ``number`` ranks, the trainers, which go on afterwards: the pool catches up,
        and no step is computed for that only."""
        ranks = sorted(psutil.Process(self.process.pid).children(), key=lambda rank: rank.pid)
        for rank in ranks[:number]:
            rank.suspend()
        try:
            yield
        finally:
            for rank in ranks[:number]:
                rank.resume()

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
