"""EWC and MAS against closed forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.engines.base import NonFiniteError
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.methods.ewc import EWC
from opmix_dist.methods.mas import MAS
from opmix_dist.methods.stored import combined
from opmix_dist.models.source import ModelSource
from opmix_dist.seeds import derive_seed
from tests.helpers import tiny_llama_config, uneven_batch
from tests.methods.linear import LinearEngine, Points, around, config_of

HEAD = "lm_head.weight"


def points(seed: int, w: list[float], noise: float, count: int = 12) -> Points:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(count, len(w))) * np.array([2.0, 1.0, 0.3]))
    return Points.of(
        x, x @ torch.tensor(w, dtype=torch.float64) + noise * torch.from_numpy(rng.normal(size=count))
    )


def ewc(engine: SingleEngine, data: Path, run: Path, **settings: Any) -> EWC:
    return EWC(
        around(engine, config_of(data, run, {"name": "ewc", "ewc": {"domains": ["json"], **settings}}))
    )


def test_ewc_ends_where_loss_and_penalty_balance(tiny_data: Path, tmp_path: Path) -> None:
    """Linear regression: (X^T X / n + lambda diag F) w = X^T y / n + lambda F w*, with F_j the mean over old
    samples of (residual * x_j)^2."""
    old, new, strength = points(0, [1.0, -1.0, 2.0], 0.5), points(1, [-1.0, 1.0, 0.5], 0.1), 3.0
    engine = LinearEngine([0.9, -1.1, 2.2])
    start = engine.w
    method = ewc(engine, tiny_data, tmp_path, strength=strength)
    method.importance = method.measure(old)
    method.anchor = {"weight": start[None].clone()}
    residuals = old.x @ start - old.y
    F = (residuals[:, None] * old.x).square().mean(dim=0)
    torch.testing.assert_close(method.importance["weight"][0], F)

    for step in range(500):
        work = method.prepare(step, new.split(5))
        engine.train_step(work.microbatches, lr=0.05 * 0.985**step, adjust=work.adjust)
    n = len(new)
    expected = torch.linalg.solve(
        new.x.T @ new.x / n + strength * F.diag(), new.x.T @ new.y / n + strength * F * start
    )
    torch.testing.assert_close(engine.w, expected, rtol=1e-3, atol=1e-3)
    without = torch.linalg.solve(new.x.T @ new.x, new.x.T @ new.y)
    assert (expected - without).abs().max() > 0.3, "the penalty moves nothing"
    method._step = 3  # of a step that is logged
    penalty = 0.5 * strength * (F * (engine.w - start).square()).sum()
    assert method.numbers() == {"penalty": pytest.approx(penalty.item(), rel=1e-3)}
    method._step = 4
    assert method.numbers() == {}


def test_a_bad_step_leaves_everything_as_it_was(tiny_data: Path, tmp_path: Path) -> None:
    engine = LinearEngine([1.0, 2.0, 3.0])
    method = ewc(engine, tiny_data, tmp_path)
    method.importance, method.anchor = (
        method.measure(points(0, [1.0, 1.0, 1.0], 0.1)),
        {"weight": torch.zeros(1, 3, dtype=torch.float64)},
    )
    batch = points(1, [0.0, 0.0, 0.0], 0.1)
    before = engine.w
    bad = dataclasses.replace(batch, y=batch.y * float("nan"))
    work = method.prepare(0, [bad])
    with pytest.raises(NonFiniteError):
        engine.train_step(work.microbatches, lr=0.1, adjust=work.adjust)
    assert torch.equal(engine.w, before)
    work = method.prepare(0, [batch])
    once = LinearEngine([1.0, 2.0, 3.0])
    other = ewc(once, tiny_data, tmp_path)
    other.importance, other.anchor = method.importance, method.anchor
    engine.train_step(work.microbatches, lr=0.1, adjust=work.adjust)
    work = other.prepare(0, [batch])
    once.train_step(work.microbatches, lr=0.1, adjust=work.adjust)
    assert torch.equal(engine.w, once.w)


def test_penalties_of_several_runs_are_one_quadratic() -> None:
    """2 (t - 1)^2 + 3 (t + 4)^2 = 5 (t + 2)^2 + 30; where nothing is important, the last anchor stands."""
    one, two = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.0])
    first, second = torch.tensor([1.0, 7.0]), torch.tensor([-4.0, 9.0])
    found = combined([({"w": one}, {"w": first}), ({"w": two}, {"w": second})])
    assert found["importance"]["w"].tolist() == [5.0, 0.0]
    assert found["anchor"]["w"].tolist() == [-2.0, 9.0]


@pytest.fixture(scope="module")
def engine() -> SingleEngine:
    return SingleEngine(
        ModelSource(tiny_llama_config(), seed=3),
        LinearEngine([0.0]).world,
        config=EngineConfig(),
        optimizer=OptimizerConfig(),
        sequence_length=16,
    )


def hidden(engine: SingleEngine, batch: Any) -> list[tuple[Tensor, Tensor]]:
    """For each sample: hidden states [R, d] before its targets, and these [R]."""
    model: Any = engine.model
    with torch.no_grad():
        states = model.model(
            input_ids=batch.tokens, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    return [
        (state[:-1][mask[1:]], tokens[1:][mask[1:]])
        for state, mask, tokens in zip(states, batch.loss_mask, batch.tokens, strict=True)
    ]


def old_batch() -> Any:
    batch = uneven_batch(5, 6, 16, mask_documents=True)
    return batch[batch.targets > 0]


def test_fisher_of_a_language_models_head(engine: SingleEngine, tiny_data: Path, tmp_path: Path) -> None:
    """Of logits W h, a sample's gradient is sum_t (p_t - onehot_t) h_t^T; its square, summed over samples,
    over the number of targets."""
    batch = old_batch()
    W = engine.parts()[HEAD].clone()
    squares = torch.zeros_like(W)
    for states, targets in hidden(engine, batch):
        p = (states @ W.T).softmax(dim=1)
        p[torch.arange(len(p)), targets] -= 1
        squares += (p.T @ states).square()
    method = ewc(engine, tiny_data, tmp_path)
    found = method.measure(batch)
    torch.testing.assert_close(found[HEAD], squares / batch.targets.sum(), rtol=1e-4, atol=1e-9)
    assert set(found) == set(engine.shapes)
    assert engine.model.training
    assert all(p.grad is None for p in engine.model.parameters())
    # four samples of the catalogue's 64 tokens, forward and backward
    cost = method.around.ledger.costs["importance"]
    assert cost.tokens == len(batch) * 64
    assert cost.flops == cost.tokens * engine.flops.train()


def test_fisher_of_labels_that_the_model_samples(
    engine: SingleEngine, tiny_data: Path, tmp_path: Path
) -> None:
    batch = old_batch()
    method = ewc(engine, tiny_data, tmp_path, fisher="sampled")
    W = engine.parts()[HEAD].clone()
    squares = torch.zeros_like(W)
    for row, (states, targets) in enumerate(hidden(engine, batch)):
        p = (states @ W.T).softmax(dim=1)
        generator = torch.Generator().manual_seed(derive_seed(0, "fisher", row))
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        assert not torch.equal(labels, targets)
        p[torch.arange(len(p)), labels] -= 1
        squares += (p.T @ states).square()
    found = method.measure(batch)
    torch.testing.assert_close(found[HEAD], squares / batch.targets.sum(), rtol=1e-4, atol=1e-9)


def test_mas_of_a_language_models_head(engine: SingleEngine, tiny_data: Path, tmp_path: Path) -> None:
    """d ||W h||^2 / dW = 2 W h h^T: its mean over a sample's targets, absolute, and the mean over samples."""
    batch = old_batch()
    W = engine.parts()[HEAD].clone()
    total = torch.zeros_like(W)
    for states, _ in hidden(engine, batch):
        total += (2 * (W @ states.T) @ states / len(states)).abs()
    config = config_of(tiny_data, tmp_path, {"name": "mas", "mas": {"domains": ["json"]}})
    found = MAS(around(engine, config)).measure(batch)
    torch.testing.assert_close(found[HEAD], total / len(batch), rtol=1e-4, atol=1e-7)


def test_what_cannot_be_is_refused(engine: SingleEngine, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"run has none: set start\.run, or name them in method\.ewc\.domains"
    ):
        EWC(around(engine, config_of(tiny_data, tmp_path, {"name": "ewc"})))
    given = {"name": "mas", "mas": {"domains": ["json"]}}
    tensor = {"engine": {"name": "fsdp", "fsdp": {"tensor_parallel": 2}}}
    with pytest.raises(UserError, match=r"mas reads whole logits, and engine\.fsdp\.tensor_parallel"):
        MAS(around(engine, config_of(tiny_data, tmp_path, given, **tensor)))
    method = ewc(engine, tiny_data, tmp_path)
    with pytest.raises(UserError, match="importance is missing, which the run's start has measured"):
        method.begin(4)
    method = ewc(engine, tiny_data, tmp_path)
    method.domains = ["nowhere"]
    with pytest.raises(UserError, match="nowhere"):
        method.begin(0)
