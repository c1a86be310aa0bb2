"""``opmix score --generation vllm``: the replies of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from opmix_dist.errors import UserError
from opmix_dist.tasks.generation import generate
from opmix_dist.tasks.vllm import FolderReplies
from tests.helpers import needs_vllm
from tests.models import tiny

PROMPTS = [[5, 6, 7], [9] * 12, [1]]


@needs_vllm
def test_replies_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the checkpoint's own settings of generation say; and of longer prompts, for which vLLM is
    started again."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny.build("llama", spread=0.5, **sizes)  # vLLM's attention takes 32 dimensions at least
    prompts = [*PROMPTS, [3] * 30]
    free = generate(model, prompts, max_new_tokens=9, end_ids=[tiny.VOCABULARY], batch_size=4).replies
    assert model.generation_config is not None
    model.generation_config.eos_token_id = free[0][1]
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(tmp_path)
    ends = [free[1][4]]
    wanted = generate(model, prompts, max_new_tokens=9, end_ids=ends, batch_size=4).replies
    assert any(reply[-1] in ends and len(reply) < 9 for reply in wanted)
    replies = FolderReplies(str(tmp_path), "cpu", 9)
    try:
        first = replies(PROMPTS, ends)
        assert first.replies == wanted[:3]
        assert first.tokens == 16 + sum(len(reply) - 1 for reply in first.replies)
        assert replies(prompts, ends).replies == wanted
    finally:
        replies.close()


@needs_vllm
def test_what_vllm_cannot_run_is_named(tmp_path: Path) -> None:
    """Its attention takes no heads of 8 dimensions."""
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^--generation vllm: vLLM cannot run the model"):
        FolderReplies(str(tmp_path), "cpu", 9)(PROMPTS, [0])
