"""Whether a model, as it is run, keeps attention within documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from opmix_dist.data.batch import TokenBatch, collate
from opmix_dist.data.samples import Sample
from opmix_dist.errors import UserError

_LONGEST = 16
"""Tokens of each document of the trial."""


def require_documents_apart(
    losses: Callable[[TokenBatch], Tensor],
    *,
    vocab_size: int,
    sequence_length: int,
    architecture: str,
    attention: str,
) -> None:
    """Try whether a document's losses depend on the document before it in the same sample.

    Position ids that restart are the only word that a model gets of documents. Architectures with a mask of
    their own, state-space layers and transformers before 4.53 pass over it without an error, so this asks
    the model itself, the way it is trained: two samples end in the same document and begin in different
    ones. Without position ids the same two must differ, or the trial shows nothing.

    Args:
        losses: of each sample [N], of a model in evaluation mode; collective if the model is sharded.
        vocab_size: tokens that the model knows, V.
        sequence_length: T; the trial's samples are not longer.
        architecture, attention: class of the model and ``model.attention``, for the error.

    Raises:
        UserError: the documents are not apart, or the model takes no position ids.
    """
    what = f"{architecture} with model.attention {attention}"
    half = min(max(sequence_length // 2, 2), _LONGEST)
    try:
        mixed = _difference(losses, vocab_size, half, mask_documents=False)
        leaked = _difference(losses, vocab_size, half, mask_documents=True)
    except TypeError as error:  # an argument that forward does not have
        raise UserError(_cannot(what, str(error))) from None
    if mixed == 0:
        raise UserError(_cannot(what, "its losses depend on no earlier document even without it"))
    # what is masked has a weight of exactly 0; the rest is for kernels that sum in no fixed order
    if not leaked <= 1e-2 * mixed:
        reason = f"a document's loss moves by {leaked:.3g} with the document before it"
        raise UserError(_cannot(what, reason))


def _difference(
    losses: Callable[[TokenBatch], Tensor], vocab_size: int, half: int, *, mask_documents: bool
) -> float:
    """How far the loss of a document moves when another one stands before it, in nats."""
    generator = np.random.default_rng([half, vocab_size])
    first, last = generator.integers(vocab_size, size=(2, half)).astype(np.uint32)
    other = ((first + 1) % vocab_size).astype(np.uint32)
    found = []
    for before in (first, other):  # one call each: equal shapes and offsets, so equal rounding
        sample = Sample(
            tokens=np.concatenate([before, last]),
            ends=np.array([half, 2 * half], dtype=np.uint32),
            # its first token is predicted from the document before it, where there is no masking
            spans=np.array([[half + 1, 2 * half]], dtype=np.uint32),
        )
        batch = collate([sample], 2 * half, mask_documents=mask_documents)
        found.append(losses(batch).item())
    return abs(found[0] - found[1])


def _cannot(what: str, reason: str) -> str:
    return (
        f"data.mask_documents: {what} does not keep attention within documents ({' '.join(reason.split())}): "
        "choose another attention (sdpa, varlen, flex_attention) or architecture, or set it to false"
    )
