"""The prompt with a demonstration in it, that a model which teaches itself is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opmix_dist.data.chat import render_prompt
from opmix_dist.data.source import Conversation
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEMONSTRATION = "{demonstration}"


class DemonstrationContext:
    """Puts a demonstration behind the words of a prompt's last message, as a part of that message.

    A prompt ends in what the chat template writes between a user's words and the assistant's reply; that is
    found by writing two prompts with different words. The text goes before it, token by token, so that
    prompt and demonstration keep the tokens that they have in the data::

        User: 2+2?<|end|>Assistant:    User: 2+2? <text with the demonstration><|end|>Assistant:
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str, end_ids: Sequence[int]) -> None:
        """
        Args:
            text: holds ``{demonstration}`` once.
            end_ids: tokens that end a turn, which a demonstration leaves out.
        """
        before, after = text.split(DEMONSTRATION)
        self._before, self._after = _ids(tokenizer, before), _ids(tokenizer, after)
        self._ends = frozenset(end_ids)
        self._tail = _common_end(_prompt(tokenizer, "a"), _prompt(tokenizer, "2 b!"))

    def __call__(self, prompt: Sequence[int], demonstration: Sequence[int]) -> list[int]:
        """Raises UserError where the prompt does not end like that of a user's message."""
        words = len(prompt) - len(self._tail)
        if list(prompt[words:]) != self._tail:
            raise UserError(
                "method.sdft: a conversation's first reply does not follow a user's message as the chat "
                "template writes it, so no demonstration can be put there: prepare such chats without that "
                "turn, or leave them out"
            )
        shown = demonstration[:-1] if demonstration[-1] in self._ends else demonstration
        return [*prompt[:words], *self._before, *shown, *self._after, *self._tail]


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _prompt(tokenizer: PreTrainedTokenizerFast, words: str) -> list[int]:
    conversation = Conversation([{"role": "user", "content": words}])
    return render_prompt(tokenizer, conversation, "a chat to try the template").tolist()


def _common_end(one: Sequence[int], other: Sequence[int]) -> list[int]:
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return list(one[len(one) - same :])
