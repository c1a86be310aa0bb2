"""Head and cross-entropy in chunks: the same losses and gradients as from all logits, and fewer bytes."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.chunked_head import (
    NO_TARGET,
    ChunkedHead,
    _compiled,
    chunked_head,
    token_losses,
)
from opmix_dist.models.loss import sample_losses
from tests.helpers import tiny_llama, uneven_batch
from tests.models.tiny import ARCHITECTURES, VOCABULARY, build

LENGTH = 16
BYTES = 8 * 4 * VOCABULARY * 5
"""Chunks of 5 tokens: the last one is not full. Of the 64 tokens of a batch here, 40 could be whole."""


def head_of(model: PreTrainedModel, max_bytes: int = BYTES) -> ChunkedHead:
    found = chunked_head(model, max_bytes)
    assert found is not None
    return found


def gradients(model: PreTrainedModel, batch: TokenBatch, head: ChunkedHead | None) -> dict[str, Tensor]:
    """Of a sum in which each sample has a weight of its own; the losses too."""
    model.zero_grad()
    losses = sample_losses(model, batch, head)
    (losses * torch.linspace(0.5, 2.0, len(batch), dtype=losses.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {**found, "losses": losses.detach()}


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_all_gradients_are_those_of_whole_logits(architecture: str, mask_documents: bool) -> None:
    """In float64: a wrong factor or a row in the wrong chunk is far off."""
    model, batch = build(architecture).double(), uneven_batch(1, 4, LENGTH, mask_documents=mask_documents)
    whole, chunked = gradients(model, batch, None), gradients(model, batch, head_of(model))
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)
    assert chunked["losses"][0] == 0, "the first sample has no target"


@pytest.mark.parametrize("tied", [False, True])
def test_in_float32_as_close_as_sums_in_another_order(tied: bool) -> None:
    model, batch = tiny_llama(tied=tied), uneven_batch(1, 4, LENGTH)
    whole, chunked = gradients(model, batch, None), gradients(model, batch, head_of(model))
    assert ("lm_head.weight" in whole) is not tied
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_is_no_further_from_the_truth() -> None:
    """Under autocast, as in training. The weight's gradient is summed in float32, however many chunks."""
    model, batch = tiny_llama(), uneven_batch(1, 64, LENGTH)
    head = head_of(model, 8 * 4 * VOCABULARY * 4)
    exact = gradients(model, batch, None)
    with torch.autocast("cpu", torch.bfloat16):
        whole, chunked = gradients(model, batch, None), gradients(model, batch, head)
    for name, truth in exact.items():
        errors = [(found[name] - truth).norm() / truth.norm() for found in (whole, chunked)]
        assert 0 < errors[0] < 0.05
        assert errors[1] < 1.1 * errors[0] + 1e-5, name


def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, as in training; traced without a graph break, and run as traced."""
    model, batch = tiny_llama(), uneven_batch(1, 4, LENGTH)
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    found = []
    for compiled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, batch, chunked_head(model, BYTES, compiled=compiled)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert _compiled.cache_info().currsize == 2, "one for each pass"
    _compiled.cache_clear()


def test_losses_worked_out_by_hand() -> None:
    """Logits (0, log 4): losses log 5 - log 4 and log 5; a gradient of (1/5) 0 + (4/5 - 1) log 4 to h."""
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    weight[1] = weight[1].log()
    found = token_losses(hidden, weight, torch.tensor([1, 0, NO_TARGET]), rows=2)
    log = {n: torch.tensor(n, dtype=torch.float64).log().item() for n in (4.0, 5.0)}
    assert found.tolist() == pytest.approx([log[5.0] - log[4.0], log[5.0], 0.0])
    found[0].backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-log[4.0] / 5, 0.0, 0.0])


def test_small_losses_beside_large_logits_keep_their_digits() -> None:
    """exp(-12) = 6.1e-6, beside logits of 1,000, in float32: log-sum-exp minus logit would be 0."""
    weight = torch.tensor([[1000.0], [988.0]])
    found = token_losses(torch.ones(1, 1), weight, torch.tensor([0]), rows=1)
    assert found.item() == pytest.approx(
        torch.tensor(-12.0, dtype=torch.float64).exp().log1p().item(), rel=1e-2
    )
    expected = F.cross_entropy(weight.T, torch.tensor([0]), reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(bad: float) -> None:
    """And is not hidden by it: training stops on it."""
    hidden = torch.ones(4, 2)
    hidden[1] = bad
    found = token_losses(hidden, torch.eye(3, 2), torch.tensor([0, 1, 2, NO_TARGET]), rows=2)
    assert found.isfinite().tolist() == [True, False, True, True]
    hidden[3] = bad
    assert token_losses(hidden, torch.eye(3, 2), torch.tensor([0, 1, 2, NO_TARGET]), rows=2)[3] == 0


def test_it_is_taken_only_where_logits_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bytes x 64 tokens of the vocabulary x 64 tokens of the batch; and the head is as before it after."""
    model, batch = tiny_llama(), uneven_batch(1, 4, LENGTH)
    shapes = []
    model.register_forward_hook(lambda *call: shapes.append(call[-1].logits.shape))
    for max_bytes in (4 * 64 * 64, 4 * 64 * 64 - 1):
        sample_losses(model, batch, head_of(model, max_bytes))
    assert head_of(model).rows == 5
    assert shapes == [(4, LENGTH, 64), (4, LENGTH)]
    assert model.lm_head(torch.zeros(1, 32)).shape == (1, 64)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    model, batch = tiny_llama(), uneven_batch(1, 4, LENGTH)
    model.lm_head.weight.requires_grad_(False)
    sample_losses(model, batch, head_of(model)).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.any()
    evaluated = sample_losses(model, dataclasses.replace(batch), head_of(model))
    with torch.no_grad():
        assert torch.equal(sample_losses(model, batch, head_of(model)), evaluated)


def test_models_that_do_more_to_their_logits_keep_them_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2 caps them; the log says so."""
    model = build("gemma2", hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8)
    with caplog.at_level(logging.INFO, "opmix_dist"):
        assert chunked_head(model, BYTES) is None
    assert "engine.logits_memory: Gemma2ForCausalLM may do more to its logits" in caplog.text
    assert chunked_head(tiny_llama(), None) is None
