"""Replies by vLLM, where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from opmix_dist.errors import UserError
from opmix_dist.tasks.generation import Generated


def require_vllm(setting: str) -> None:
    """UserError, which names ``setting``, where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(f"{setting} vllm: vLLM is not installed: install it, or take transformers")


def generate_with_vllm(
    folder: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> Generated:
    """The likeliest replies of the model in ``folder``, as of :func:`tasks.generation.generate`.

    Its tokens are those of prompts and replies: vLLM pads nothing.
    """
    require_vllm("--generation")
    from vllm import LLM, SamplingParams, TokensPrompt

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(end_ids), detokenize=False
    )
    model = LLM(model=folder, skip_tokenizer_init=True, trust_remote_code=False, seed=0)
    outputs = model.generate([TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], sampling)
    replies = [list(output.outputs[0].token_ids) for output in outputs]
    tokens = sum(len(prompt) + max(len(reply) - 1, 0) for prompt, reply in zip(prompts, replies, strict=True))
    return Generated(replies, tokens)
