"""What the ranks of test_resume_matrix.py do: ``python -m tests.engines.matrix_ranks FOLDER`` under torchrun,
on four ranks.

One launch holds the worlds of all sizes, one after the other, since to import everything takes longer than
any of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import tests.engines.late_imports  # noqa: F401
from opmix_dist.config import CheckpointConfig, EngineConfig, OptimizerConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import KINDS, Engine
from opmix_dist.engines.build import engine_class
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from opmix_dist.train.checkpoint import Checkpointer, SafePlanner, SafeReader
from opmix_dist.train.model_writer import ModelWriter
from tests.engines.ranks import LENGTH, LR, SAVED, STEPS, report, saved, train
from tests.helpers import tiny_llama_config

RANKS = 4
MORE = 2
"""Steps after a checkpoint."""
MODEL = tiny_llama_config(vocab_size=512, tied=True)  # 512 is the vocabulary of the data that searches read
MODEL.pad_token_id = 0  # which transformers would not train as an input; it is in every batch
TENSOR = {"tensor_parallel": 2, "vocab_multiple": 96}  # 32 rows of padding on the second rank


class Layout(NamedTuple):
    ranks: int
    engine: dict[str, Any]


SHORT = ("single", "FSDP x3", "FSDP x2, TP2", "ZeRO-2 x2", "ZeRO-3 x2", "Megatron TP2 PP2")
"""Without RESUME_MATRIX in the environment: one of each kind, each of their pairs."""
# Without stage 3 on three ranks, which numbers modules over a process's life, and compares the numbers: ranks
# that have been in different worlds differ. test_deepspeed.py has it.
LAYOUTS = {
    "single": Layout(1, {"name": "single"}),
    "FSDP x2": Layout(2, {"name": "fsdp"}),
    "FSDP x3": Layout(3, {"name": "fsdp"}),
    "HSDP 2x2": Layout(4, {"name": "fsdp", "fsdp": {"replicas": 2}}),
    "FSDP x2, TP2": Layout(4, {"name": "fsdp", "fsdp": {"tensor_parallel": 2}}),
    "ZeRO-1 x2": Layout(2, {"name": "deepspeed", "deepspeed": {"stage": 1}}),
    "ZeRO-2 x2": Layout(2, {"name": "deepspeed", "deepspeed": {"stage": 2}}),
    "ZeRO-3 x2": Layout(2, {"name": "deepspeed", "deepspeed": {"stage": 3}}),
    "ZeRO-1 x3": Layout(3, {"name": "deepspeed", "deepspeed": {"stage": 1}}),
    "Megatron TP2": Layout(2, {"name": "megatron", "megatron": {**TENSOR, "sequence_parallel": True}}),
    "Megatron PP2": Layout(2, {"name": "megatron", "megatron": {"pipeline_parallel": 2}}),
    "Megatron TP2 DP2": Layout(4, {"name": "megatron", "megatron": TENSOR}),
    "Megatron TP2 PP2": Layout(4, {"name": "megatron", "megatron": {**TENSOR, "pipeline_parallel": 2}}),
}

if "RESUME_MATRIX" not in os.environ:
    LAYOUTS = {name: LAYOUTS[name] for name in SHORT}


def build(world: World, name: str, seed: int) -> Engine:
    config = EngineConfig(**LAYOUTS[name].engine)
    return engine_class(config.name)(
        ModelSource(MODEL, seed=seed),
        world,
        config=config,
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


def write(world: World, out: Path) -> None:
    """Of each layout of this size: a curve, a checkpoint after the first four, a snapshot after the last."""
    for name, layout in LAYOUTS.items():
        if layout.ranks == world.size:
            engine = build(world, name, seed=3)
            checkpointer, steps = saved(world, engine, out / "runs" / name)
            steps += train(engine, SAVED, STEPS)
            checkpointer.wait()
            writer = ModelWriter(world, engine, ModelSource(MODEL, seed=3))
            snapshot = RunDir(out / "searches" / name).snapshot(STEPS)
            assert writer.write(snapshot, dtype=torch.float32, marker={"step": STEPS}) == ""
            report(world, out / f"written {name}.json", steps)


def read(world: World, out: Path) -> None:
    """Each layout of this size continues everyone's checkpoint."""
    for name, layout in LAYOUTS.items():
        if layout.ranks == world.size:
            engine = build(world, name, seed=4)
            found = {written: continued(world, engine, RunDir(out / "runs" / written)) for written in LAYOUTS}
            report(world, out / f"continued {name}.json", found)


def continued(world: World, engine: Engine, run: RunDir) -> dict[str, Any]:
    """The steps after the checkpoint, and which of its tensors the engine has not taken over bit by bit.
    Numbers that no checkpoint has are in the engine before."""
    engine.load_state(_spoil)
    checkpointer = Checkpointer(run, CheckpointConfig(), world)
    checkpointer.load(engine, SAVED)
    expected = on_disk(run.checkpoint(SAVED), engine.shapes)
    differ = [
        f"{kind} {name}"
        for kind in KINDS
        for name, tensor in engine._whole(kind)
        if not torch.equal(tensor, expected[kind][name])
    ]
    steps = engine.optimizer_steps
    return {"differ": differ, "optimizer_steps": steps, "steps": train(engine, SAVED, SAVED + MORE)}


def _spoil(part: dict[str, Any]) -> None:
    for value in part.values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            tensor.fill_(99)


def on_disk(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    """By kind and name."""
    found = {kind: {name: torch.empty(shape) for name, shape in shapes.items()} for kind in KINDS}
    dcp.load(found, storage_reader=SafeReader(checkpoint), planner=SafePlanner(), no_dist=True)
    return found


def write_and_read(world: World, out: Path) -> None:
    """In one world, since torch keeps plans of tensor-parallel meshes over a process's life."""
    write(world, out)
    read(world, out)


# One after the other; in each, ranks 0 to n - 1 are one world, and rank 2 may be another one meanwhile. None
# reads before all have written.
PHASES: tuple[tuple[Callable[[World, Path], None], int], ...] = (
    (write, 3), (write, 2), (write_and_read, 4), (read, 2), (read, 3),
)  # fmt: skip


def run_phases(rank: int, out: Path) -> None:
    for phase, (task, size) in enumerate(PHASES):
        if rank < size:
            in_world(Placement(Role.TRAINER, rank, size), 2 * phase, task, out)
        elif size == rank == 2:
            in_world(Placement(Role.TRAINER, 0, 1), 2 * phase + 1, task, out)


def in_world(placement: Placement, generation: int, task: Callable[[World, Path], None], out: Path) -> None:
    world = World.join(placement, device="cpu", timeout_s=300, generation=generation)
    task(world, out)
    dist.barrier()
    backend = sys.modules.get("deepspeed.comm.comm")
    if backend is None or backend.cdb is None:
        dist.destroy_process_group()
    else:  # DeepSpeed keeps groups of its own
        backend.destroy_process_group()
        backend.cdb = None


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_phases(Placement.from_environment(pool_ranks=0).rank, Path(sys.argv[1]))
    end_process(0)
