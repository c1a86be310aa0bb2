"""Settings of engines that contradict each other, the model or the number of ranks: named before anything
runs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from opmix_dist.config import EngineConfig, OptimizerConfig, RunConfig, check_config
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.build import build_engine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.engines.tensor_parallel import require_parallelizable
from opmix_dist.errors import UserError
from opmix_dist.models.source import ModelSource
from tests.helpers import random_batch, tiny_llama_config
from tests.train.jobs import tiny_config


def world(ranks: int = 1, rank: int = 0) -> World:
    return World(Placement(Role.TRAINER, rank, ranks), torch.device("cpu"))


def config(**engine: Any) -> RunConfig:
    return check_config(tiny_config(Path("data"), Path("run"), engine=engine))


def build(kind: type[SingleEngine], ranks: int = 1, **engine: Any) -> SingleEngine:
    return kind(
        ModelSource(tiny_llama_config()),
        world(ranks),
        config=EngineConfig(**engine),
        optimizer=OptimizerConfig(),
        sequence_length=16,
    )


def test_single_runs_on_one_rank() -> None:
    with pytest.raises(UserError, match="engine.name single runs on one trainer rank, not 2: set it to fsdp"):
        build_engine(config(name="single"), ModelSource(tiny_llama_config()), world(2), 16)
    found = build_engine(config(), ModelSource(tiny_llama_config()), world(), 16)
    assert type(found) is SingleEngine, "auto"


def test_a_mesh_that_does_not_fit_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"fsdp.replicas 2 x engine.fsdp.tensor_parallel 3 does not divide 4"):
        build(FSDPEngine, ranks=4, fsdp={"replicas": 2, "tensor_parallel": 3})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GPT2Config(), "knows llama, mistral, qwen2, qwen3, not gpt2: set it to 1"),
        (tiny_llama_config(), "4 does not divide the model's num_key_value_heads 2: set it to a divisor"),
        (LlamaConfig(vocab_size=50257), "4 does not divide the model's vocab_size 50257"),
    ],
)
def test_what_cannot_be_divided_over_neighbours_is_named(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_parallelizable(model, 4)
    require_parallelizable(tiny_llama_config(), 2)


def test_loss_parallel_alone_is_refused() -> None:
    with pytest.raises(UserError, match="engine.fsdp.loss_parallel needs engine.fsdp.tensor_parallel of 2"):
        config(fsdp={"loss_parallel": True})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which may do it")
def test_float8_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="engine.float8 needs a GPU of compute capability 8.9"):
        build(SingleEngine, float8=True)


@pytest.mark.parametrize(("name", "package"), [("deepspeed", "deepspeed"), ("megatron", "megatron")])
def test_an_engine_without_its_package_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith(f"opmix_dist.engines.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # Python takes it for not installed then
    with pytest.raises(UserError, match=f"engine.name {name} needs the package {package}: install it"):
        build_engine(config(name=name), ModelSource(tiny_llama_config()), world(), 16)


def test_runs_from_before_there_were_kinds_of_recomputation_can_be_resumed() -> None:
    assert config(activation_checkpointing=True).engine.activation_checkpointing == "full"
    assert config(activation_checkpointing=False).engine.activation_checkpointing == "none"


def test_parameters_without_a_gradient_take_their_steps_too() -> None:
    """An expert that no sample was sent to: its gradient is 0, and its step count that of the others."""
    engine = build(SingleEngine)
    unused = torch.nn.Parameter(torch.ones(3))
    engine.model.register_parameter("unused", unused)
    engine._complete_gradients()
    assert unused.grad is not None
    assert not unused.grad.any()


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_blocks_are_compiled_whatever_they_recompute(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without a graph break, and run as traced: no C++ compiler is needed."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    losses = []
    for compiled in (False, True):
        torch.compiler.reset()
        engine = build(SingleEngine, compile=compiled, activation_checkpointing=kind)
        result = engine.train_step([random_batch(0, 2, 16)], lr=1e-3)
        losses.append([*result.sample_losses.tolist(), result.grad_norm])
        assert bool(graphs) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_is_recomputed_is_what_the_setting_says() -> None:
    """2 FLOPs x 2 blocks x 32 tokens x (queries and output 2 x 32 x 32, keys and values 2 x 32 x 16, gate and
    up 2 x 32 x 48); the last product of a block has no use in the backward pass."""
    products = {}
    for kind in ("none", "selective", "full"):
        engine = build(SingleEngine, activation_checkpointing=kind)
        with FlopCounterMode(display=False) as counter:
            engine.train_step([random_batch(0, 2, 16)], lr=1e-3)
        products[kind] = counter.get_total_flops()
    assert products["selective"] == products["none"]
    assert products["full"] - products["none"] == 2 * 2 * 32 * (2048 + 1024 + 3072)
