"""Errors of a model on tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from transformers import PreTrainedModel

from opmix_dist.data.batch import collate
from opmix_dist.errors import UserError
from opmix_dist.models.loss import sample_loss_sums
from opmix_dist.tasks.generation import Generated, generate, require_room
from opmix_dist.tasks.prompts import end_ids, prompt_ids, replied, reply_text
from opmix_dist.tasks.records import Task
from opmix_dist.tasks.scorers import error_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Generator = Callable[[Sequence[Sequence[int]], Sequence[int]], Generated]
"""Prompts and the tokens that end a reply, to replies."""


@dataclass(frozen=True)
class ScoringOptions:
    """How replies are made and scored.

    batch_size: prompts, or choices, in a forward pass.
    max_new_tokens: most tokens of a reply.
    choices: of multiple choice: the likeliest of the choices, each with the end of its turn, by the sum of
        its tokens' log-probabilities; or the one that the model's own reply begins with.
    allow_code: run the scorers that tasks name.
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    choices: Literal["likelihood", "generation"] = "likelihood"
    allow_code: bool = False


@dataclass
class Scored:
    """Of N tasks, in order.

    errors: [N] float64, 0..1.
    replies: the model's; of multiple choice by likelihood, the choice.
    generated_tokens, scored_tokens: that were computed for replies and for likelihoods, prompts and padding
        included.
    kinds: of the tasks.
    """

    errors: np.ndarray
    replies: list[str]
    generated_tokens: int = 0
    scored_tokens: int = 0
    kinds: list[str] = field(default_factory=list)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    options: ScoringOptions = ScoringOptions(),
    *,
    where: str = "tasks",
    numbers: Sequence[int] | None = None,
    generator: Generator | None = None,
) -> Scored:
    """Errors of ``model``, which is left in evaluation mode.

    Args:
        where: what errors call the tasks, with a number behind it.
        numbers: these numbers; None: from 1.
        generator: what replies instead of transformers.

    Raises:
        UserError: a task cannot be written by the chat template, does not fit the model, or its scorer fails.
    """
    model.eval()
    names = [f"{where}:{number}" for number in numbers or range(1, len(tasks) + 1)]
    found = Scored(np.ones(len(tasks)), [""] * len(tasks), kinds=[task.kind for task in tasks])
    by_likelihood = [
        i
        for i, task in enumerate(tasks)
        if task.kind == "multiple_choice" and options.choices == "likelihood"
    ]
    replying = sorted({*range(len(tasks))} - {*by_likelihood})
    if by_likelihood:
        _choose(model, tokenizer, tasks, by_likelihood, names, options, found)
    if replying:
        _reply(model, tokenizer, tasks, replying, names, options, generator, found)
    return found


def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    chosen: Sequence[int],
    names: Sequence[str],
    options: ScoringOptions,
    found: Scored,
) -> None:
    """Of equal likelihoods, the first choice is taken."""
    pairs = [(i, choice) for i in chosen for choice in tasks[i].choices or ()]
    samples = [replied(tokenizer, tasks[i], choice, names[i]) for i, choice in pairs]
    longest = max(len(sample.tokens) for sample in samples)
    require_room(model, longest, names[chosen[0]] if len(chosen) == 1 else "the choices")
    nats = np.empty(len(samples))
    order = sorted(range(len(samples)), key=lambda row: len(samples[row].tokens), reverse=True)
    for start in range(0, len(order), options.batch_size):
        rows = order[start : start + options.batch_size]
        length = len(samples[rows[0]].tokens)
        batch = collate([samples[row] for row in rows], length)
        nats[rows] = sample_loss_sums(model, batch, options.batch_size).numpy()
        found.scored_tokens += len(rows) * length
    row = 0
    for i in chosen:
        choices = tasks[i].choices or []
        best = choices[int(nats[row : row + len(choices)].argmin())]
        row += len(choices)
        found.replies[i], found.errors[i] = best, float(best != tasks[i].answer)


def _reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    chosen: Sequence[int],
    names: Sequence[str],
    options: ScoringOptions,
    generator: Generator | None,
    found: Scored,
) -> None:
    _refuse_code(tasks, chosen, options)
    prompts = [prompt_ids(tokenizer, tasks[i], names[i]) for i in chosen]
    for i, prompt in zip(chosen, prompts, strict=True):
        require_room(model, len(prompt) + options.max_new_tokens, names[i])
    ends = end_ids(tokenizer)
    if generator is not None:
        made = generator(prompts, ends)
    else:
        made = generate(
            model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            end_ids=ends,
            batch_size=options.batch_size,
        )
    found.generated_tokens += made.tokens
    for i, ids in zip(chosen, made.replies, strict=True):
        found.replies[i] = reply_text(tokenizer, ids)
        found.errors[i] = error_of(tasks[i], found.replies[i], allow_code=options.allow_code)


def _refuse_code(tasks: Sequence[Task], chosen: Sequence[int], options: ScoringOptions) -> None:
    """Before anything is generated."""
    named = next((tasks[i].scorer for i in chosen if tasks[i].scorer is not None), None)
    if named is not None and not options.allow_code:
        raise UserError(f"a task names the scorer {named}, code of yours: pass --allow-code to run it")
