"""Chats to token ids, with what the assistant said marked: those tokens are learnt, the others are read only.

The text is what the tokenizer's chat template makes of a chat. Where the template says itself what the
assistant generates (``{% generation %}``), that is what counts. Otherwise the turn of message i is what the
template adds to the prompt for it::

    render(messages[:i], add_generation_prompt=True)   <|user|>2+2?<|end|>\\n<|assistant|>
    render(messages[:i + 1])                           <|user|>2+2?<|end|>\\n<|assistant|>4<|end|>\\n
    learnt                                                                               4<|end|>

Templates are Jinja that transformers renders in a sandbox; no code that comes with a tokenizer runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from opmix_dist.data.source import Conversation
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CharSpan = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OWN_TEMPLATE = "pass a template with {% generation %} around the assistant's turns with --chat-template"


def render(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, uint32 [n], and the half-open ranges of them that are learnt, uint32 [m, 2], ascending.

    A range holds the assistant's words and the token that ends the turn, but no white space behind it.
    Nothing is put before or behind what the template writes, no EOS either.

    Args:
        tokenizer: with a chat template; must parse its special tokens in text.
        conversation: its checked messages; ``content`` may be None.
        where: what an error calls the conversation.

    Raises:
        UserError: there is no template; it does not fit the conversation, or does not show what the assistant
            says; or a message writes a special token, with which it could forge a turn.
    """
    template = _checked_template(tokenizer, conversation, where)
    chat = _Chat(tokenizer, template, conversation, where)
    chat.require_calls()
    turns = chat.generated if _GENERATION.search(template) else list(chat.turns())
    encoding = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    spans = [_token_span(chat.text, offsets, turn) for turn in turns]
    kept = [span for span in spans if span[0] < span[1]]
    return np.array(encoding["input_ids"], np.uint32), np.array(kept, np.uint32).reshape(-1, 2)


def render_prompt(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, where: str) -> np.ndarray:
    """Token ids, uint32 [n], of a conversation that the assistant is to reply to: what a template writes
    before a reply, as in :func:`render` but for a tokenizer that joins the reply's first word to a space
    before it. Arguments and errors as there."""
    template = _checked_template(tokenizer, conversation, where)
    chat = _Chat(tokenizer, template, conversation, where)
    chat.require_calls()
    encoding = tokenizer(chat.prompt(), add_special_tokens=False, verbose=False)
    return np.array(encoding["input_ids"], np.uint32)


def _checked_template(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, where: str) -> str:
    """The template for a conversation that writes no special token."""
    template = _template(tokenizer, bool(conversation.tools), where)
    for message in [*conversation.messages, *(conversation.tools or ())]:
        _refuse_special_tokens(tokenizer, message, where)
    return template


class _Chat:
    """A conversation as its template writes it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str, conversation: Conversation, where: str
    ) -> None:
        self._special_tokens = tokenizer.special_tokens_map
        self._template = template
        self._tools = list(conversation.tools) if conversation.tools else None
        # None would be written as "None" by templates that do not expect it
        self._messages = [{**one, "content": one.get("content") or ""} for one in conversation.messages]
        self._where = where
        self.text, self.generated = self._render(self._messages, generation=True)

    def prompt(self) -> str:
        """All of it, and what begins the assistant's next turn."""
        return self._render(self._messages, add_generation_prompt=True)[0]

    def turns(self) -> Iterator[CharSpan]:
        """Where in the text the assistant's turns begin and end, found by rendering what precedes each."""
        for i, message in enumerate(self._messages):
            if message["role"] == "assistant":
                prompt = self._render(self._messages[:i], add_generation_prompt=True)[0]
                reply = self._render(self._messages[: i + 1])[0]
                if not (self.text.startswith(reply) and reply.startswith(prompt)):
                    raise UserError(
                        f"{self._where}: the chat template writes message {i}, or what precedes it, in "
                        f"another way as the chat goes on, so no turn can be told apart: {_OWN_TEMPLATE}"
                    )
                yield len(prompt), len(prompt) + len(reply[len(prompt) :].rstrip())

    def require_calls(self) -> None:
        """UserError when the template leaves out tools or calls of them, as many templates do."""
        calls = [call for message in self._messages for call in message.get("tool_calls") or ()]
        for entry in [*(self._tools or ()), *calls]:
            name = entry.get("function", entry).get("name")
            if isinstance(name, str) and name not in self.text:
                raise UserError(
                    f"{self._where}: the chat template does not write the tool {name!r}: pass one that does "
                    f"with --chat-template, or leave tools out"
                )

    def _render(
        self, messages: list[dict[str, Any]], *, generation: bool = False, **options: Any
    ) -> tuple[str, list[CharSpan]]:
        """The text, and where it holds what the template says the assistant generates.

        ``apply_chat_template`` makes a mask of tokens from the same places, but masks all that follows when a
        turn ends in a character without a token of its own.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        generation = generation and _GENERATION.search(self._template) is not None
        options |= {**self._special_tokens, "tools": self._tools, "chat_template": self._template}
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages], return_assistant_tokens_mask=generation, **options
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # template code
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self._where}: the chat template cannot write the first {len(messages)} messages "
                f"({reason}): mend them, or pass a template that can with --chat-template"
            ) from None
        (text,), spans = rendered
        return text, spans[0] if generation else []


def require_syntax(template: str, where: str) -> None:
    """UserError when ``template`` is not Jinja; whether it can write a chat shows only with the chat."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[[]], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}:{error.lineno} is not Jinja ({error.message}): mend it") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        pass  # it wants a first message, as many do


def _template(tokenizer: PreTrainedTokenizerFast, tools: bool, where: str) -> str:
    """The tokenizer's template, of several the one that fits."""
    try:
        template: str = tokenizer.get_chat_template(None, [{}] if tools else None)
    except ValueError:
        raise UserError(
            f"{where}: the tokenizer has no chat template for it: pass one with --chat-template"
        ) from None
    return template


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerFast, part: Any, where: str) -> None:
    """UserError when a string in ``part``, at any depth, holds a special token."""
    if isinstance(part, str):
        found = _special_tokens(tokenizer).search(part)
        if found:
            raise UserError(
                f"{where} writes the special token {found[0]!r}, which could forge a turn: mend or remove it"
            )
    elif isinstance(part, Mapping):
        for one in part.items():
            _refuse_special_tokens(tokenizer, one, where)
    elif isinstance(part, Sequence):
        for one in part:
            _refuse_special_tokens(tokenizer, one, where)


@lru_cache(maxsize=1)  # some tokenizers have hundreds
def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Any of them."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special.union(tokenizer.all_special_tokens)))) or "(?!)")


def _token_span(text: str, offsets: np.ndarray, turn: CharSpan) -> CharSpan:
    """The tokens of the characters ``turn`` of ``text``; ``offsets`` [n, 2] are the tokens' own.

    A token that begins before the turn belongs to the prompt, unless only white space of the prompt is in it:
    many tokenizers join a word and the space before it.
    """
    begin, end = turn
    first, last = np.searchsorted(offsets[:, 0], (begin, end), side="left").tolist()
    if first > 0:
        start, stop = offsets[first - 1].tolist()
        if text[start:begin].isspace() and text[begin : max(begin, stop)].strip():
            first -= 1
    return first, max(first, last)
