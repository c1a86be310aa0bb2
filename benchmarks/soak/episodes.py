"""Episodes: jobs with faults, each beside the same job without, and what came of them."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.soak.checking import data_problems, problems
from benchmarks.soak.drawing import DOMAINS, PROBE_STEPS, SEARCH_STEP, STEPS, Episode
from benchmarks.soak.launching import ROOT, Launches, Start, prepare, torchrun
from opmix_dist.exchange.rundir import RunDir

BATCH, LENGTH = 8, 64
PREPARE = (
    "--builtin", "--builtin-max-bytes", "80000", "--vocab-size", "512", "--sequence-length", str(LENGTH),
    "--eval-fraction", "0.2", "--workers", "1",
)  # fmt: skip


@dataclass
class Outcome:
    """problems: what was wrong in the end; empty: the run survived."""

    episode: int
    shape: str
    faults: list[dict[str, Any]]
    starts: list[Start]
    problems: list[str] = field(default_factory=list)

    @property
    def fired(self) -> int:
        return sum(fault["fired"] for fault in self.faults)


class Soak:
    """
    Args:
        folder: of all runs.
        data: domains of samples of 64 tokens; made if there are none.
        patience_s: after which ranks of a job give each other up.
    """

    def __init__(self, folder: Path, data: Path | None = None, *, patience_s: float = 30.0) -> None:
        self.patience_s = patience_s
        self.folder = folder.absolute()
        self.data = data or self._prepare()

    def _prepare(self) -> Path:
        data = self.folder / "data"
        command = prepare("--out", str(data), *PREPARE)
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        return data

    def job(self, episode: Episode) -> Outcome:
        """Start the episode's job until it has ended, and compare it with the one without faults."""
        folder = self.folder / f"job_{episode.number}"
        shutil.rmtree(folder, ignore_errors=True)
        run = RunDir(folder / "run")
        command = self._command(folder, episode.trainers, episode.pool, search=True)
        launches = Launches(folder, command, episode, run.train_file)
        starts = launches.run_to_end(most=len(episode.ids) + 2)
        shape = (
            f"{episode.trainers} trainer(s), {f'{episode.pool} pool' if episode.pool else 'inline search'}"
        )
        outcome = self._outcome(episode, shape, launches, starts)
        if starts[-1].code:
            outcome.problems.append(f"did not end in {len(starts)} launches, code {starts[-1].code}")
        else:
            moved = self.reference(episode.trainers, episode.pool, search=True)
            kept = partial(self.reference, episode.trainers, episode.pool, search=False)
            outcome.problems += problems(run, moved, kept, BATCH * LENGTH)
        return outcome

    def reference(self, trainers: int, pool: int, *, search: bool) -> RunDir:
        """The job without faults, run once."""
        folder = self.folder / f"reference_{trainers}_{pool if search else 'static'}"
        run = RunDir(folder / "run")
        if not run.summary_file.exists():
            nothing = Episode(-1, trainers, pool, (), {})
            command = self._command(folder, trainers, pool if search else 0, search=search)
            (start,) = Launches(folder, command, nothing, run.train_file).run_to_end(most=1)
            if start.code:
                raise RuntimeError(f"the job without faults failed: see {folder}/launch_0.log")
        return run

    def _command(self, folder: Path, trainers: int, pool: int, *, search: bool) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(self._config(folder / "run", pool, search=search)))
        return torchrun(trainers + pool, "train", str(file))

    def _config(self, run: Path, pool: int, *, search: bool) -> Mapping[str, Any]:
        return {
            "run_dir": str(run),
            "data": {"root": str(self.data), "domains": list(DOMAINS)},
            "model": {
                "config": {
                    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH,
                }
            },
            "optimizer": {"lr": 5e-3},
            "engine": {"collective_timeout_s": self.patience_s},
            "train": {
                "steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_interval_steps": 6,
                "eval_samples_per_domain": 4, "on_bad_step": "skip",
            },
            "checkpoint": {"interval_steps": 3, "keep": 3},
            "mixture": {"policy": "opmix" if search else "static"},
            "search": {
                "start_fraction": SEARCH_STEP / STEPS,
                "probes": {
                    "steps": PROBE_STEPS, "batch_size": 2, "rank": 4, "lr_multiplier": 0.5, "max_joint": 1
                },
                "candidates": {"count": 8, "samples_per_domain": 4},
                "refinement": {"rounds": 0},
                "proposal": {"no_move": False},
            },
            # no more deaths than faults, and one that the soak's own machine brings about by being slow
            "pool": {
                "ranks": pool, "poll_interval_s": 0.1, "heartbeat_timeout_s": 3 * self.patience_s,
                "max_restarts": 6,
            },
        }  # fmt: skip

    def ingest(self, episode: Episode) -> Outcome:
        """Prepare the data with faults, and compare them with those without."""
        folder = self.folder / f"ingest_{episode.number}"
        shutil.rmtree(folder, ignore_errors=True)
        command = prepare("--out", str(folder / "data"), *PREPARE)
        launches = Launches(folder, command, episode, folder / "none.jsonl")
        starts = launches.run_to_end(most=len(episode.ids) + 2)
        outcome = self._outcome(episode, "opmix prepare", launches, starts)
        if starts[-1].code:
            outcome.problems.append(f"did not end in {len(starts)} launches, code {starts[-1].code}")
        else:
            outcome.problems += data_problems(folder / "data", self.data)
        return outcome

    def _outcome(self, episode: Episode, shape: str, launches: Launches, starts: list[Start]) -> Outcome:
        fired = launches.fired()
        described: dict[str, dict[str, Any]] = {
            fault.id: {"kind": fault.kind, "point": fault.point, "role": fault.role, "rank": fault.rank}
            for fault in episode.faults
        }
        described |= {one.id: {"kind": "kill", "point": one.victim} for one in episode.outside}
        rows = [
            {"id": name, "phase": episode.phases[name], **described[name], "fired": name in fired}
            | _consequence(name, starts)
            for name in episode.ids
        ]
        outcome = Outcome(episode.number, shape, rows, starts)
        outcome.problems += [f"{row['id']} did not happen" for row in rows if not row["fired"]]
        return outcome


def _consequence(name: str, starts: list[Start]) -> dict[str, Any]:
    """Of the fault that ended a launch, which is the last one in it: what was lost, and how long it took
    until the job trained again."""
    for start, after in itertools.pairwise(starts):
        if start.fired and start.fired[-1] == name:
            lost = None if after.first_step is None else max(0, start.last_step - after.first_step)
            return {"ended_the_launch": True, "lost_steps": lost, "resume_seconds": after.ready_seconds}
    return {"ended_the_launch": False, "lost_steps": 0, "resume_seconds": None}


def as_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)
