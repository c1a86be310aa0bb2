"""How adapted layers multiply: in the model's own dtype, or in 16 bits with copies of the frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opmix_dist.models.joint_linear import JointLoRALinear, add_joint, add_simulated
from opmix_dist.models.sharding import changed


class Mode(Enum):
    OFF = auto()
    TRAIN = auto()
    SIMULATE = auto()


@dataclass
class AdapterState:
    """What all adapted layers of a model are asked to do now."""

    scale: float
    drop: Callable[[Tensor], Tensor]
    """Of [K, rows, d], each group with its adapter's own generator."""
    mode: Mode = Mode.OFF
    coefficients: Tensor | None = None
    """[M, K] while simulating."""

    @property
    def gates(self) -> Tensor:
        assert self.coefficients is not None
        return self.coefficients


class Products:
    """In the dtype of the base's weights."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def __call__(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        state, y = self.state, layer.base(x)
        if state.mode is Mode.TRAIN:
            return add_joint(y, x, layer.A, layer.B, state.scale, state.drop)
        if state.mode is Mode.SIMULATE:
            # the adapters are constants here, so that their gradients' inputs are not kept
            A, B = layer.A.detach(), layer.B.detach()
            return add_simulated(y, x, A, B, state.scale, state.gates)
        return y

    @contextmanager
    def merged(self, layers: Sequence[JointLoRALinear], u: Tensor) -> Iterator[None]:
        """The base's weights are W + s * sum_c u_c B_c A_c inside (u [K]), and exactly W again after."""
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(changed(layer.base.weight, partial(self._merged_change, layer, u)))
            yield

    def _merged_change(self, layer: JointLoRALinear, u: Tensor) -> Tensor:
        return self.state.scale * layer.delta(u)

    def end_pass(self) -> None:
        """Drop what an earlier pass, perhaps with other gates, has left."""

    def adapters_changed(self) -> None:
        """Drop what was derived from the adapters' values."""


class SharedInput:
    """What layers that read the same tensor make of it once.

    A reader is known by the identity of its input. Nothing stays when all have read.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.clear()

    def put(self, x: Tensor, made: Tensor) -> None:
        self._x: Tensor | None = x
        self._made: Tensor | None = made
        self._left = self.readers

    def take(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What was put for this very tensor, or else what ``make`` gives."""
        if self._x is not x or self._made is None:
            self.put(x, make(x))
        made = self._made
        assert made is not None
        self._left -= 1
        if self._left == 0:
            self.clear()
        return made

    def clear(self) -> None:
        self._x = self._made = None
        self._left = 0


@dataclass
class Readers:
    """Adapted layers that read one tensor, in order; most are alone."""

    layers: Sequence[JointLoRALinear]
    shared: SharedInput = field(init=False)

    def __post_init__(self) -> None:
        self.shared = SharedInput(len(self.layers))


class CastProducts(Products):
    """In ``dtype``, whatever the dtype of the residual stream that is read and of the base's weights.

    Weights are copied once, when they are first needed. The model's own are left alone, and so a merged
    weight is rounded once, from float32.
    """

    def __init__(self, state: AdapterState, dtype: torch.dtype, readers: Sequence[Readers]) -> None:
        super().__init__(state)
        self.dtype = dtype
        self.readers = {layer: group for group in readers for layer in group.layers}
        self._weights: dict[JointLoRALinear, Tensor] = {}
        self._biases: dict[JointLoRALinear, Tensor | None] = {}
        self._merged: dict[JointLoRALinear, Tensor] = {}
        self._is_merged = False

    def __call__(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        state, x = self.state, self.cast(layer, x)
        y = self.product(layer, x)
        if state.mode is Mode.TRAIN:
            A, B = layer.A.to(self.dtype), layer.B.to(self.dtype)
            return add_joint(y, x, A, B, state.scale, state.drop)
        if state.mode is Mode.SIMULATE:
            A, B = layer.A.detach().to(self.dtype), layer.B.detach().to(self.dtype)
            return add_simulated(y, x, A, B, state.scale, state.gates)
        return y

    def product(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        """W x + b of x in the compute dtype."""
        weight = self._merged[layer] if self._is_merged else self.weight(layer)
        return F.linear(x, weight, self.bias(layer))

    def cast(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        """x in the compute dtype; one copy for all that read it."""
        if x.dtype == self.dtype:
            return x
        return self.readers[layer].shared.take(x, lambda x: x.to(self.dtype))

    def weight(self, layer: JointLoRALinear) -> Tensor:
        if layer not in self._weights:
            self._merged.clear()  # copies of the whole model: of one way to compute at a time
            self._weights[layer] = layer.base.weight.detach().to(self.dtype)
        return self._weights[layer]

    def bias(self, layer: JointLoRALinear) -> Tensor | None:
        if layer not in self._biases:
            bias = layer.base.bias
            self._biases[layer] = None if bias is None else bias.detach().to(self.dtype)
        return self._biases[layer]

    @contextmanager
    def merged(self, layers: Sequence[JointLoRALinear], u: Tensor) -> Iterator[None]:
        """As :meth:`Products.merged`, in buffers that stay for the next candidate."""
        self.adapters_changed()  # what simulation has prepared would take as much memory again
        self._weights.clear()
        u = u.to(layers[0].A)
        for layer in layers:
            if layer not in self._merged:
                self._merged[layer] = torch.empty_like(layer.base.weight, dtype=self.dtype)
            self.merge(layer, u, self._merged[layer])
        self._is_merged = True
        try:
            yield
        finally:
            self._is_merged = False

    @torch.no_grad()
    def merge(self, layer: JointLoRALinear, u: Tensor, out: Tensor) -> None:
        """out [d_out, d_in] = W + s * sum_c u_c B_c A_c."""
        out.copy_(layer.base.weight + self.state.scale * layer.delta(u))

    def end_pass(self) -> None:
        for group in self.readers.values():
            group.shared.clear()


class ShardedProducts(CastProducts):
    """As :class:`CastProducts`, of a base whose weights are gathered for each pass, and so with copies that
    live no longer than a product."""

    def product(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        return _CastProduct.apply(x, layer.base.weight, layer.base.bias)

    @contextmanager
    def merged(self, layers: Sequence[JointLoRALinear], u: Tensor) -> Iterator[None]:
        with Products.merged(self, layers, u):
            yield


class _CastProduct(torch.autograd.Function):
    """x W^T + b of x [..., d_in] and constant W and b, in x's dtype. The backward pass casts W again: a copy
    that is kept for it would be one of the whole model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None
