"""The loss of samples, from logits that are divided by vocabulary over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from opmix_dist.data.batch import TokenBatch


def parallel_sample_losses(logits: Tensor, batch: TokenBatch, *, first: int, vocab_size: int) -> Tensor:
    """As :func:`~opmix_dist.models.loss.sample_losses`; collective over the tensor-parallel ranks.

    Args:
        logits: [B, T, V / ranks] float32 of this rank's tokens of the vocabulary.
        first: number of the first of these tokens.
        vocab_size: tokens that the model has; the ones from it on are padding and have no probability.

    Returns:
        [B] float32.
    """
    predictions = logits[:, :-1]  # of tokens 1 to T-1
    padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocab_size
    predictions = predictions.masked_fill(padding, -torch.inf).contiguous()
    losses = vocab_parallel_cross_entropy(predictions, batch.tokens[:, 1:].contiguous())
    return torch.where(batch.loss_mask[:, 1:], losses, 0.0).sum(dim=1)


def document_mask(position_ids: Tensor) -> Tensor:
    """Megatron's attention mask [B, 1, T, T], true where a token must not look: at later tokens, or at other
    documents, which begin where positions [B, T] are 0.

    Rotary embeddings depend on the distance between tokens only, so the positions themselves are not needed.
    """
    documents = (position_ids == 0).cumsum(dim=1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return ~same.tril()
