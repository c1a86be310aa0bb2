"""What a step costs beyond its work: its results are asked for once, when all of it is queued, so that a GPU
waits for the host nowhere else; and the loss is compiled where the blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines import single
from opmix_dist.engines.base import NonFiniteError
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.models.source import ModelSource
from tests.helpers import random_batch, tiny_llama_config

LOOK, ADAMW, ASKED = "look", "adamw", "asked"
ENGINES = (SingleEngine, FSDPEngine)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank in a group of its own, which FSDP2 needs."""
    joined = World.join(Placement(Role.TRAINER, 0, 1), device="cpu", timeout_s=60)
    yield joined
    joined.leave()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW as on a GPU; the same kernel is there for CPUs."""
    plain = single.adamw
    monkeypatch.setattr(single, "adamw", lambda *given, **named: plain(*given, **{**named, "fused": True}))


def build(kind: type[SingleEngine], world: World, **config: Any) -> SingleEngine:
    return kind(
        ModelSource(tiny_llama_config(), seed=3),
        world,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(),
        sequence_length=16,
    )


class Asked(TorchFunctionMode):
    """Notes what makes the host wait for a tensor: called from Python."""

    WAITING = (
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero),
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    )

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        # by name: the device of another tensor is "cpu" in this test only
        copies = function is Tensor.to and "cpu" in args and not named.get("non_blocking")
        if function in self.WAITING or copies:
            self.events.append(ASKED)
        return function(*args, **named)


class Dispatched(TorchDispatchMode):
    """The same, called from anywhere; and AdamW."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.events.append(ASKED)
        if function is torch.ops.aten._fused_adamw_.default and ADAMW not in self.events:
            self.events.append(ADAMW)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_asked_for_until_adamw_is_queued(
    kind: type[SingleEngine], dtype: str, world: World, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plain = single.read_later

    def noted(read: Callable[[], Tensor]) -> Tensor:
        events.append(LOOK)
        return read()

    monkeypatch.setattr(single, "read_later", lambda values: partial(noted, plain(values)))
    engine = build(kind, world, param_dtype=dtype)
    batch = random_batch(0, 4, 16)
    for _ in range(2):  # what the first step finds out once is known in the second
        events.clear()
        with Asked(events), Dispatched(events):
            engine._train_step(batch.split(2), batch.targets, 60, 1e-3)
    assert events[:2] == [ADAMW, LOOK]
    assert LOOK not in events[2:]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_that_is_refused_on_the_device_changes_nothing(
    kind: type[SingleEngine], world: World, fused: None
) -> None:
    """Neither parameters nor moments nor the count of steps; the next step is as if it had not been."""
    engine, other = build(kind, world), build(kind, world)
    for step in range(2):
        for each in (engine, other):
            each.train_step([random_batch(step, 4, 16)], lr=1e-3)
    gain = dict(engine._tensors("parameter"))["model.norm.weight"]
    before = gain.clone()
    gain.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="4 training samples of the global batch"):
        engine.train_step([random_batch(2, 4, 16)], lr=1e-3)
    assert engine.optimizer_steps == 2
    gain.copy_(before)
    results = [each.train_step([random_batch(3, 4, 16)], lr=1e-3) for each in (engine, other)]
    assert torch.equal(results[0].sample_losses, results[1].sample_losses)
    assert results[0].grad_norm == results[1].grad_norm
    for kept in ("parameter", "exp_avg", "exp_avg_sq"):
        found, expected = engine._whole(kept), other._whole(kept)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_an_infinite_gradient_alone_is_refused_too(world: World, fused: None) -> None:
    """Each loss is finite, and so are the parameters; a gradient is not."""
    engine = build(SingleEngine, world)
    weight = engine._tensors("parameter")["model.embed_tokens.weight"]
    before = weight.clone()
    engine.model.get_parameter("model.embed_tokens.weight").register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient norm is"):
        engine.train_step([random_batch(0, 4, 16)], lr=1e-3)
    assert torch.equal(weight, before)
    assert engine.optimizer_steps == 0


@pytest.mark.parametrize("kind", ENGINES)
def test_the_loss_is_compiled_with_the_blocks(
    kind: type[SingleEngine], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same logits, the same losses and gradient; without a compiler, run as traced."""
    results, sources = [], []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        sources.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    for compiled in (False, True):
        torch.compiler.reset()
        engine = build(kind, world, compile=compiled)
        results.append(engine.train_step([random_batch(0, 2, 16)], lr=1e-3))
    assert sum("cross_entropy" in source for source in sources) == 1
    assert torch.allclose(results[0].sample_losses, results[1].sample_losses, rtol=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
