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


MethodName = Literal["plain", "ewc", "mas", "gem", "o_lora", "sdft", "distill"]


Domains = list[str] | None
_OLD = "old domains to keep; null: all that start.run's model had read"
_LAMBDA = "lambda; the penalty is added to the mean loss in nats"


class ImportanceConfig(Section):
    """Of penalties lambda / 2 * sum F (theta - theta*)^2, theta* being the parameters at the run's start."""

    strength: float = Field(10.0, ge=0, description=_LAMBDA)
    domains: Domains = Field(None, description=_OLD)
    samples_per_domain: int = Field(
        64, ge=1, description="training samples of each old domain that importances are measured on"
    )


class EWCConfig(ImportanceConfig):
    fisher: Literal["empirical", "sampled"] = Field(
        "empirical",
        description="gradients of the log-likelihood of the data, or of labels that the model samples itself "
        "(the Fisher information proper)",
    )
    decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="null: a penalty for each earlier run's end, as in the paper; or online EWC: one, at the "
        "last end, earlier importances times this",
    )


class MASConfig(ImportanceConfig):
    strength: float = Field(0.01, ge=0, description=_LAMBDA)


class GEMConfig(Section):
    domains: Domains = Field(None, description=_OLD)
    samples_per_domain: int = Field(64, ge=1, description="training samples of each old domain in the memory")
    samples_per_step: int | None = Field(
        None, ge=1, description="of each domain's memory, drawn anew for each step; null: all of them"
    )
    projection: Literal["gem", "a_gem"] = Field(
        "gem",
        description="let the loss of no domain's memory rise, or (averaged GEM) that of all together",
    )
    margin: float = Field(
        0.0, ge=0, description="least value of GEM's dual variables, which favours the memories' losses"
    )


class OLoRAConfig(Section):
    strength: float = Field(0.5, ge=0, description="lambda of the penalty on overlapping adapters")
    overlap: Literal["absolute", "squared"] = Field(
        "absolute",
        description="what is summed of the entries of A_earlier A^T: absolute as in the authors' code, "
        "squared as in the paper",
    )


LEAST_VLLM_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""
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
    generation: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what samples the replies; vllm: in the trainers' own processes, if installed",
    )
    vllm_memory: float = Field(
        0.3, gt=0, lt=1, description="share of each device's memory that vLLM may have, parameters included"
    )
    top_k: int | None = Field(
        None, ge=1, description="likeliest tokens of the teacher that the KL is over; null: all, exact"
    )
    skip_tokens: int = Field(0, ge=0, description="first tokens of each reply that are not learnt")

    @model_validator(mode="after")
    def _warm_enough(self) -> OnPolicyConfig:
        if self.generation == "vllm" and self.temperature < LEAST_VLLM_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is below {LEAST_VLLM_TEMPERATURE}, the least that vLLM "
                "samples at: raise it, or set generation to transformers"
            )
        return self


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
        description="how the model is trained; plain: the loss and nothing else; ewc, mas: a penalty on what "
        "is important to old domains; gem: gradients that do not raise their losses; o_lora: adapters that "
        "are orthogonal to earlier ones; sdft: replies of its own, "
        "corrected by itself with a demonstration; distill: replies of its own, corrected by a teacher",
    )
    ewc: EWCConfig = EWCConfig()
    mas: MASConfig = MASConfig()
    gem: GEMConfig = GEMConfig()
    o_lora: OLoRAConfig = OLoRAConfig()
    sdft: SDFTConfig = SDFTConfig()
    distill: DistillConfig = DistillConfig()
