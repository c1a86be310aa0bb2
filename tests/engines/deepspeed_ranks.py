"""What the ranks of test_deepspeed.py do: ``python -m tests.engines.deepspeed_ranks NAME FOLDER`` under
torchrun, with one pool rank in the launch that writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tests.engines.late_imports  # noqa: F401
from opmix_dist.config import CheckpointConfig, EngineConfig, OptimizerConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.deepspeed import DeepSpeedEngine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from opmix_dist.train.checkpoint import Checkpointer
from tests.engines.ranks import (
    BATCH,
    HEAD_CHUNK,
    LENGTH,
    LR,
    MICRO,
    MODELS,
    SAVED,
    SPIKE,
    fresh,
    heldout,
    raised,
    report,
    saved,
    train,
    whole,
)
from tests.helpers import uneven_batch

TRAINERS = 2
USER = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": BATCH // MICRO // TRAINERS,
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": [0.9, 0.95], "weight_decay": "auto"}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0},
}
"""A ds_config.json as Hugging Face's trainer takes it."""
OFFLOAD = {"offload_optimizer": "cpu", "stage": 2}
OFFLOAD_ALL = {"offload_optimizer": "cpu", "offload_parameters": "cpu", "stage": 3}
# Model, settings of the engine and number of steps; the stages as such are in test_resume_matrix.py.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "stage 2, head in chunks": ("llama", {"logits_memory": HEAD_CHUNK}, 8),
    "stage 3, head in chunks": ("even", {"deepspeed": {"stage": 3}, "logits_memory": HEAD_CHUNK}, 8),
    "user's": ("qwen3", {"deepspeed": {"config": USER}}, 8),
    "offload": ("even", {"deepspeed": OFFLOAD}, 8),
    "offload all, full": ("even", {"deepspeed": OFFLOAD_ALL, "activation_checkpointing": "full"}, 8),
    "selective": ("qwen3", {"deepspeed": {"stage": 3}, "activation_checkpointing": "selective"}, 8),
}
HALVES: dict[str, tuple[str, dict[str, Any], int]] = {
    f"stage {stage}": ("llama", {"deepspeed": {"stage": stage}, "param_dtype": "bfloat16"}, 8)
    for stage in (1, 2, 3)
}
WRITERS: dict[str, dict[str, Any]] = {
    "stage1": {"deepspeed": {"stage": 1}},
    "stage2": {"deepspeed": {"stage": 2, "native_checkpoints": True}},
    "stage3": {"deepspeed": {"stage": 3}},
    "offload": {"deepspeed": OFFLOAD_ALL},
    "half1": {"deepspeed": {"stage": 1}, "param_dtype": "bfloat16"},
    "half3": {"deepspeed": {"stage": 3}, "param_dtype": "bfloat16"},
    "fsdp": {"name": "fsdp"},
}
RAISING: dict[str, dict[str, Any]] = {
    "stage 2": {},
    "stage 3": {"deepspeed": {"stage": 3}},
    "half 1": {"deepspeed": {"stage": 1}, "param_dtype": "bfloat16"},
    "offload": {"deepspeed": OFFLOAD},
}
# By number of ranks: who continues whose checkpoints, each written by two.
CROSSINGS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"stage1": ("fsdp",), "stage3": ("stage2",)},
    3: {"stage3": ("stage2", "offload")},
}


def build(world: World, source: ModelSource, config: dict[str, Any]) -> Engine:
    kind = FSDPEngine if config.get("name") == "fsdp" else DeepSpeedEngine
    return kind(
        source,
        world,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


def write(world: World, out: Path) -> None:
    """Curves of all cases; of each writer the steps after its checkpoint, as it goes on and from the
    checkpoint; a NaN."""
    report(world, out / "curves.json", {name: curve(world, *case) for name, case in CASES.items()})
    report(world, out / "halves.json", {name: curve(world, *case) for name, case in HALVES.items()})
    report(world, out / "exact.json", {name: exact(world, out, name) for name in WRITERS})
    unwritable = {f"stage {stage}": not_written(world, out / f"native_{stage}", stage) for stage in (2, 3)}
    (out / f"native_{world.rank}.json").write_text(json.dumps(unwritable))
    raising = {name: non_finite(world, case) for name, case in RAISING.items()}
    (out / f"raised_{world.rank}.json").write_text(json.dumps(raising))


def curve(world: World, model: str, config: dict[str, Any], steps: int) -> dict[str, Any]:
    engine = build(world, fresh(model), config)
    found = train(engine, 0, steps)
    return {"model": model, "steps": found, "evaluation": engine.evaluate(heldout(), batch_size=2).tolist()}


def exact(world: World, out: Path, name: str) -> dict[str, Any]:
    engine = build(world, fresh("llama"), WRITERS[name])
    checkpointer, _ = saved(world, engine, out / "runs" / name)
    before = whole(engine)
    shared = engine.share()
    rest = train(engine, SAVED, 2 * SAVED)
    checkpointer.wait()
    again = build(world, ModelSource(MODELS["llama"], seed=4), WRITERS[name])
    load(world, out / "runs" / name, again)
    differ = [key for key, tensor in whole(again).items() if not torch.equal(tensor, before[key])]
    return {
        "rest": rest,
        "again": train(again, SAVED, 2 * SAVED),
        "differ": differ,
        "shared": all(torch.equal(t, before[f"parameter {key}"]) for key, t in shared.items()),
    }


def not_written(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """DeepSpeed's own checkpoint where its folder cannot be, where rank 1 cannot write its file, and in the
    end: what is there after each; a training step more."""
    engine = build(world, fresh("llama"), {"deepspeed": {"stage": stage, "native_checkpoints": True}})
    train(engine, 0, 1)
    found = []
    tag = folder / "deepspeed" / "step_1"
    for obstacle in ("deepspeed", "deepspeed/step_1/zero_pp_rank_1_mp_rank_00_optim_states.pt", None):
        if world.is_leader:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if obstacle == "deepspeed":
                (folder / obstacle).write_text("a file in the folder's place")
            elif obstacle:
                (folder / obstacle).mkdir(parents=True)
        world.barrier()
        engine.save_beside(folder)
        world.barrier()
        found.append([tag.exists(), (folder / "deepspeed" / "latest").exists()])
        world.barrier()  # the next obstacle is put there when all have looked
    return {"found": found, "after": train(engine, 1, 2)}


def load(world: World, run: Path, engine: Engine) -> None:
    checkpointer = Checkpointer(RunDir(run), CheckpointConfig(), world)
    state = checkpointer.load(engine, SAVED)
    assert state.step == engine.optimizer_steps == SAVED


def continue_all(world: World, out: Path) -> None:
    found: dict[str, Any] = {}
    for reader, runs in CROSSINGS[world.size].items():
        for written in runs:
            engine = build(world, ModelSource(MODELS["llama"], seed=4), WRITERS[reader])
            load(world, out / "runs" / written, engine)
            found[f"{reader} continues {written}"] = [written, train(engine, SAVED, 2 * SAVED)]
    report(world, out / f"continued_{world.size}.json", found)


def non_finite(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A NaN in a sample's loss on one rank, in a micro-batch before the last, and a loss above the limit: all
    ranks raise, and nothing is changed; the next step is as if nothing had been."""
    engine, untouched = (build(world, fresh("llama"), config) for _ in range(2))
    for one in (engine, untouched):
        train(one, 0, 1)
    before = whole(engine)
    batch = uneven_batch(0, BATCH // world.size, LENGTH)
    assert isinstance(engine, DeepSpeedEngine)
    losses, calls = engine._losses, iter(range(99))

    def broken(part: Any) -> Tensor:
        nan = world.rank == 1 and next(calls) == 0
        return losses(part) * (float("nan") if nan else 1.0)

    engine._losses = broken  # type: ignore[method-assign]
    errors = [raised(engine, dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)))]
    engine._losses = losses  # type: ignore[method-assign]
    errors.append(raised(engine, batch, loss_limit=SPIKE))
    moved = [key for key, tensor in whole(engine).items() if not torch.equal(tensor, before[key])]
    steps = engine.optimizer_steps
    after, expected = train(engine, 1, 3), train(untouched, 1, 3)
    return {"errors": errors, "moved": moved, "steps": steps, "after": after, "expected": expected}


def alone(world: World, out: Path) -> None:
    """The pool rank has a world of its own: a single trainer, in a launch of three ranks."""
    while not (out / "exact.json").exists():
        time.sleep(0.1)
    continue_all(world, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    placement = Placement.from_environment(pool_ranks=1 if name == "write" else 0)
    joined = World.join(placement, device="cpu", timeout_s=120)
    task = alone if placement.role is Role.POOL else {"write": write, "continue_all": continue_all}[name]
    task(joined, folder)
    joined.leave()
    end_process(0)
