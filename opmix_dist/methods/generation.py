"""Whole copies of the model under training, on every rank: what replies to prompts, and teachers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.engines.single import DTYPES, materialise
from opmix_dist.method_config import OnPolicyConfig
from opmix_dist.methods.base import MethodAround
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
def mixed_in(
    parameters: Iterable[tuple[str, Tensor]], shares: Sequence[tuple[PreTrainedModel, float]]
) -> Iterator[tuple[str, Tensor]]:
    """The same ``parameters``, while each model's own move towards those that pass:
    phi <- (1 - share) phi + share theta."""
    for name, tensor in parameters:
        for model, share in shares:
            own = parameter_of(model, name)
            if share == 1.0:
                own.copy_(tensor)
            else:
                own.lerp_(tensor.to(own), share)
        yield name, tensor


def parameter_of(model: PreTrainedModel, name: str) -> nn.Parameter:
    return cast(nn.Module, model).get_parameter(name)


def named(prefix: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters, for ``Engine.beside``."""
    parameters = cast(nn.Module, model).named_parameters()
    return {f"{prefix}.{name}": parameter.detach() for name, parameter in parameters}


class Policy(ABC):
    """What samples replies, with parameters of its own on every rank."""

    @abstractmethod
    def refresh(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take these parameters, one at a time, all that there are.

        Args:
            parameters: as of ``Engine.parameters``, which is collective.
        """

    @abstractmethod
    def sample(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed: int) -> Generated:
        """A reply to each prompt, of at most as many tokens as its limit says. Not collective."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The parameters, for ``Engine.beside``: of a policy that is older than a checkpoint, which is asked
        before any refresh."""

    @abstractmethod
    def restore(self) -> None:
        """A checkpoint was read into what was :meth:`kept`."""

    @abstractmethod
    def close(self) -> None:
        """Not collective."""


class TransformersPolicy(Policy):
    """A copy of the model."""

    def __init__(self, model: PreTrainedModel, config: OnPolicyConfig, end_ids: Sequence[int]) -> None:
        """
        Args:
            model: of :func:`whole_model`.
            end_ids: tokens that end a reply.
        """
        self.model, self.config, self.end_ids = model, config, end_ids

    def refresh(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for _ in mixed_in(parameters, [(self.model, 1.0)]):
            pass

    def sample(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed: int) -> Generated:
        return generate(
            self.model,
            prompts,
            max_new_tokens=limits,
            end_ids=self.end_ids,
            batch_size=self.config.generation_batch_size,
            sampling=Sampling(self.config.temperature, self.config.top_p, seed),
        )

    def kept(self) -> dict[str, Tensor]:
        return named("policy", self.model)

    def restore(self) -> None:
        """The checkpoint was read into the model itself."""

    def close(self) -> None:
        pass


def build_policy(around: MethodAround, config: OnPolicyConfig, end_ids: Sequence[int]) -> Policy:
    """Collective over the trainer ranks.

    Raises:
        UserError: what ``generation`` names is missing, or cannot run the model.
    """
    if config.generation == "vllm":
        from opmix_dist.methods.vllm_policy import VLLMPolicy

        return VLLMPolicy(around, config, end_ids)
    dtype = DTYPES[around.config.engine.param_dtype]
    return TransformersPolicy(whole_model(around.source, around.world.device, dtype), config, end_ids)
