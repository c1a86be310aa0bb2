"""What a packed batch holds to reply to, and what the teacher is shown, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opmix_dist.data.batch import collate
from opmix_dist.data.builtin_chat import TEMPLATE
from opmix_dist.data.chat import render
from opmix_dist.data.samples import Sample
from opmix_dist.data.source import Conversation as Chat
from opmix_dist.data.tokenizer import train_tokenizer
from opmix_dist.errors import UserError
from opmix_dist.method_config import SDFTConfig
from opmix_dist.methods.contexts import DemonstrationContext
from opmix_dist.methods.conversations import Conversation, Text, documents
from opmix_dist.methods.replied import Packing, RepliedBatch
from opmix_dist.tasks.prompts import end_ids


def sample(ends: list[int], spans: list[tuple[int, int]] | None) -> Sample:
    """Tokens 10, 11, ..."""
    tokens = np.arange(10, 10 + ends[-1], dtype=np.uint16)
    found = None if spans is None else np.array(spans, np.uint32).reshape(-1, 2)
    return Sample(tokens, np.array(ends, np.uint32), found)


def test_conversations_of_packed_samples() -> None:
    """Two of them; one of two turns, of which the first is replied to; text, and a rest of it."""
    batch = collate(
        [
            sample([5, 9], [(2, 5), (8, 9)]),
            sample([7], [(2, 4), (6, 7)]),
            sample([3, 4, 8], None),
            sample([6], []),
        ],
        10,
        mask_documents=True,
    )
    found = list(documents(batch))
    assert found[0] == [Conversation([10, 11], [12, 13, 14]), Conversation([15, 16, 17], [18])]
    assert found[1] == [Conversation([10, 11], [12, 13])]
    texts = [one for one in found[2] if isinstance(one, Text)]
    assert [(t.tokens.tolist(), t.learnt.tolist()) for t in texts] == [
        ([10, 11, 12], [False, True, True]),
        ([14, 15, 16, 17], [False, True, True, True]),
    ]
    assert found[3] == []


def test_replies_stand_behind_their_prompts_in_the_order_of_the_batch() -> None:
    student, teacher = Packing(skip_tokens=1), Packing(skip_tokens=1)
    for packing in (student, teacher):
        packing.begin()
    student.add_reply([1, 2], [3, 4, 5])
    student.add_reply([6], [7, 8])
    teacher.add_reply([1, 2, 90, 91], [3, 4, 5])
    teacher.add_reply([6, 92], [7, 8])
    student.begin()
    teacher.begin()
    student.add_text(Text(np.array([20, 21]), np.array([False, True])))
    batch = RepliedBatch.of(student, teacher)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [20, 21, 0, 0, 0, 0, 0, 0]]
    assert batch.tokens[batch.loss_mask].tolist() == [4, 5, 8, 21]
    assert batch.distilled is not None
    assert batch.tokens[batch.distilled].tolist() == [4, 5, 8]
    assert batch.position_ids is not None
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    theirs = batch.teacher
    assert theirs.tokens[0].tolist() == [1, 2, 90, 91, 3, 4, 5, 6, 92, 7, 8]
    assert theirs.tokens[theirs.loss_mask].tolist() == [4, 5, 8]
    assert batch[slice(1, 2)].teacher.loss_mask.sum() == 0
    assert torch.equal(batch.targets, torch.tensor([3, 1]))


def test_the_demonstration_is_a_part_of_the_users_words() -> None:
    tokenizer = train_tokenizer(["User: Assistant: What is it? blue lamp and then"] * 3, 300)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "blue lamp"}]
    ids, spans = render(tokenizer, Chat(messages), "here")
    begin, end = spans[0].tolist()
    prompt, demonstration = ids[:begin].tolist(), ids[begin:end].tolist()
    context = DemonstrationContext(tokenizer, " e.g. {demonstration}. So?", end_ids(tokenizer))
    shown = tokenizer.decode(context(prompt, demonstration))
    end_of_turn = "<|endoftext|>"
    assert shown == f"User:\nWhat is it? e.g. blue lamp. So?{end_of_turn}\nAssistant:\n"
    cut_off = tokenizer.decode(context(prompt, demonstration[:-2]))  # by the end of its sample
    assert cut_off.startswith("User:\nWhat is it? e.g. blue")
    with pytest.raises(UserError, match="does not follow a user's message"):
        context(prompt[:-1], demonstration)


def test_settings_show_the_demonstration_once() -> None:
    with pytest.raises(ValueError, match="must hold .demonstration. once"):
        SDFTConfig(demonstration="without")
