"""Several LoRA adapters on one frozen base: trained jointly, mixed by coefficients, merged in memory.

An adapted layer computes, with scale s = alpha / rank,

    joint training:   y_k = W x_k + s * B_k A_k dropout(x_k)         rows grouped by adapter k
    simulation:       y_m = W x_m + s * sum_c U[m, c] B_c A_c x_m    rows grouped by candidate m
    merged:           W(u) = W + s * sum_c u_c B_c A_c               one candidate, full deltas summed

(OP-Mix, arXiv 2605.15220, section 3; LoRA, arXiv 2106.09685). Full deltas are summed: summing A's and B's
separately would add cross terms B_i A_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.errors import UserError
from opmix_dist.models.compute import Compute
from opmix_dist.models.computing import computed
from opmix_dist.models.joint_linear import JointLoRALinear
from opmix_dist.models.peft_files import read_peft, write_peft
from opmix_dist.models.products import AdapterState, Mode, Products
from opmix_dist.seeds import derive_seed


def require_adaptable(
    model: PreTrainedModel, *, who: str = "probes", instead: str = "use mixture.policy static"
) -> None:
    """UserError naming the module that adapters cannot follow; to be asked before a run begins.

    Args:
        who: adapts the model.
        instead: what the user may do about it.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Conv1D":
            raise UserError(f"{name} is a Conv1D: {who} adapt torch.nn.Linear only, so {instead}")
        if kind.endswith(("Experts", "SparseMoeBlock", "MoE")):
            raise UserError(f"{name} routes tokens to experts, which {who} cannot follow: {instead}")


class JointAdapters:
    """K named adapters on every linear layer of ``model`` but the LM head; the base is frozen.

    Args:
        model: is changed in place; :meth:`remove` gives it back as it was.
        seeds: one per adapter; each adapter's initial A and dropout masks depend on its own seed only, so
            that an adapter does not depend on which others are trained beside it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        *,
        rank: int,
        alpha: int,
        dropout: float = 0.0,
        seeds: Sequence[int],
    ) -> None:
        assert len(names) == len(seeds)
        self.model, self.names = model, tuple(names)
        self.rank, self.alpha, self.scale, self.dropout = rank, alpha, alpha / rank, dropout
        self.seeds = tuple(seeds)
        self.state = AdapterState(self.scale, self.drop)
        self.products = Products(self.state)
        model.requires_grad_(False)
        self.layers = self._inject()
        self._initialise(seeds)
        device = next(model.parameters()).device
        self._dropout_generators = [torch.Generator(device) for _ in seeds]
        self.dropout_step = 0

    def _inject(self) -> dict[str, JointLoRALinear]:
        head = self.model.get_output_embeddings()
        found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        if not found:
            raise UserError(f"{type(self.model).__name__} has no linear layers that LoRA can adapt")
        layers = {}
        for name, linear in found:
            parent, _, leaf = name.rpartition(".")
            layers[name] = JointLoRALinear(linear, len(self.names), self.rank, self._forward)
            setattr(self.model.get_submodule(parent), leaf, layers[name])
        return layers

    def _forward(self, layer: JointLoRALinear, x: Tensor) -> Tensor:
        return self.products(layer, x)

    def _initialise(self, seeds: Sequence[int]) -> None:
        """A as in PEFT (Kaiming uniform with a = sqrt 5), B zero: the model starts unchanged."""
        for k, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for layer in self.layers.values():
                bound = 1 / math.sqrt(layer.A.shape[2])
                fresh = torch.empty(layer.A.shape[1:]).uniform_(-bound, bound, generator=generator)
                layer.A.data[k].copy_(fresh)

    def parameters(self) -> list[nn.Parameter]:
        """Stacked parameters [K, ...], A and B of every layer."""
        return [p for layer in self.layers.values() for p in (layer.A, layer.B)]

    @property
    def dropout_step(self) -> int:
        """What dropout masks depend on besides the adapters' seeds; to be another one in every pass."""
        return self._dropout_step

    @dropout_step.setter
    def dropout_step(self, step: int) -> None:
        self._dropout_step = step
        for seed, generator in zip(self.seeds, self._dropout_generators, strict=True):
            generator.manual_seed(derive_seed(seed, "dropout", step))

    def drop(self, grouped: Tensor) -> Tensor:
        """Inverted dropout on [K, rows, d], each group with its adapter's own generator."""
        if self.dropout == 0.0:
            return grouped
        keep = 1 - self.dropout
        mask = torch.empty_like(grouped)
        for group, generator in zip(mask, self._dropout_generators, strict=True):
            group.bernoulli_(keep, generator=generator)
        return grouped * mask.div_(keep)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip each adapter's gradient to ``max_norm`` by its own norm; returns the norms [K]."""
        squares = [p.grad.flatten(1).square().sum(dim=1) for p in self.parameters() if p.grad is not None]
        norms = torch.stack(squares).sum(dim=0).sqrt()
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # the epsilon of clip_grad_norm_
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factors.view(-1, *[1] * (p.dim() - 1)))
        return norms

    @contextmanager
    def computing(self, compute: Compute) -> Iterator[None]:
        """Inside, the model computes as ``compute`` says; the default is how it computes without this.

        In 16 bits products have operands in ``compute.dtype``, and the residual stream and the logits are
        float32; the base's weights stay as they are. Copies of them live until the end.

        Raises:
            UserError: kernels cannot run where the model is.
        """
        assert type(self.products) is Products, "one way to compute at a time"
        before = self.products
        try:
            with computed(self, compute) as self.products:
                yield
        finally:
            self.products = before

    @contextmanager
    def training(self) -> Iterator[None]:
        """Rows are grouped by adapter: the batch is [K * b, T]. Dropout goes by ``dropout_step``."""
        try:
            with self._switched(Mode.TRAIN, None):
                yield
        finally:
            self.products.adapters_changed()

    @contextmanager
    def simulating(self, coefficients: Tensor) -> Iterator[None]:
        """Rows are grouped by candidate: the batch is [M * b, T] for coefficients [M, K].

        Losses can be differentiated with respect to the coefficients, and to nothing else.
        """
        with self._switched(Mode.SIMULATE, coefficients.to(self.parameters()[0])):
            yield

    @contextmanager
    def merged(self, u: Tensor) -> Iterator[None]:
        """The layers' weights are W + s * sum_c u_c B_c A_c inside (u [K]), and exactly W again after."""
        self.products.end_pass()
        with self.products.merged(list(self.layers.values()), u):
            yield

    @contextmanager
    def _switched(self, mode: Mode, coefficients: Tensor | None) -> Iterator[None]:
        state = self.state
        before = state.mode, state.coefficients
        self.products.end_pass()
        state.mode, state.coefficients = mode, coefficients
        try:
            yield
        finally:
            state.mode, state.coefficients = before
            self.products.end_pass()

    def remove(self) -> PreTrainedModel:
        """Put the plain linear layers back."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base)
        return self.model

    def save_peft(self, index: int, folder: Path, base_model: str) -> None:
        """One adapter in PEFT's format; ``PeftModel.from_pretrained`` loads the folder."""
        write_peft(
            folder,
            {name: (layer.A[index], layer.B[index]) for name, layer in self.layers.items()},
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            base_model=base_model,
        )

    def load_peft(self, index: int, folder: Path) -> None:
        """Read one adapter back; UserError when it is damaged, or does not fit this model."""
        shapes = {name: (layer.A.shape[1:], layer.B.shape[1:]) for name, layer in self.layers.items()}
        for name, (A, B) in read_peft(folder, shapes).items():
            self.layers[name].A.data[index].copy_(A)
            self.layers[name].B.data[index].copy_(B)
        self.products.adapters_changed()
