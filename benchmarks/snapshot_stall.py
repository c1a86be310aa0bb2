"""How long the snapshot that a search starts from holds training up, beside what a step takes.

    python -m benchmarks.snapshot_stall [--quick] [--out benchmarks/results/snapshot_stall.md]

Each engine trains the model of configs/demo.yaml, with that file's batches, and a larger one, on random
tokens and two ranks (`single`: one). Rounds of steps, a snapshot, and steps while it is written alternate, so
that whatever else the machine does falls on all of them. The stall is the time in ``ModelWriter.begin``, of
the rank that waits longest; ranks then go on training, and look once a step whether all have written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.machine import describe, table
from opmix_dist.config import EngineConfig, OptimizerConfig, load_config
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.build import engine_class
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from opmix_dist.train.model_writer import ModelWriter

ROOT = Path(__file__).parent.parent
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"name": "single"}),
    "fsdp": (2, {"name": "fsdp"}),
    "deepspeed, ZeRO 1": (2, {"name": "deepspeed", "deepspeed": {"stage": 1}}),
    "deepspeed, ZeRO 2": (2, {"name": "deepspeed", "deepspeed": {"stage": 2}}),
    "deepspeed, ZeRO 3": (2, {"name": "deepspeed", "deepspeed": {"stage": 3}}),
    "megatron, 2 replicas": (2, {"name": "megatron"}),
    "megatron, tensor 2": (2, {"name": "megatron", "megatron": {"tensor_parallel": 2}}),
}
"""Ranks and settings of each."""
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, and the samples of a step."""

    config: dict[str, Any]
    samples: int
    micro: int
    length: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Medians in seconds. ``writing`` is a step while the snapshot is written, ``written`` the time from its
    begin to its completion."""

    parameters: int
    step: float
    stall: float
    writing: float
    written: float


def works(quick: bool) -> dict[str, Work]:
    demo = load_config(ROOT / "configs" / "demo.yaml")
    assert demo.model.config is not None
    train = demo.train
    built_in = Work(
        {**demo.model.config, "vocab_size": 4096}, train.global_batch_size, train.micro_batch_size, 256
    )
    larger = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16_384,
    }  # fmt: skip
    if quick:
        return {"demo": dataclasses.replace(built_in, samples=4, micro=2, length=32)}
    return {"demo": built_in, "larger": Work(larger, 4, 2, 128)}


def measure(world: World, work: Work, settings: dict[str, Any], rounds: int, folder: Path) -> Times:
    """Collective."""
    fields = {name: value for name, value in work.config.items() if name != "model_type"}
    source = ModelSource(AutoConfig.for_model(work.config["model_type"], **fields))
    engine = engine_class(settings["name"])(
        source,
        world,
        config=EngineConfig(**settings),
        optimizer=OptimizerConfig(),
        sequence_length=work.length,
    )
    writer = ModelWriter(world, engine, source)
    steps, stalls, writing, written = [], [], [], []
    train(engine, work)
    for number in range(rounds):
        steps += [timed(world, lambda: train(engine, work)) for _ in range(3)]
        start = time.perf_counter()
        target = folder / f"step_{number}"
        stalls.append(timed(world, partial(writer.begin, target, dtype=torch.float32, marker={})))
        while True:
            writing.append(timed(world, lambda: train(engine, work)))
            failure = writer.poll()
            if failure is not None:
                break
        assert failure == ""
        written.append(time.perf_counter() - start)
    found = (statistics.median(values) for values in (steps, stalls, writing, written))
    return Times(engine.num_parameters, *found)


def train(engine: Engine, work: Work) -> None:
    share = work.samples // engine.replica.size
    tokens = torch.randint(work.config["vocab_size"], (share, work.length))
    engine.train_step(TokenBatch.of_tokens(tokens).split(work.micro), lr=1e-4)


def timed(world: World, action: Callable[[], object]) -> float:
    """Seconds of the slowest rank. Collective."""
    world.barrier()
    start = time.perf_counter()
    action()
    seconds = torch.zeros(world.size, dtype=torch.float64)
    seconds[world.rank] = time.perf_counter() - start
    return float(world.sum(seconds).max())


def run_ranks(arguments: argparse.Namespace) -> None:
    """What each rank of a launch does: all engines of this number of ranks, one after the other."""
    torch.set_num_threads(1)
    world = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=600)
    found = {}
    for model, work in works(arguments.quick).items():
        for name, (ranks, settings) in ENGINES.items():
            if ranks == world.size:
                torch.manual_seed(world.rank)
                folder = arguments.rank_folder / f"{model} {name}"
                found[f"{model}/{name}"] = dataclasses.asdict(
                    measure(world, work, settings, 1 if arguments.quick else ROUNDS, folder)
                )
    if world.is_leader:
        (arguments.rank_folder / f"times_{world.size}.json").write_text(json.dumps(found))
    world.leave()
    end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small batches: does it run?")
    parser.add_argument("--out", type=Path, help="file for the table in markdown; default: standard output")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_folder:
        run_ranks(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({ranks for ranks, _ in ENGINES.values()}):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc-per-node={ranks}", "-m", "benchmarks.snapshot_stall"]
            options = ["--rank-folder", folder, *(["--quick"] if arguments.quick else [])]
            subprocess.run([*command, *options], check=True, cwd=ROOT)
        times = {
            name: Times(**row)
            for file in sorted(Path(folder).glob("times_*.json"))
            for name, row in json.loads(file.read_text()).items()
        }
    text = report(times)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


def report(times: dict[str, Times]) -> str:
    rows = []
    for name, row in sorted(times.items(), key=lambda item: item[0].partition("/")[0]):
        model, _, engine = name.partition("/")
        seconds = [f"{value:.3f}" for value in (row.step, row.stall)]
        tail = [f"{row.stall / row.step:.2f}", f"{row.writing / row.step:.2f}", f"{row.written:.2f}"]
        rows.append([model, f"{row.parameters / 1e6:.1f} M", engine, *seconds, *tail])
    head = ["model", "parameters", "engine", "step, s", "stall, s", "stall / step"]
    head += ["step while writing / step", "complete after, s"]
    lines = [
        "# How long a snapshot holds training up",
        "`python -m benchmarks.snapshot_stall`. Medians over rounds of three steps and a snapshot; two ranks "
        "(single: one), a thread each, float32 files.",
        describe("torch", "transformers", "deepspeed", "megatron-core")
        + f", load average {os.getloadavg()[1]:.0f} at the end: above the number of cores, seconds are "
        "longer than on a free machine, and ratios are of the same minutes.",
        table(head, rows),
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
