"""Joint adapters against PEFT, and the three ways to apply them against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from opmix_dist.data.batch import TokenBatch
from opmix_dist.errors import UserError
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.probes import save_probe, train_probes
from opmix_dist.search_config import ProbeConfig
from tests.helpers import random_batch, tiny_llama, uneven_batch

NAMES = ["old", "code", "prose"]
STEPS, BATCH, LENGTH, RANK, ALPHA, LR = 12, 3, 16, 4, 8, 5e-3
SETTINGS = ProbeConfig(
    steps=STEPS, batch_size=BATCH, rank=RANK, alpha=ALPHA, dropout=0.0, lr_multiplier=2.0, max_grad_norm=0.3
)


def batches(name: str) -> Iterator[TokenBatch]:
    """Samples with different numbers of targets, documents apart."""
    seeds = range(1000 * NAMES.index(name), 10**6)
    return (uneven_batch(seed, BATCH, LENGTH, mask_documents=True) for seed in seeds)


def train_jointly(names: list[str], settings: ProbeConfig = SETTINGS) -> tuple[JointAdapters, dict]:
    return train_probes(
        tiny_llama(),
        {name: batches(name) for name in names},
        settings,
        base_lr=LR,
        betas=(0.9, 0.95),
        seeds={name: NAMES.index(name) for name in names},
    )


def train_with_peft(name: str) -> tuple[peft.PeftModel, list[float]]:
    """One adapter alone with PEFT's own layers and torch's own clipping, from the same initial A."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    reference = JointAdapters(tiny_llama(), [name], rank=RANK, alpha=ALPHA, seeds=[NAMES.index(name)])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(reference.layers)
    for layer_name, layer in reference.layers.items():
        trained[f"base_model.model.{layer_name}.lora_A.default.weight"].data.copy_(layer.A.data[0])
    optimizer = torch.optim.AdamW(
        trained.values(), lr=LR * SETTINGS.lr_multiplier, betas=(0.9, 0.95), weight_decay=0.0
    )
    stream, losses = batches(name), []
    for _ in range(STEPS):
        batch = next(stream)
        loss = sample_losses(model, batch).sum() / batch.targets.sum()
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def test_joint_training_equals_separate_peft_runs() -> None:
    adapters, curves = train_jointly(NAMES)
    for index, name in enumerate(NAMES):
        model, losses = train_with_peft(name)
        assert curves[name] == pytest.approx(losses, abs=2e-5)
        expected = dict(model.named_parameters())
        for layer_name, layer in adapters.layers.items():
            for half, stacked in (("A", layer.A), ("B", layer.B)):
                reference = expected[f"base_model.model.{layer_name}.lora_{half}.default.weight"]
                moved = reference.abs().max()
                assert moved > 1e-3
                torch.testing.assert_close(stacked[index], reference, atol=2e-4, rtol=0)


def test_an_adapter_does_not_depend_on_its_companions() -> None:
    settings = SETTINGS.model_copy(update={"dropout": 0.1})
    together, curves = train_jointly(NAMES, settings)
    alone, curve = train_jointly(["code"], settings)
    assert curves["code"] == pytest.approx(curve["code"], abs=2e-5)
    assert curves["code"] != train_jointly(["code"])[1]["code"], "dropout had no effect"
    for name, layer in alone.layers.items():
        torch.testing.assert_close(layer.B[0], together.layers[name].B[1], atol=2e-4, rtol=0)


def test_saved_probe_loads_in_peft_and_scores_the_same(tmp_path: Path) -> None:
    adapters, curves = train_jointly(NAMES)
    save_probe(adapters, "code", curves["code"], tmp_path / "code", "snapshots/step_3", 1.5)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "code")).eval()
    batch = random_batch(5, 4, LENGTH)
    adapters.model.eval()
    with torch.no_grad(), adapters.simulating(torch.tensor([[0.0, 1.0, 0.0]])):
        ours = sample_losses(adapters.model, batch)
    with torch.no_grad():
        torch.testing.assert_close(sample_losses(loaded, batch), ours, atol=1e-4, rtol=1e-6)
    again = JointAdapters(tiny_llama(), ["x"], rank=RANK, alpha=ALPHA, seeds=[9])
    again.load_peft(0, tmp_path / "code")
    for name, layer in again.layers.items():
        assert torch.equal(layer.A[0], adapters.layers[name].A[1])
    wrong_rank = JointAdapters(tiny_llama(), ["x"], rank=RANK + 1, alpha=ALPHA, seeds=[9])
    with pytest.raises(UserError, match="does not fit this model"):
        wrong_rank.load_peft(0, tmp_path / "code")


def test_merged_weights_are_the_sum_of_full_deltas_and_are_given_back() -> None:
    adapters, _ = train_jointly(NAMES)
    u = torch.tensor([0.2, 0.5, 0.3])
    name, layer = next(iter(adapters.layers.items()))
    before = layer.base.weight.clone()
    by_hand = before + (ALPHA / RANK) * sum(u[k] * layer.B[k] @ layer.A[k] for k in range(3))
    separate_sums = before + (ALPHA / RANK) * (u @ layer.B.flatten(1)).view_as(layer.B[0]) @ (
        u @ layer.A.flatten(1)
    ).view_as(layer.A[0])
    with adapters.merged(u):
        torch.testing.assert_close(layer.base.weight, by_hand)
        assert not torch.allclose(layer.base.weight, separate_sums, atol=1e-5)
    assert torch.equal(layer.base.weight, before), name


def test_simulation_differentiates_coefficients_and_leaves_adapters_alone() -> None:
    """dL/du_k of a merged model is <dL/dW, s B_k A_k> summed over the layers: the chain rule by hand."""
    adapters, _ = train_jointly(NAMES)
    adapters.model.eval()
    batch, u = random_batch(5, 4, LENGTH), torch.tensor([0.2, 0.5, 0.3])
    gates = u[None].clone().requires_grad_()
    with adapters.simulating(gates):
        sample_losses(adapters.model, batch).sum().backward()
    assert all(p.grad is None for p in adapters.model.parameters())
    with adapters.merged(u):
        for layer in adapters.layers.values():
            layer.base.weight.requires_grad_(True)
        sample_losses(adapters.model, batch).sum().backward()
    expected = sum(
        (ALPHA / RANK) * torch.einsum("oi,kor,kri->k", layer.base.weight.grad, layer.B, layer.A)
        for layer in adapters.layers.values()
    )
    assert expected.abs().min() > 1e-2
    torch.testing.assert_close(gates.grad[0], expected, rtol=1e-4, atol=1e-5)


def test_fresh_adapters_change_nothing_and_can_be_removed() -> None:
    model, batch = tiny_llama(), random_batch(1, 2, LENGTH)
    expected = sample_losses(model, batch)
    adapters = JointAdapters(model, NAMES[:2], rank=RANK, alpha=ALPHA, dropout=0.5, seeds=[0, 1])
    with adapters.training():
        assert torch.equal(sample_losses(model, batch), expected)
    assert adapters.remove() is model
    assert not any("JointLoRA" in type(m).__name__ for m in model.modules())


def test_dropout_scales_what_it_keeps() -> None:
    adapters = JointAdapters(tiny_llama(), NAMES, rank=RANK, alpha=ALPHA, dropout=0.25, seeds=[0, 1, 2])
    dropped = adapters.drop(torch.ones(3, 500, 40))
    kept = dropped != 0
    assert torch.allclose(dropped[kept], torch.tensor(1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(kept[0], kept[1])


def test_a_probe_that_diverges_is_named_with_its_step() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SearchError, match="probe `old` has loss nan at step 1"):
        train_probes(
            model, {"old": batches("old")}, SETTINGS, base_lr=LR, betas=(0.9, 0.95), seeds={"old": 0}
        )


def test_a_probe_whose_samples_have_no_target_is_named() -> None:
    empty = uneven_batch(0, 1, LENGTH)
    assert empty.targets.tolist() == [0]
    stream = iter([uneven_batch(1, 2, LENGTH), TokenBatch.cat([empty, empty])])
    with pytest.raises(SearchError, match="probe `old` has no token that counts in the loss at step 2"):
        train_probes(tiny_llama(), {"old": stream}, SETTINGS, base_lr=LR, betas=(0.9, 0.95), seeds={"old": 0})
