"""What the ranks of test_ranks.py do: ``python -m tests.plan.plan_ranks FOLDER`` under torchrun, two of them.

Each engine is built and makes its passes for real; the bytes of its tensors are counted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import tests.engines.late_imports  # noqa: F401
from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.build import engine_class
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.live import LiveBytes
from opmix_dist.plan.memory import live_bytes_of_step
from opmix_dist.process import end_process
from tests.helpers import random_batch

LENGTH, SAMPLES = 64, 8
MODEL = LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256,
)  # fmt: skip
BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_live_parameters": 60_000,
        "stage3_param_persistence_threshold": 100,
    }
}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "fsdp": ({"name": "fsdp"}, 1),
    "fsdp, two micro-batches": ({"name": "fsdp"}, 2),
    "fsdp, bfloat16, two micro-batches": ({"name": "fsdp", "param_dtype": "bfloat16"}, 2),
    "fsdp, replicas": ({"name": "fsdp", "fsdp": {"replicas": 2}}, 1),
    "fsdp, tensor": ({"name": "fsdp", "fsdp": {"tensor_parallel": 2}}, 1),
    "fsdp, full": ({"name": "fsdp", "activation_checkpointing": "full"}, 1),
    "fsdp, selective, chunks": (
        {"name": "fsdp", "activation_checkpointing": "selective", "logits_memory": 1 << 17},
        1,
    ),
    "fsdp, gathered": ({"name": "fsdp", "reshard_after_forward": False}, 1),
    "zero 1": ({"name": "deepspeed", "deepspeed": {"stage": 1, "config": BUCKETS}}, 1),
    "zero 2, bfloat16": (
        {"name": "deepspeed", "deepspeed": {"stage": 2, "config": BUCKETS}, "param_dtype": "bfloat16"},
        1,
    ),
    "zero 3": ({"name": "deepspeed", "deepspeed": {"stage": 3, "config": BUCKETS}}, 1),
    "megatron": ({"name": "megatron", "megatron": {"vocab_multiple": 1}}, 1),
    "megatron, bfloat16": (
        {"name": "megatron", "megatron": {"vocab_multiple": 1}, "param_dtype": "bfloat16"},
        1,
    ),
    "megatron, tensor": (
        {"name": "megatron", "megatron": {"tensor_parallel": 2, "vocab_multiple": 1}},
        1,
    ),
    "megatron, stages": (
        {"name": "megatron", "megatron": {"pipeline_parallel": 2, "vocab_multiple": 100}},
        2,
    ),
}
"""Settings of the engine, and micro-batches of a step."""


def measure(world: World, settings: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    engine: Engine = engine_class(settings["name"])(
        ModelSource(MODEL, seed=3),
        world,
        config=EngineConfig(**settings),
        optimizer=OptimizerConfig(),
        sequence_length=LENGTH,
    )
    batches = [random_batch(i, SAMPLES, LENGTH) for i in range(micro_batches)]
    return {"held": asdict(engine.held_bytes()), "peak": peak(engine, batches)}


def peak(engine: Any, batches: list[TokenBatch]) -> int:
    """Of the passes; of Megatron's schedule and DeepSpeed's backward pass, with their own buffers."""
    name = engine.config.name
    if name == "fsdp":
        return live_bytes_of_step(engine, batches)[0]
    with LiveBytes() as live:
        if name == "megatron":
            with engine._megatron():
                engine._run(batches, forward_only=False)
        else:
            engine.engine.backward(engine._losses(batches[0]).sum(), scale_wrt_gas=False)
    return live.peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=120)
    found = {name: measure(joined, *case) for name, case in CASES.items()}
    (Path(sys.argv[1]) / f"plan_{joined.rank}.json").write_text(json.dumps(found))
    joined.leave()
    end_process(0)
