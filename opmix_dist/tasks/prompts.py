"""Token ids of prompts and replies, written as the chats that a model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opmix_dist.data.chat import render, render_prompt
from opmix_dist.data.samples import Sample
from opmix_dist.data.source import Conversation
from opmix_dist.errors import UserError
from opmix_dist.tasks.records import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

import numpy as np

_PROBE = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def prompt_ids(tokenizer: PreTrainedTokenizerFast, task: Task, where: str) -> list[int]:
    """What the model goes on from. UserError, which ``where`` names, as of :func:`data.chat.render`."""
    return render_prompt(tokenizer, task.conversation, where).tolist()


def replied(tokenizer: PreTrainedTokenizerFast, task: Task, reply: str, where: str) -> Sample:
    """The whole chat with ``reply``, whose tokens and the end of its turn are the only ones that are learnt.

    Raises:
        UserError: as of :func:`data.chat.render`, or the template writes nothing of the reply.
    """
    messages = [*task.messages, {"role": "assistant", "content": reply}]
    ids, spans = render(tokenizer, Conversation(messages, task.tools), where)
    if not len(spans):
        raise UserError(f"{where}: the chat template writes no token of the reply {reply!r}")
    return Sample(ids, np.array([len(ids)], dtype=np.uint32), spans[-1:])


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end a turn of the assistant: EOS, and the special one that the chat template writes.

    Raises:
        UserError: there is no template, or it ends a turn without a special token: nothing would stop a
            reply.
    """
    ids, spans = render(tokenizer, _PROBE, "a chat to try the template")
    last = int(ids[spans[-1, 1] - 1])
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if last not in special:
        raise UserError(
            "the tokenizer's chat template ends the assistant's turns without a special token, so that "
            "nothing ends a reply: pass a template that writes one with --chat-template"
        )
    eos = tokenizer.eos_token_id
    return sorted({last, *([eos] if isinstance(eos, int) else [])})


def reply_text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The words of a reply, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
