"""Replies of a model to prompts, by transformers' own ``generate``: batched, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from opmix_dist.errors import UserError

ATTENTION = "sdpa"
"""Of models that generate: it takes both a cache and padding on the left."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without it the likeliest one is taken.

    temperature: the logits are divided by it.
    top_p: of the likeliest tokens, as many as together have this probability.
    seed: of the draws, which nothing else changes; torch's own generators stay as they are.
    """

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """Replies in the order of their prompts.

    replies: token ids; the one that ends the turn is the last, where it came within the limit.
    tokens: that were computed, padding included: a batch of B prompts of at most P tokens, of which the
        longest reply has G, takes B (P + G - 1).
    """

    replies: list[list[int]]
    tokens: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    end_ids: Sequence[int],
    batch_size: int,
    sampling: Sampling | None = None,
) -> Generated:
    """Go on from each prompt until its turn ends. Leaves ``model`` in evaluation mode.

    Prompts of about one length share a batch. What else is in a batch changes a reply only by rounding.

    Args:
        model: whole, on one device; nothing of its own generation settings counts.
        prompts: N of at least one token.
        max_new_tokens: of all replies, or of each.
        end_ids: tokens of which any ends a reply.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i), reverse=True)
    model.eval()
    replies: list[list[int]] = [[] for _ in prompts]
    tokens = 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(limits[i] for i in rows)
            found = _generate_batch(model, [prompts[i] for i in rows], longest, end_ids, sampling)
            tokens += len(rows) * (len(prompts[rows[0]]) + max(map(len, found)) - 1)
            for i, reply in zip(rows, found, strict=True):
                replies[i] = _ended(reply, end_ids)[: limits[i]]
    return Generated(replies, tokens)


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling | None,
) -> list[list[int]]:
    """New tokens of each, all of one length."""
    length = max(map(len, prompts))
    ids = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=0,  # never attended to, and behind an end never looked at
        **_draws(sampling),
    )
    with _own_settings_aside(model):
        found = cast(Any, model).generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return cast(list[list[int]], found[:, length:].tolist())


@contextmanager
def _own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Else ``generate`` mixes a checkpoint's own into those that it is given; how to forbid that by an
    argument differs between transformers 4 and 5."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _draws(sampling: Sampling | None) -> dict[str, float | bool]:
    if sampling is None:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _ended(reply: list[int], end_ids: Sequence[int]) -> list[int]:
    """Up to the first end, with it."""
    ends = [i for i, token in enumerate(reply) if token in end_ids]
    return reply[: ends[0] + 1] if ends else reply


def most_positions(config: PretrainedConfig) -> int | None:
    """Of a model; None: it has no such limit."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else int(most)


def require_room(model: PreTrainedModel, tokens: int, what: str) -> None:
    """UserError where ``tokens`` are more than the model has positions."""
    most = most_positions(model.config)
    if most is not None and tokens > most:
        raise UserError(
            f"{what}: prompt and reply may take {tokens} tokens, but the model has {most} positions: lower "
            "--max-new-tokens, or leave it out"
        )
