"""Is a lifecycle resumable at any point? Its processes are killed at random times until it has ended.

    make soak-lifecycle

Runs the lifecycle once without a disturbance, and once more with signals at times drawn from a seed, each
time with the same command again. The two must agree to the last bit: held-out losses of every evaluation and
mixtures of every stage, and the weights at the end. Writes benchmarks/results/lifecycle_kills.md. What was
killed is noted, and a run of this that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.lifecycle.lives import ROOT, prepare
from benchmarks.machine import describe, table
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.lifecycle.config import Stage, load_lifecycle, resolve
from opmix_dist.lifecycle.running import ENDED
from opmix_dist.settings import read_settings

WAYS = {
    "SIGKILL to all": signal.SIGKILL,
    "SIGKILL to the stage's process": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
}
GRACE_S = 120
"""For what was asked to end."""


@dataclass(frozen=True)
class Kill:
    """What was done to a launch, and where it was."""

    way: str
    where: str
    code: int
    """How the launch's process ended; below 0: by this signal."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lifecycle-tiny.yaml")
    parser.add_argument("--undisturbed", type=Path, help="folder of one that has ended, not to run it again")
    parser.add_argument("--seconds", type=float, nargs=2, default=(20, 120), help="between two signals")
    parser.add_argument("--seed", type=int, default=0, help="of times and signals")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "lifecycle_kills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lifecycle_kills.md")
    chosen = parser.parse_args()
    chosen.runs.mkdir(parents=True, exist_ok=True)
    prepare(read_settings(chosen.config), chosen.runs / "prepare.log")
    whole = (chosen.undisturbed or chosen.runs / "undisturbed").resolve()
    if not all(stage.has_ended for stage in _stages(chosen.config, whole)):
        print("undisturbed", flush=True)
        if _start(chosen.config, whole, chosen.runs / "undisturbed.log").wait() != ENDED:
            raise SystemExit(f"the undisturbed lifecycle failed: see {chosen.runs / 'undisturbed.log'}")
    broken = (chosen.runs / f"seed{chosen.seed}").resolve()
    kills = list(_until_it_ends(chosen, broken))
    differences = list(_differences(_stages(chosen.config, whole), _stages(chosen.config, broken)))
    chosen.out.write_text(_page(chosen, kills, differences))
    print(chosen.out.read_text())
    return 1 if differences else 0


def _stages(config: Path, folder: Path) -> list[Stage]:
    return resolve(load_lifecycle(config, ["--run_dir", str(folder)]))


def _start(config: Path, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """On one thread: sums over several are the same only where their number is."""
    command = [sys.executable, "-m", "opmix_dist.cli", "lifecycle", str(config), "--run_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as messages:
        return subprocess.Popen(command, stdout=messages, stderr=messages, cwd=ROOT, env=environment)


def _until_it_ends(chosen: argparse.Namespace, folder: Path) -> Iterator[Kill]:
    """Launches, each but the last ended by a signal; those of an earlier run of this first."""
    draws = np.random.default_rng(chosen.seed)
    stages, log = _stages(chosen.config, folder), folder.with_suffix(".log")
    noted = folder.with_suffix(".jsonl")
    earlier = files.read_jsonl(noted)
    while True:
        way, seconds = str(draws.choice(list(WAYS))), draws.uniform(*chosen.seconds)
        if earlier:
            yield Kill(**earlier.pop(0))
            continue
        launch = _start(chosen.config, folder, log)
        try:
            code = launch.wait(seconds)
        except subprocess.TimeoutExpired:
            where = _where(stages)
            _send(way, launch.pid)
            kill = Kill(way, where, launch.wait(GRACE_S))
            if kill.code == ENDED and not stages[-1].has_ended:
                raise SystemExit(f"{way} in {where}: it ended as if all were done, see {log}") from None
            print(f"{kill.way}, {kill.where}: {kill.code}", flush=True)
            files.append_jsonl(noted, asdict(kill))
            yield kill
            continue
        if code != ENDED:
            raise SystemExit(f"a launch that nobody disturbed ended with {code}: see {log}")
        return


def _send(way: str, pid: int) -> None:
    parent = psutil.Process(pid)
    children = parent.children(recursive=True)
    targets = {"SIGTERM": [parent], "SIGKILL to the stage's process": children}.get(way, [parent, *children])
    for process in targets or [parent]:  # between two stages there is no child
        process.send_signal(WAYS[way])


def _where(stages: list[Stage]) -> str:
    """``midtrain, step 20`` or ``midtrain, search: probes``."""
    stage = next((stage for stage in stages if not stage.has_ended), None)
    if stage is None:
        return "at the end"
    lines = stage.run.train_lines() if stage.run.path.exists() else []
    step = lines[-1].step if lines else 0
    searches = stage.run.search_dirs() if stage.run.path.exists() else []
    status = searches[-1].status() if searches and not searches[-1].proposal_file.exists() else None
    return f"{stage.name}, step {step}" if status is None else f"{stage.name}, search: {status.stage}"


def _differences(whole: list[Stage], broken: list[Stage]) -> Iterator[str]:
    for one, other in zip(whole, broken, strict=True):
        if _told(one.run) != _told(other.run):
            yield f"{one.name}: evaluations or mixtures"
        mine, its = (_weights(run) for run in (one.run, other.run))
        if mine.keys() != its.keys() or not all(mine[name].equal(its[name]) for name in mine):
            yield f"{one.name}: weights"


def _weights(run: RunDir) -> dict[str, Tensor]:
    parts = [load_file(file) for file in sorted(run.export.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _told(run: RunDir) -> tuple[object, object]:
    losses = {line.step: line.loss for line in run.eval_lines()}
    return sorted(losses.items()), [(one.step, one.weights) for one in run.mixtures()]


def _page(chosen: argparse.Namespace, kills: list[Kill], differences: list[str]) -> str:
    rows = [[n, kill.way, kill.where, kill.code] for n, kill in enumerate(kills, 1)]
    counts = ", ".join(f"{count} {way}" for way, count in sorted(Counter(kill.way for kill in kills).items()))
    how = " ".join(["python -m benchmarks.lifecycle.kills", *sys.argv[1:]])
    verdict = (
        "Held-out losses, mixtures and weights of all stages are those of the undisturbed one to the bit."
    )
    if differences:
        verdict = f"Differs: {'; '.join(differences)}."
    return (
        f"# A lifecycle that is killed at random times\n\n`{how}`; {describe('torch')}. "
        f"{len(kills)} signals ({counts}), then to its end. {verdict}\n\n"
        f"{table(['', 'signal', 'in', 'exit code'], rows)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
