"""What the ranks of test_held.py do: ``python -m tests.engines.held_ranks FOLDER`` under torchrun, two of
them."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

import tests.engines.late_imports  # noqa: F401
from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.determinism import use_deterministic_kernels
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.build import engine_class
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from tests.helpers import random_batch

LENGTH, SAMPLES, STEPS = 16, 8, 3
MODEL = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256,
)  # fmt: skip
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 500}}
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"name": "fsdp"},
    "fsdp, replicas": {"name": "fsdp", "fsdp": {"replicas": 2}},
    # a buffer of its default 500 million numbers is filled before each use, where kernels are deterministic
    "zero 1": {"name": "deepspeed", "deepspeed": {"stage": 1, "config": SMALL_BUCKETS}},
    "zero 2, bfloat16": {
        "name": "deepspeed",
        "deepspeed": {"stage": 2, "config": SMALL_BUCKETS},
        "param_dtype": "bfloat16",
    },
    "zero 3": {"name": "deepspeed", "deepspeed": {"stage": 3, "config": SMALL_BUCKETS}},
    "megatron": {"name": "megatron", "megatron": {"vocab_multiple": 1}},
    "megatron, tensor": {"name": "megatron", "megatron": {"tensor_parallel": 2, "vocab_multiple": 1}},
    "megatron, bfloat16": {"name": "megatron", "megatron": {"vocab_multiple": 1}, "param_dtype": "bfloat16"},
}


def build(world: World, config: dict[str, Any]) -> Engine:
    return engine_class(config["name"])(
        ModelSource(MODEL, seed=3),
        world,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(lr=1e-2),
        sequence_length=LENGTH,
    )


def train(engine: Engine) -> list[list[float]]:
    """Losses of this rank's samples and the gradient's norm, of each step."""
    found = []
    for step in range(STEPS):
        batch = random_batch(step, SAMPLES, LENGTH)
        result = engine.train_step(share(engine, batch).split(2), lr=1e-2)
        found.append([*result.sample_losses.tolist(), result.grad_norm])
    return found


def share(engine: Engine, batch: TokenBatch) -> TokenBatch:
    size = len(batch) // engine.replica.size
    return batch[slice(engine.replica.rank * size, (engine.replica.rank + 1) * size)]


def live_bytes() -> int:
    """Behind all tensors that there are, each buffer once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # isinstance would wake lazy modules
            local = found.to_local() if isinstance(found, DTensor) else found
            if local.device.type == "cpu":
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def look(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes that the engine says it holds, those that its building and training have left, and its curve,
    twice."""
    before = live_bytes()
    engine = build(world, config)
    curve = train(engine)
    live = live_bytes() - before
    held = asdict(engine.held_bytes())
    again = train(build(world, config))
    return {"held": held, "live": live, "curve": curve, "again": again, "parameters": engine.num_parameters}


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_deterministic_kernels()
    joined = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=120)
    found = {name: look(joined, config) for name, config in CASES.items()}
    (Path(sys.argv[1]) / f"held_{joined.rank}.json").write_text(json.dumps(found))
    joined.leave()
    end_process(0)
