"""Counted bytes by hand, and plans of one process against the same passes on tensors that have memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from opmix_dist.config import EngineConfig, OptimizerConfig, RunConfig, check_config
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.single import SingleEngine
from opmix_dist.models.compute import Compute
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.held import deepspeed_held, megatron_held
from opmix_dist.plan.live import LiveBytes
from opmix_dist.plan.memory import StepSizes, live_bytes_of_step, rank_memory
from opmix_dist.plan.question import DataSizes
from opmix_dist.plan.searching import (
    CandidateMemory,
    candidate_memory,
    components,
    groups_of_probes,
    probe_memory,
)
from opmix_dist.pool.candidates import simulate_sums, simulate_with_gradients
from opmix_dist.pool.probes import train_probes
from tests.helpers import random_batch, tiny_llama_config

LENGTH, SAMPLES = 32, 4
FIFTY_MILLION = LlamaConfig(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=24_000,
)  # fmt: skip


def test_bytes_by_hand() -> None:
    before, resize = torch.zeros(1000), torch.UntypedStorage.resize_
    with LiveBytes() as live:
        first = before + 1  # 4,000
        view = first[10:]
        second = torch.ones(500, dtype=torch.float64)  # 4,000
        assert (live.now, live.peak) == (8000, 8000)
        del first
        assert live.now == 8000, "the view has the memory still"
        del view, second
        before.mul_(2)
        assert (live.now, live.peak) == (0, 8000)
        gathered = torch.empty(100)
        gathered.untyped_storage().resize_(0)
        assert live.now == 0
        gathered.untyped_storage().resize_(1200)
        assert live.now == 1200
    assert torch.UntypedStorage.resize_ is resize, "as it was"


def real(hf: LlamaConfig, **engine: Any) -> SingleEngine:
    world = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))
    return SingleEngine(
        ModelSource(hf),
        world,
        config=EngineConfig(name="single", **engine),
        optimizer=OptimizerConfig(),
        sequence_length=LENGTH,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"param_dtype": "bfloat16"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective", "param_dtype": "bfloat16"},
        {"logits_memory": 4096},
    ],
    ids=str,
)
def test_one_process_to_the_byte(engine: dict[str, Any], micro_batches: int) -> None:
    hf = tiny_llama_config()
    found = real(hf, **engine)
    batches = [random_batch(i, SAMPLES, LENGTH) for i in range(micro_batches)]
    peak, kept = live_bytes_of_step(found, batches)
    held = found.held_bytes()
    plan = rank_memory(
        ModelSource(hf),
        EngineConfig(name="single", **engine),
        StepSizes(1, LENGTH, SAMPLES, micro_batches),
    )
    assert (plan.parameters, plan.gradients, plan.optimizer) == (
        held.parameters,
        held.gradients,
        held.optimizer,
    )
    assert (plan.activations_and_others, plan.kept) == (max(0, peak - held.gradients), kept)


def test_a_step_of_fifty_million_parameters() -> None:
    """Of the engine's own step, with what it does besides passes: within a tenth. And its FLOPs."""
    found, batch = real(FIFTY_MILLION), random_batch(0, 16, LENGTH)
    assert found.num_parameters == pytest.approx(50e6, rel=0.1)
    with LiveBytes() as live, FlopCounterMode(display=False) as counter:
        found.train_step([batch], lr=1e-4)
    held = found.held_bytes()
    sizes = StepSizes(1, LENGTH, micro_batch_size=16)
    plan = rank_memory(ModelSource(FIFTY_MILLION), EngineConfig(name="single"), sizes)
    assert plan.total == pytest.approx(held.parameters + held.optimizer + live.peak, rel=0.1)
    flops = found.flops.train() * batch.tokens.numel()
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.1)


def run_config(**changes: Any) -> RunConfig:
    """Plain torch, as on a CPU."""
    found: dict[str, Any] = {
        "run_dir": "run",
        "model": {"config": {"model_type": "llama"}},
        "data": {"root": "data"},
        "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 4},
        "search": {
            "kernels": "torch",
            "probes": {"batch_size": 4, "micro_batch_size": 2, "rank": 4, "max_joint": 2, "steps": 1},
            "candidates": {"samples_per_domain": 2, "joint": 2, "batch_size": 3, "method": "lowrank"},
        },
    }
    for path, value in changes.items():
        section = found
        *parents, key = path.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    return check_config(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probes_against_real_ones(dtype: str) -> None:
    config, hf = run_config(engine__param_dtype=dtype), tiny_llama_config()
    names = components(config, 3)
    assert len(names) == 4
    assert groups_of_probes(config, names) == [names[::2], names[1::2]]
    plan = probe_memory(ModelSource(hf), config, names=names, sequence_length=LENGTH)
    model = LlamaForCausalLM(hf)
    batches = {name: iter([random_batch(i, 4, LENGTH)]) for i, name in enumerate(names[::2])}
    with LiveBytes() as live:
        adapters, _ = train_probes(
            model,
            batches,
            config.search.probes,
            base_lr=1e-3,
            betas=(0.9, 0.95),
            seeds=dict.fromkeys(batches, 0),
            compute=Compute(getattr(torch, dtype)),
        )
    assert plan.model == 4 * sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith((".A", ".B"))
    )
    assert plan.adapters == 16 * sum(p.numel() for p in adapters.parameters())
    assert plan.total - plan.model == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["lowrank", "merge", "gradients"])
def test_candidates_against_real_ones(kind: str) -> None:
    gradients, method = kind == "gradients", "merge" if kind == "merge" else "lowrank"
    config = run_config(search__gradients=gradients, search__candidates__method=method)
    hf, data = tiny_llama_config(), DataSizes(3, LENGTH)
    names = components(config, 3)
    plan = candidate_memory(ModelSource(hf), config, names=names, data=data, room=1 << 40)
    probes = config.search.probes
    adapters = JointAdapters(LlamaForCausalLM(hf), names, rank=probes.rank, alpha=probes.alpha, seeds=[0] * 4)
    heldout, ids = random_batch(0, 6, LENGTH), torch.arange(6) // 2
    U = np.full((2, 4), 0.25)
    with LiveBytes() as live:
        if gradients:
            simulate_with_gradients(adapters, U, heldout, ids, 3, batch_size=3)
        else:
            simulate_sums(adapters, U, heldout, method=method, joint=2, batch_size=3)  # type: ignore[arg-type]
    assert (plan.joint, plan.samples) == (2 if kind == "lowrank" else 1, 3)
    assert plan.adapters == 4 * sum(p.numel() for p in adapters.parameters())
    assert plan.passes == pytest.approx(live.peak, rel=0.1)


def test_candidates_take_smaller_passes_until_they_fit() -> None:
    config = run_config(search__candidates={"samples_per_domain": 500, "method": "lowrank"})
    names = components(config, 3)

    def plan(room: int) -> CandidateMemory:
        source, data = ModelSource(tiny_llama_config()), DataSizes(3, 4096)
        return candidate_memory(source, config, names=names, data=data, room=room)

    whole = plan(1 << 40)
    smaller = plan(whole.total - 1)
    assert smaller.total < whole.total
    assert smaller.samples * smaller.joint < whole.samples * whole.joint
    least = plan(1)
    assert (least.samples, least.joint) == (1, 1), "which does not fit either"


shapes = st.lists(st.integers(1, 3000).map(lambda n: torch.Size([n, 7])), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(1, 64), st.sampled_from([1, 2, 3]), st.sampled_from(["float32", "bfloat16"]))
def test_more_ranks_never_hold_more(shapes: list[torch.Size], ranks: int, stage: int, dtype: str) -> None:
    config = EngineConfig(name="deepspeed", deepspeed={"stage": stage}, param_dtype=dtype)
    few, many = deepspeed_held(shapes, config, ranks), deepspeed_held(shapes, config, 2 * ranks)
    for kind in ("parameters", "gradients", "optimizer"):
        assert getattr(many, kind) <= getattr(few, kind)
    megatron = EngineConfig(name="megatron", param_dtype=dtype)
    hf = tiny_llama_config()
    assert megatron_held(hf, megatron, 2 * ranks).optimizer <= megatron_held(hf, megatron, ranks).optimizer


@pytest.mark.parametrize("kind", ["none", "full"])
def test_more_shards_never_need_more(kind: str) -> None:
    """Where rows divide: else padding may cost more than the shards save."""

    def total(ranks: int) -> int:
        config = EngineConfig(name="fsdp", activation_checkpointing=kind)
        source, sizes = ModelSource(tiny_llama_config()), StepSizes(ranks, LENGTH, micro_batch_size=2)
        return rank_memory(source, config, sizes).total

    found = [total(ranks) for ranks in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
