"""Candidate evaluation: low-rank and merged agree with deltas merged by hand in float64, and gradients with
finite differences."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.models.flops import count_flops
from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.candidates import cheaper_method, evaluate_candidates, simulate_with_gradients
from tests.helpers import tiny_llama, uneven_batch

RANK, ALPHA, LENGTH = 4, 8, 16
HELDOUT = uneven_batch(3, 7, LENGTH, mask_documents=True)  # samples 0, 3 and 6 have no target
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1, 1])
U = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]])


@pytest.fixture
def adapters() -> JointAdapters:
    """Random adapters whose deltas change the losses clearly."""
    return random_adapters(tiny_llama())


def random_adapters(model: PreTrainedModel) -> JointAdapters:
    found = JointAdapters(model, ["old", "a", "b"], rank=RANK, alpha=ALPHA, seeds=[0, 1, 2])
    generator = torch.Generator().manual_seed(4)
    for layer in found.layers.values():
        layer.B.data.normal_(0, 0.3, generator=generator)
    return found


def float64_llama(*, tied: bool) -> PreTrainedModel:
    """Float64 throughout: transformers' own RMSNorm would round to float32 on the way."""
    model = tiny_llama(tied=tied).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(module.weight.data)
            model.set_submodule(name, norm)
    return model


def in_float64(adapters: JointAdapters, u: np.ndarray) -> np.ndarray:
    """Loss sums [N] of a float64 copy of the base with W + s * sum_c u_c B_c A_c written into it."""
    model = copy.deepcopy(tiny_llama()).double().eval()
    for name, layer in adapters.layers.items():
        delta = sum(u[k] * layer.B[k].double() @ layer.A[k].double() for k in range(len(u)))
        model.get_submodule(name).weight.data += (ALPHA / RANK) * delta
    with torch.no_grad():
        logits = model(input_ids=HELDOUT.tokens, position_ids=HELDOUT.position_ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), HELDOUT.tokens[:, 1:], reduction="none")
    return (losses * HELDOUT.loss_mask[:, 1:]).sum(dim=1).numpy()


@pytest.mark.parametrize(("method", "joint"), [("lowrank", 1), ("lowrank", 2), ("lowrank", 64), ("merge", 1)])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_equals_merging_in_float64(adapters: JointAdapters, method, joint: int, batch_size: int) -> None:
    ticks: list[int] = []
    found = evaluate_candidates(
        adapters, U, HELDOUT, DOMAINS, 2, method=method, joint=joint, batch_size=batch_size,
        on_progress=ticks.append,
    )  # fmt: skip
    expected = np.stack([in_float64(adapters, u) for u in U])
    n = HELDOUT.targets.numpy()
    assert n[[0, 3, 6]].tolist() == [0, 0, 0]
    assert np.ptp(expected.sum(axis=1) / n.sum()) > 1e-2, "the candidates do not differ: this shows nothing"
    for domain, rows in enumerate([[1, 2], [4, 5]]):
        sums, counts = expected[:, rows], n[rows]
        loss = sums.sum(axis=1) / counts.sum()
        np.testing.assert_allclose(found.loss[:, domain], loss, rtol=2e-6)
        # with two samples the residuals of a ratio are equal and opposite: sqrt(2 r^2 * 2 / 1) = 2 |r|
        stderr = 2 * np.abs(sums[:, 0] - loss * counts[0]) / counts.sum()
        np.testing.assert_allclose(found.stderr[:, domain], stderr, rtol=1e-3, atol=1e-6)
    assert found.targets.tolist() == [n[1] + n[2], n[4] + n[5]]
    assert sum(ticks) == len(U) * len(HELDOUT)


def test_a_wrong_coefficient_is_seen(adapters: JointAdapters) -> None:
    """The tolerance above is tight enough: a coefficient that is off by 1e-3 fails it."""
    arguments = {"method": "merge", "batch_size": 16}
    right = evaluate_candidates(adapters, U[:1], HELDOUT, DOMAINS, 2, **arguments)
    wrong = evaluate_candidates(adapters, U[:1] + np.array([1e-3, 0, 0]), HELDOUT, DOMAINS, 2, **arguments)
    assert np.abs(right.loss / wrong.loss - 1).max() > 2e-6


def test_no_candidates_give_empty_losses(adapters: JointAdapters) -> None:
    """A rank may have no share of the candidates."""
    for method in ("lowrank", "merge"):
        found = evaluate_candidates(
            adapters, np.zeros((0, 3)), HELDOUT, DOMAINS, 2, method=method, batch_size=4
        )  # fmt: skip
        assert found.loss.shape == (0, 2)


def test_cheaper_method_crosses_over_where_the_flops_do() -> None:
    counts = count_flops(tiny_llama(), LENGTH, lora_rank=RANK)
    tokens = counts.merge_per_adapter / counts.lora_per_adapter
    assert cheaper_method(counts, 3, int(tokens) - 1) == "lowrank"
    assert cheaper_method(counts, 3, int(tokens) + 2) == "merge"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_gradients_equal_finite_differences(tied: bool, mask_documents: bool, batch_size: int) -> None:
    """Parts of 3 samples mix the domains, whose samples have unequal numbers of targets, some none."""
    adapters = random_adapters(float64_llama(tied=tied))
    heldout = uneven_batch(3, 7, LENGTH, mask_documents=mask_documents)
    domains = torch.tensor([1, 0, 1, 0, 0, 1, 0])  # of four: one has no sample, one a sample without targets
    domains[3] = 3
    arguments = (heldout, domains, 4)
    found = simulate_with_gradients(adapters, U[:2], *arguments, batch_size=batch_size)
    step = 1e-4
    for m, u in enumerate(U[:2]):
        around = np.concatenate([u + step * np.eye(3), u - step * np.eye(3)])
        losses = evaluate_candidates(adapters, around, *arguments, method="lowrank", batch_size=16).loss
        expected = (losses[:3] - losses[3:]).T / (2 * step)  # [D, C]
        assert np.abs(expected[:2]).min() > 1e-3, "a gradient near 0 shows nothing"
        np.testing.assert_allclose(found.gradients[m], expected, rtol=1e-6, atol=1e-8)
    assert found.losses.targets[2:].tolist() == [0, 0]
    assert not found.gradients[:, 2:].any()


@pytest.mark.parametrize("batch_size", [2, 16])
def test_simulating_with_gradients_gives_the_losses_of_candidates(adapters, batch_size: int) -> None:
    ticks: list[int] = []
    with torch.no_grad():  # a caller's no_grad changes nothing
        found = simulate_with_gradients(
            adapters, U, HELDOUT, DOMAINS, 2, batch_size=batch_size, on_progress=ticks.append
        )
    expected = evaluate_candidates(adapters, U, HELDOUT, DOMAINS, 2, method="lowrank", batch_size=16)
    np.testing.assert_allclose(found.losses.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(found.losses.stderr, expected.stderr, rtol=1e-3, atol=1e-7)
    assert found.losses.targets.tolist() == expected.targets.tolist()
    assert found.gradients.dtype == np.float64
    assert sum(ticks) == len(U) * len(HELDOUT)
    assert all(p.grad is None for p in adapters.model.parameters())
    assert all(p.requires_grad for p in adapters.parameters()), "probes could not be trained any more"


def test_no_candidates_give_empty_gradients(adapters: JointAdapters) -> None:
    found = simulate_with_gradients(adapters, np.zeros((0, 3)), HELDOUT, DOMAINS, 2, batch_size=4)
    assert found.gradients.shape == (0, 2, 3)
