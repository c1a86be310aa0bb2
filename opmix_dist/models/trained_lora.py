"""LoRA for the training itself: one adapter on every linear layer but the LM head, all else frozen.

y = W x + s * B A dropout(x), s = alpha / rank (LoRA, arXiv 2106.09685). W keeps its name in the model, so a
checkpoint's weights are read as without adapters; A and B stand beside it as ``lora_A`` and ``lora_B``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.method_config import LoRAConfig
from opmix_dist.models.lora import require_adaptable
from opmix_dist.seeds import derive_seed

Fetch = Callable[[str], Tensor]
"""A parameter's name to the whole of it."""


class LoRALinear(nn.Linear):
    """A frozen linear layer W [d_out, d_in] with A [r, d_in] and B [d_out, r], all of them its own
    parameters: what shards or moves a module does so with them."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        empty = partial(torch.empty, dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(empty(config.rank, base.in_features))
        self.lora_B = nn.Parameter(empty(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        low = self.scale * F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return y + F.linear(low, self.lora_B).to(y.dtype)


@dataclass(frozen=True)
class TrainedAdapters:
    """The adapted layers of a model that :func:`adapt` has changed in place."""

    config: LoRAConfig
    seed: int
    layers: Mapping[str, LoRALinear]

    @property
    def names(self) -> list[str]:
        """Of the trained parameters, in the model's order."""
        return [f"{layer}.{half}" for layer in self.layers for half in ("lora_A", "lora_B")]

    def shape(self, name: str) -> torch.Size:
        """Of the whole, which a sharded one does not show."""
        layer, _, half = name.rpartition(".")
        linear, rank = self.layers[layer], self.config.rank
        return torch.Size([linear.out_features, rank] if half == "lora_B" else [rank, linear.in_features])

    def initial(self, name: str) -> Tensor:
        """As in PEFT: A uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5), B zero, so that the model starts
        unchanged. Depends on the seed and the layer's name only."""
        layer, _, half = name.rpartition(".")
        shape = self.shape(name)
        if half == "lora_B":
            return torch.zeros(shape)
        bound = 1 / math.sqrt(shape[1])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "lora", layer))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def merged(self, name: str, fetch: Fetch) -> Tensor:
        """A parameter of the plain model: W + s * B A of an adapted layer, any other as it is."""
        layer, _, leaf = name.rpartition(".")
        weight = fetch(name)
        if leaf != "weight" or layer not in self.layers:
            return weight
        A, B = fetch(f"{layer}.lora_A"), fetch(f"{layer}.lora_B")
        return torch.addmm(weight, B, A, alpha=self.layers[layer].scale)


def adapt(model: PreTrainedModel, config: LoRAConfig, *, seed: int) -> TrainedAdapters:
    """Replace the linear layers of ``model``, whose parameters may be on the meta device, and freeze all but
    the adapters, which are uninitialised.

    Args:
        seed: of A.

    Raises:
        UserError: a model that adapters cannot follow.
    """
    require_adaptable(model, who="adapters", instead="leave out model.lora")
    module = cast(nn.Module, model)
    module.requires_grad_(False)
    head = model.get_output_embeddings()
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and m is not head]
    layers = {}
    for name, linear in found:
        parent, _, leaf = name.rpartition(".")
        layers[name] = LoRALinear(linear, config)
        setattr(module.get_submodule(parent), leaf, layers[name])
    return TrainedAdapters(config, seed, layers)
