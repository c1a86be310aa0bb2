"""Causal attention without a mask: where it is taken, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from opmix_dist.models.loss import sample_losses
from tests.helpers import uneven_batch
from tests.models.tiny import ARCHITECTURES, VOCABULARY, build, plain_losses

LENGTH = 12


def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills up with whether each call of torch's attention got a mask."""
    found: list[bool] = []
    right = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **rest):
        found.append(attn_mask is not None)
        assert (attn_mask is None) == is_causal
        return right(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


def batch(*, mask_documents: bool = False):
    found = uneven_batch(3, 4, LENGTH, mask_documents=mask_documents)
    return type(found)(found.tokens % VOCABULARY, found.loss_mask, found.position_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_mask_is_made_and_losses_stay(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's window is shorter than the samples: there the mask is needed."""
    needs_mask = architecture == "mistral"
    model = build(architecture).double()
    expected = plain_losses(model, batch())
    seen = masks(monkeypatch)
    found = sample_losses(model, batch())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert seen == [needs_mask] * 2
    assert model.config._attn_implementation == "sdpa"
    if needs_mask:
        model.config.sliding_window = LENGTH
        seen.clear()
        sample_losses(model, batch())
        assert seen == [False] * 2


def test_documents_and_other_attentions_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = masks(monkeypatch)
    sample_losses(build("llama"), batch(mask_documents=True))
    assert seen == [True] * 2
    seen.clear()
    sample_losses(build("llama", attention="eager"), batch())
    assert seen == []


def test_subclasses_keep_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.__class__ = type("OwnLlama", (type(model),), {"__module__": "elsewhere"})
    seen = masks(monkeypatch)
    sample_losses(model, batch())
    assert seen == [True] * 2


def test_recomputed_blocks_attend_alike() -> None:
    """Activation checkpointing calls blocks again outside of the context."""
    gradients = []
    for recompute in (False, True):
        model = build("llama").train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sample_losses(model, batch()).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)
