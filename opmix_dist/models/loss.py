"""Next-token cross-entropy over the targets of samples, and losses of domains; float32 or better from the
logits on.

A loss is always a ratio: nats summed over targets, over the number of targets. Samples may have different
numbers of them, down to none, so both parts are kept until all that belongs together is summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.attention import causal_only
from opmix_dist.models.chunked_head import NO_TARGET, ChunkedHead
from opmix_dist.models.heads import HiddenLosses, fused_head, replaced_forward
from opmix_dist.models.varlen import VARLEN, Pieces


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, T, V] and targets [B, T] (or ``NO_TARGET``) of the same tokens to each sample's sum [B]."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        precise.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return losses.view(targets.shape).sum(dim=1)


def sample_losses(
    model: nn.Module,
    batch: TokenBatch,
    head: ChunkedHead | None = None,
    from_logits: Callable[[Tensor, Tensor], Tensor] = losses_of_logits,
) -> Tensor:
    """Sum of the cross-entropies of each sample's targets, in nats; 0 for a sample without one.

    Args:
        batch: B samples of T tokens; position ids, where it has them, confine attention to documents.
        head: of the model, where logits that are too large to be whole are to be computed in chunks.
        from_logits: :func:`losses_of_logits`, or what was compiled of it.

    Returns:
        [B] float32, or float64 of a model in float64 and where kernels sum them.
    """
    targets = torch.where(batch.loss_mask, batch.tokens, NO_TARGET)[:, 1:]
    fused = fused_head(model)
    if fused is not None:
        return _fused_losses(*fused, batch, targets)
    if head is not None and head.needed(batch.tokens.numel()):
        with head.giving_losses(_padded(targets)):
            return _run(model, batch).logits.view(batch.tokens.shape).sum(dim=1)
    logits = _run(model, batch).logits.view(*batch.tokens.shape, -1)
    return from_logits(logits, _padded(targets))


def target_logits(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits of the tokens that come before a target, sample after sample: [R, V], R targets in all. The head
    is multiplied with no other token's hidden state.

    They are what the model makes of them, in its dtype.
    """
    head = model.get_output_embeddings()
    before_target = F.pad(batch.loss_mask[:, 1:], (0, 1))  # [B, T]
    multiply = head.forward

    def of_targets(hidden: Tensor) -> Tensor:
        return multiply(hidden.reshape(*batch.tokens.shape, -1)[before_target])

    with replaced_forward(head, of_targets):
        return _run(model, batch).logits


def _fused_losses(backbone: nn.Module, losses: HiddenLosses, batch: TokenBatch, targets: Tensor) -> Tensor:
    hidden = _run(backbone, batch).last_hidden_state.view(*batch.tokens.shape, -1)
    return losses(hidden, _padded(targets))


def _padded(targets: Tensor) -> Tensor:
    """The last token predicts nothing: a target that is none costs less than hidden states or logits without
    its row."""
    return F.pad(targets, (0, 1), value=NO_TARGET)


def _run(module: nn.Module, batch: TokenBatch) -> Any:
    """Output of a model, or of its part without the head; rows are [B, T], or [1, B * T] for flash
    attention."""
    tokens, positions = batch.tokens, batch.position_ids
    if positions is None:
        with causal_only(module, tokens.shape[1]):
            return module(input_ids=tokens, use_cache=False)
    pieces: dict[str, Any] = {}
    if _attention(module) == VARLEN:
        pieces = Pieces.of_positions(positions).arguments()
    elif uses_flash_attention(module):
        # its variable-length kernels, which know documents, are called for a single row only
        tokens, positions = tokens.view(1, -1), positions.view(1, -1)
    # an attention mask, even of ones, or a cache would keep transformers from looking for documents in them
    return module(input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, **pieces)


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether transformers calls a flash-attention package or a kernel of that name from the hub."""
    return "flash" in _attention(model)


def _attention(model: nn.Module) -> str:
    return str(getattr(model.config, "_attn_implementation", ""))


@torch.no_grad()
def sample_loss_sums(model: nn.Module, batch: TokenBatch, batch_size: int) -> Tensor:
    """:func:`sample_losses` of held-out samples in parts of ``batch_size``: [N] float64 on the CPU."""
    device = next(model.parameters()).device
    parts = [sample_losses(model, part.to(device)).double().cpu() for part in batch.split(batch_size)]
    return torch.cat(parts)


@dataclass(frozen=True)
class DomainLosses:
    """Per domain: mean loss over targets (nats) and its standard error over samples, both float64
    [..., D], and the number of targets [D]. Loss and error of a domain without a target are 0."""

    loss: np.ndarray
    stderr: np.ndarray
    targets: np.ndarray


def losses_by_domain(
    sums: np.ndarray, targets: np.ndarray, domain_ids: np.ndarray, num_domains: int
) -> DomainLosses:
    """Put samples together: a domain's loss L is the sum of its samples' losses over that of their targets.

    The standard error is that of a ratio of sums, sqrt(sum_i (s_i - L n_i)^2 * N / (N - 1)) / sum_i n_i over
    the N samples that have targets (Cochran, Sampling Techniques, 1977, section 2.11, without the correction
    for finite populations). For equal n_i it is that of the mean of N sample means. 0 for a single sample.

    Args:
        sums: of losses, s [..., N] float64.
        targets: n [N]; samples with 0 change nothing.
        domain_ids: [N], in 0..D-1.
    """

    def by_domain(values: np.ndarray) -> np.ndarray:
        """Sums of [..., N] over each domain's samples, [..., D]. No product with a 0/1 matrix: a NaN in one
        domain times 0 would be one in all."""
        found = np.zeros((*values.shape[:-1], num_domains), dtype=values.dtype)
        np.add.at(found.T, domain_ids, values.T)
        return found

    totals, counts = by_domain(targets), by_domain((targets > 0).astype(np.int64))
    loss = by_domain(sums) / np.maximum(totals, 1)
    residuals = by_domain((sums - loss[..., domain_ids] * targets) ** 2)
    stderr = np.sqrt(residuals * counts / np.maximum(counts - 1, 1)) / np.maximum(totals, 1)
    return DomainLosses(loss, stderr, totals)


def paired_stderr(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    domain_ids: np.ndarray,
) -> float:
    """Standard error of f(first) - f(second), where f is a function of the domains' losses and both models
    were measured on the same samples.

    Each comes as its samples' sums [N] and the slope df / dL [D] at its losses. To first order in the noise,
    sample j of domain i moves the difference by its residual in the ratio of sums
    (a_i s_j - b_i s'_j) / n_j, with the slopes a and b; samples that both models find hard cancel. Domains
    have samples of their own, so their variances add (Cochran, as in :func:`losses_by_domain`).
    """
    (sums, slopes), (other_sums, other_slopes) = first, second
    difference = slopes[domain_ids] * sums - other_slopes[domain_ids] * other_sums
    return float(np.sqrt((losses_by_domain(difference, targets, domain_ids, len(slopes)).stderr ** 2).sum()))
