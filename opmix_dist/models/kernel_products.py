"""Adapted layers, RMSNorms and the LM head through Triton kernels (:mod:`opmix_kernels`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opmix_dist.models.heads import HiddenLosses
from opmix_dist.models.joint_linear import JointLoRALinear
from opmix_dist.models.products import AdapterState, CastProducts, Mode, Readers
from opmix_dist.seeds import derive_seed


@dataclass(frozen=True)
class _Wide:
    """Of layers that read one tensor: where X and each one's gated low-rank activations lie side by side, and
    what multiplies them."""

    layout: Any
    A: Tensor
    """[n, K, r, d_in] of the n layers."""
    matrices: dict[JointLoRALinear, tuple[int, Tensor]]
    """Place among the readers, and [W | B] in the order of its columns."""


class KernelProducts(CastProducts):
    """As :class:`CastProducts`, and

    - simulation without gradients is one product a layer: [X | Z] [W | B]^T, where one kernel writes X and
      the gated low-rank activations Z of all layers that read X, together with the RMSNorm before them;
    - simulation with gradients is ``gated_lowrank_linear``, training ``joint_lora_linear``, and merging
      ``merge_deltas``.

    What is derived from the weights is made once and kept, for one of these ways at a time.

    Args:
        seeds: of the adapters' dropout; every layer has a seed of its own from each.
        step: gives the step of training, which the dropout masks go by.
    """

    def __init__(
        self,
        state: AdapterState,
        dtype: torch.dtype,
        readers: Sequence[Readers],
        *,
        ops: ModuleType,
        names: dict[JointLoRALinear, str],
        seeds: Sequence[int],
        dropout: float,
        step: Callable[[], int],
    ) -> None:
        super().__init__(state, dtype, readers)
        self.ops, self.dropout, self.step = ops, dropout, step
        self.names, self.seeds = names, seeds
        self._layer_seeds: dict[JointLoRALinear, Tensor] = {}
        self._wide: dict[int, _Wide] = {}
        self._stacks: dict[JointLoRALinear, Any] = {}

    def __call__(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        if self.state.mode is Mode.TRAIN:
            return self._joint(layer, x)
        if self.state.mode is Mode.SIMULATE:
            return self._differentiable(layer, x) if self._differentiates else self._combined(layer, x)
        return super().__call__(layer, x)

    @property
    def _differentiates(self) -> bool:
        return torch.is_grad_enabled() and self.state.gates.requires_grad

    def _joint(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        return self.ops.joint_lora_linear(
            self.cast(layer, x),
            self.weight(layer),
            layer.A,
            layer.B,
            scale=self.state.scale,
            bias=self.bias(layer),
            dropout=self.dropout,
            seeds=self._seeds_of(layer),
            step=self.step(),
        )

    def _seeds_of(self, layer: JointLoRALinear) -> Tensor:
        """[K] int64: with equal ones, layers of one size would drop the same elements."""
        if layer not in self._layer_seeds:
            own = [derive_seed(seed, "dropout", self.names[layer]) for seed in self.seeds]
            self._layer_seeds[layer] = torch.tensor(own, device=layer.A.device)
        return self._layer_seeds[layer]

    def _combined(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        """The layer's columns of [X | Z], which the norm before it, the first reader of x or now this layer
        has made, times its matrix."""
        readers = self.readers[layer]
        wide = readers.shared.take(x, lambda x: self._produce(readers, x, None))
        parts = self._parts(readers)
        place, matrix = parts.matrices[layer]
        y = F.linear(wide[:, parts.layout.span(place)], matrix, self.bias(layer))
        return y.view(*x.shape[:-1], -1)

    def _differentiable(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        A, B = layer.A.detach(), layer.B.detach()
        if layer not in self._stacks:
            self._wide.clear()
            self._merged.clear()
            self._stacks[layer] = self.ops.LowRankStack.build(layer.base.weight, A, B, self.dtype)
        stack = self._stacks[layer]
        return self.ops.gated_lowrank_linear(
            self.cast(layer, x),
            stack.weight,
            A,
            B,
            self.state.gates,
            scale=self.state.scale,
            bias=self.bias(layer),
            prepared=stack,
        )

    def norm_forward(self, readers: Readers, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """What stands for an RMSNorm's own ``forward``: its result as the readers' part of [X | Z]."""
        own = norm.forward

        def forward(x: Tensor) -> Tensor:
            if self.state.mode is not Mode.SIMULATE or self._differentiates:
                return own(x)
            wide = self._produce(readers, x, norm)
            normed = wide[:, self._parts(readers).layout.x].view(x.shape)
            readers.shared.put(normed, wide)
            return normed

        return forward

    def _produce(self, readers: Readers, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[X | Z] of x [..., d_in], X normalised first if there is a norm: [R, width]."""
        return self.ops.norm_shrink_gate(
            x,
            self._parts(readers).A,
            self.state.gates,
            scale=self.state.scale,
            norm_weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.variance_epsilon,
            out_dtype=self.dtype,
        )

    def _parts(self, readers: Readers) -> _Wide:
        if id(readers) not in self._wide:
            self._stacks.clear()
            self._merged.clear()
            self._wide[id(readers)] = self._combine(readers.layers)
        return self._wide[id(readers)]

    @torch.no_grad()
    def _combine(self, layers: Sequence[JointLoRALinear]) -> _Wide:
        count, rank, width = layers[0].A.shape
        layout = self.ops.WideLayout(width, len(layers), count * rank)
        matrices = {
            layer: (place, layout.matrix(place, layer.base.weight.to(self.dtype), layer.B))
            for place, layer in enumerate(layers)
        }
        return _Wide(layout, torch.stack([layer.A for layer in layers]).to(self.dtype), matrices)

    def merge(self, layer: JointLoRALinear, u: Tensor, out: Tensor) -> None:
        self.ops.merge_deltas(
            layer.base.weight.detach(),
            layer.A.detach(),
            layer.B.detach(),
            u,
            scale=self.state.scale,
            out_dtype=self.dtype,
            out=out,
        )

    def hidden_losses(self, head: nn.Linear) -> HiddenLosses:
        """Cross-entropies without logits, summed in an order that does not depend on the other samples."""
        weight = head.weight.detach().to(self.dtype)

        def losses(hidden: Tensor, targets: Tensor) -> Tensor:
            found = self.ops.linear_cross_entropy(hidden, weight, targets)
            one = torch.zeros(targets.shape[1], dtype=torch.int64, device=targets.device)
            return self.ops.segment_sums(found, one, 1)[:, 0]

        return losses

    def adapters_changed(self) -> None:
        self._wide.clear()
        self._stacks.clear()
