"""A whole copy of the model under training, on every rank, which replies to prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.engines.base import Engine
from opmix_dist.engines.single import materialise
from opmix_dist.method_config import OnPolicyConfig
from opmix_dist.models.source import ModelSource
from opmix_dist.tasks.generation import ATTENTION, Generated, Sampling, generate


def whole_model(source: ModelSource, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``source`` on a device in evaluation mode, its parameters not set yet and without
    gradients; with an attention that takes padding on the left and documents apart."""
    source = copy.copy(source)
    source.attention = ATTENTION
    model = source.build()
    for parameter in model.parameters():  # buffers, as rotary frequencies, keep their precision
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    materialise(model, device)
    return model.eval()


@torch.no_grad()
def fill_from_source(model: PreTrainedModel, source: ModelSource) -> None:
    """Set the parameters of :func:`whole_model` to those of its source."""
    for name in source.shapes:
        parameter_of(model, name).copy_(source.tensor(name))


@torch.no_grad()
def mix_in(engine: Engine, shares: Sequence[tuple[PreTrainedModel, float]]) -> None:
    """Collective. Move each model's parameters towards the engine's, which are put together one at a time:
    phi <- (1 - share) phi + share theta."""
    for name, tensor in engine.parameters():
        for model, share in shares:
            own = parameter_of(model, name)
            if share == 1.0:
                own.copy_(tensor)
            else:
                own.lerp_(tensor.to(own), share)


def parameter_of(model: PreTrainedModel, name: str) -> nn.Parameter:
    return cast(nn.Module, model).get_parameter(name)


def named(prefix: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters, for ``Engine.beside``."""
    parameters = cast(nn.Module, model).named_parameters()
    return {f"{prefix}.{name}": parameter.detach() for name, parameter in parameters}


@dataclass(frozen=True)
class Policy:
    """What samples replies.

    end_ids: tokens that end a reply.
    """

    model: PreTrainedModel
    config: OnPolicyConfig
    end_ids: Sequence[int]

    def sample(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed: int) -> Generated:
        """A reply to each prompt, of at most as many tokens as its limit says."""
        return generate(
            self.model,
            prompts,
            max_new_tokens=limits,
            end_ids=self.end_ids,
            batch_size=self.config.generation_batch_size,
            sampling=Sampling(self.config.temperature, self.config.top_p, seed),
        )
