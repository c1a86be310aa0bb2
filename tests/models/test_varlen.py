"""Attention in pieces against attention with a mask, and what torch's kernel for pieces is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models import varlen
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.loss import sample_loss_sums, sample_losses
from opmix_dist.models.varlen import Pieces
from tests.helpers import uneven_batch
from tests.models.tiny import ARCHITECTURES, build

LENGTH = 16
POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])


def outcome(architecture: str, attention: str, batch: TokenBatch, **fields: object) -> dict[str, Tensor]:
    """Losses and all gradients, in float64."""
    model = build(architecture, attention=attention, **fields).double().train()
    losses = sample_losses(model, batch)
    losses.sum().backward()
    return {"losses": losses.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_computes_what_a_mask_does(
    architecture: str, mask_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's window of 3 tokens is shorter than most documents. No mask is larger than a document."""
    batch = uneven_batch(1, 4, LENGTH, mask_documents=mask_documents)
    expected = outcome(architecture, "sdpa", batch)
    right, largest = F.scaled_dot_product_attention, [0]

    def spy(query: Tensor, *rest: Tensor, **options: object) -> Tensor:
        assert (options["attn_mask"] is None) == (architecture != "mistral" or query.shape[2] <= 3)
        largest.append(query.shape[2])
        return right(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(outcome(architecture, "varlen", batch), expected, rtol=1e-9, atol=1e-11)
    assert (max(largest) < LENGTH) == mask_documents


def test_documents_are_apart_and_a_wrong_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", attention="varlen")

    def trial() -> None:
        require_documents_apart(
            lambda batch: sample_loss_sums(model, batch, 1),
            vocab_size=64, sequence_length=LENGTH, architecture="Llama", attention="varlen",
        )  # fmt: skip

    trial()
    monkeypatch.setattr(Pieces, "arguments", lambda pieces: {})  # rows, then
    with pytest.raises(Exception, match="does not keep attention within documents"):
        trial()


def test_cuts_are_where_positions_restart_and_rows_begin() -> None:
    """A row that does not begin at 0, the rest of a document, is a piece too."""
    found = Pieces.of_positions(POSITIONS)
    assert (found.starts.tolist(), found.longest) == ([0, 3, 5, 6, 10], 5)
    assert found.starts.dtype == torch.int32
    assert Pieces.of_positions(torch.tensor([[0, 1], [7, 8]])).starts.tolist() == [0, 2, 4]
    assert Pieces.of_rows(3, 4, torch.device("cpu")).starts.tolist() == [0, 4, 8, 12]
    untouched = torch.tensor([[3, 4]])
    Pieces.of_positions(untouched)
    assert untouched.tolist() == [[3, 4]]


def as_documented(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's documentation says of ``varlen_attn``, by one mask over all tokens [R, H, K]."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max(cu_q.diff().tolist()) <= max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    at = torch.arange(len(query))
    piece = torch.bucketize(at, cu_q[1:], right=True)
    back = at[:, None] - at[None, :]
    before, after = window_size
    allowed = (piece[:, None] == piece[None, :]) & (back >= -after)
    if before >= 0:
        allowed &= back <= before
    rows = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(*rows, attn_mask=allowed, scale=scale, enable_gqa=True)[
        0
    ].transpose(0, 1)


def in_torch_2_11(
    *arguments: Any, scale: float | None, window_size: tuple[int, int], return_aux: None = None
) -> Tensor:
    return as_documented(*arguments, scale=scale, window_size=window_size, enable_gqa=False)


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize(
    ("heads", "documented"), [(2, as_documented), (4, as_documented), (4, in_torch_2_11)]
)
def test_the_kernel_is_asked_for_the_same(
    heads: int, documented: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Pieces.of_positions(POSITIONS)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(10, h, 8, generator=generator) for h in (heads, 2, 2))
    expected = varlen._one_by_one(query, key, value, pieces, 0.3, window)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    found = varlen._by_kernel(query, key, value, pieces, 0.3, window)
    torch.testing.assert_close(found, expected)


def test_torch_takes_the_call() -> None:
    """On the meta device: names and types of its arguments, and the shape of the result."""
    query, key, value = (torch.empty(10, h, 8, device="meta", dtype=torch.bfloat16) for h in (4, 2, 2))
    pieces = Pieces(torch.empty(5, dtype=torch.int32, device="meta"), 5)
    found = varlen._by_kernel(query, key, value, pieces, 0.3, None)
    assert (found.shape, found.dtype) == ((10, 4, 8), torch.bfloat16)


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"softcap": 30.0}, {"attention_mask": torch.ones(1)}])
def test_what_it_does_not_compute_is_an_error(asked: dict[str, object]) -> None:
    rows = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(ValueError, match="varlen attention has no"):
        varlen.varlen_attention(torch.nn.Identity(), *rows, **{"attention_mask": None, **asked})


def test_under_autocast_it_is_in_16_bits() -> None:
    """Where queries and keys come rotated, and so in float32, and values do not."""
    model, batch = build("llama", attention="varlen"), uneven_batch(1, 4, LENGTH, mask_documents=True)
    exact = sample_losses(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_losses(model, dataclasses.replace(batch))
    torch.testing.assert_close(found, exact, rtol=3e-2, atol=1e-2)
    assert not torch.equal(found, exact)
