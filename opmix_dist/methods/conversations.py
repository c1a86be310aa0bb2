"""What a batch of samples holds to reply to.

A sample is one or several documents, whose first tokens have position 0. A document's targets tell what it
is: where its second token is one already, it is text, or a text's part, and has nothing to reply to. Where
targets begin later, it is a conversation: the tokens before the first target are its prompt, and the targets
up to the next token that is none are its demonstration, the assistant's first turn. Later turns are no part
of what is replied to. A document without a target is padding, or a rest of a text of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from opmix_dist.data.batch import TokenBatch


@dataclass(frozen=True)
class Text:
    """A document that is learnt as it is.

    tokens: [n].
    learnt: bool [n], which of them are targets.
    """

    tokens: np.ndarray
    learnt: np.ndarray


@dataclass(frozen=True)
class Conversation:
    """Token ids of a prompt, and of the assistant's first turn, with the token that ends it."""

    prompt: list[int]
    demonstration: list[int]


def documents(batch: TokenBatch) -> Iterator[list[Text | Conversation]]:
    """Those of each sample that have targets, in order; ``batch`` is on the CPU and has position ids."""
    assert batch.position_ids is not None
    rows = zip(batch.tokens.numpy(), batch.loss_mask.numpy(), batch.position_ids.numpy(), strict=True)
    for tokens, learnt, positions in rows:
        borders = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
        parts = [slice(begin, end) for begin, end in pairwise(borders)]
        yield [_document(tokens[part], learnt[part]) for part in parts if learnt[part].any()]


def _document(tokens: np.ndarray, learnt: np.ndarray) -> Text | Conversation:
    first = int(learnt.argmax())
    if first == 1:
        return Text(tokens, learnt)
    rest = learnt[first:]
    turn = len(rest) if rest.all() else int((~rest).argmax())
    return Conversation(tokens[:first].tolist(), tokens[first : first + turn].tolist())
