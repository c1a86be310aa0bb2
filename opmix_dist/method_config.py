"""The settings of training methods: what keeps a model from forgetting, besides the mixture.

Experience replay is none of them: a replay mixture (``mixture.initial: {old: 0.1, new: 0.9}``) is all of it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opmix_dist.settings import Section


class LoRAConfig(Section):
    rank: int = Field(16, ge=1, description="LoRA rank")
    alpha: int = Field(32, gt=0, description="LoRA alpha; the delta is alpha / rank * B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")


MethodName = Literal["plain", "sdft", "distill"]


Direction = Literal["reverse", "forward"]


class OnPolicyConfig(Section):
    """Of methods that sample replies from the model under training and have a teacher correct them."""

    divergence: Direction = Field(
        "reverse", description="per token: reverse is KL(student || teacher), forward KL(teacher || student)"
    )
    max_new_tokens: int = Field(128, ge=1, description="most tokens of a sampled reply")
    temperature: float = Field(1.0, gt=0, description="of the sampling; 1 samples from the model itself")
    top_p: float = Field(1.0, gt=0, le=1, description="probability of the likeliest tokens to sample from")
    refresh_steps: int = Field(
        1, ge=1, description="steps between refreshes of the copy that samples; 1 is exactly on-policy"
    )
    generation_batch_size: int = Field(32, ge=1, description="prompts of a rank that are replied to at once")
    top_k: int | None = Field(
        None, ge=1, description="likeliest tokens of the teacher that the KL is over; null: all, exact"
    )
    skip_tokens: int = Field(0, ge=0, description="first tokens of each reply that are not learnt")


class SDFTConfig(OnPolicyConfig):
    teacher: Literal["ema", "frozen"] = Field(
        "ema", description="the model itself: averaged over the steps, or as the run started from it"
    )
    ema_rate: float = Field(
        0.01, gt=0, le=1, description="share of the current parameters in the average, at each refresh"
    )
    demonstration: str = Field(
        "\n\nA good answer would be:\n{demonstration}\n\nNow give an answer of your own.",
        description="what the teacher's prompt has behind the user's words, with {demonstration} in it",
    )

    @model_validator(mode="after")
    def _shows_it_once(self) -> SDFTConfig:
        if self.demonstration.count("{demonstration}") != 1:
            raise ValueError("method.sdft.demonstration must hold {demonstration} once")
        return self


class DistillConfig(OnPolicyConfig):
    teacher: str | None = Field(
        None, description="HF folder or hub id of the teacher, with the data's tokenizer"
    )


class MethodConfig(Section):
    name: MethodName = Field(
        "plain",
        description="how the model is trained; plain: the loss and nothing else; sdft: replies of its own, "
        "corrected by itself with a demonstration; distill: replies of its own, corrected by a teacher",
    )
    sdft: SDFTConfig = SDFTConfig()
    distill: DistillConfig = DistillConfig()
