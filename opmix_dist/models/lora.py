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
from enum import Enum, auto
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opmix_dist.errors import UserError

ADAPTER_FILE = "adapter_model.safetensors"


class Mode(Enum):
    OFF = auto()
    TRAIN = auto()
    SIMULATE = auto()


class JointLoRALinear(nn.Module):
    """A frozen linear layer with K adapters: A [K, r, d_in], B [K, d_out, r], float32 or the base's dtype.

    Rows come as [b, T, d_in], or one behind the other as [1, b * T, d_in] for flash attention's sake.
    """

    def __init__(self, base: nn.Linear, num_adapters: int, rank: int, owner: JointAdapters) -> None:
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.base = base
        self.A = nn.Parameter(base.weight.new_zeros(num_adapters, rank, base.in_features, dtype=dtype))
        self.B = nn.Parameter(base.weight.new_zeros(num_adapters, base.out_features, rank, dtype=dtype))
        self._owner = (owner,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        owner = self._owner[0]
        y = self.base(x)
        if owner.mode is Mode.TRAIN:
            return self._joint(x, y, owner)
        if owner.mode is Mode.SIMULATE:
            return self._simulated(x, y, owner)
        return y

    def _joint(self, x: Tensor, y: Tensor, owner: JointAdapters) -> Tensor:
        """x [K * b, T, d_in] and W x, K equal groups of rows: two batched products, the sum in the second."""
        groups = len(self.A)
        grouped = x.reshape(groups, -1, x.shape[-1]).to(self.A.dtype)  # [K, b * T, d_in]
        low = owner.scale * torch.bmm(owner.drop(grouped), self.A.mT)  # [K, b * T, r]
        wide = torch.baddbmm(y.reshape(groups, -1, y.shape[-1]).to(low.dtype), low, self.B.mT)
        return wide.view(y.shape).to(y.dtype)

    def _simulated(self, x: Tensor, y: Tensor, owner: JointAdapters) -> Tensor:
        """x [M * b, T, d_in] and W x, M equal groups of rows, one for each row of the coefficients [M, K].

        Coefficients may require gradients; the adapters are constants here, so that their gradients' inputs
        are not kept.
        """
        gates = owner.coefficients
        assert gates is not None
        A, B = self.A.detach(), self.B.detach()
        low = F.linear(x.to(A.dtype), A.flatten(0, 1))  # [M * b, T, K * r]
        low = low.view(len(gates), -1, low.shape[-1]) * self._gate_columns(gates, A.shape[1], owner.scale)
        stacked = B.transpose(0, 1).reshape(B.shape[1], -1)  # [d_out, K * r]
        flat = y.reshape(-1, y.shape[-1]).to(low.dtype)
        return torch.addmm(flat, low.reshape(len(flat), -1), stacked.T).view(y.shape).to(y.dtype)

    @staticmethod
    def _gate_columns(gates: Tensor, rank: int, scale: float) -> Tensor:
        """[M, K] to s * u_mk in each of adapter k's r columns, [M, 1, K * r]."""
        return (scale * gates).repeat_interleave(rank, dim=1)[:, None, :]

    def delta(self, u: Tensor) -> Tensor:
        """sum_c u_c B_c A_c (without the scale), u [K] to [d_out, d_in]."""
        return torch.einsum("k,kor,kri->oi", u.to(self.B), self.B, self.A)


def require_adaptable(model: PreTrainedModel) -> None:
    """UserError naming the module that joint adapters cannot follow; to be asked before a run begins."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Conv1D":
            raise UserError(
                f"{name} is a Conv1D: probes adapt torch.nn.Linear only, so use mixture.policy static"
            )
        if kind.endswith(("Experts", "SparseMoeBlock", "MoE")):
            raise UserError(
                f"{name} routes tokens to experts, which joint probes cannot: use mixture.policy static"
            )


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
        self.mode = Mode.OFF
        self.coefficients: Tensor | None = None
        model.requires_grad_(False)
        self.layers = self._inject()
        self._initialise(seeds)
        device = next(model.parameters()).device
        self._dropout_generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def _inject(self) -> dict[str, JointLoRALinear]:
        head = self.model.get_output_embeddings()
        found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        if not found:
            raise UserError(f"{type(self.model).__name__} has no linear layers that LoRA can adapt")
        layers = {}
        for name, linear in found:
            parent, _, leaf = name.rpartition(".")
            layers[name] = JointLoRALinear(linear, len(self.names), self.rank, self)
            setattr(self.model.get_submodule(parent), leaf, layers[name])
        return layers

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
    def training(self) -> Iterator[None]:
        """Rows are grouped by adapter: the batch is [K * b, T]."""
        with self._switched(Mode.TRAIN, None):
            yield

    @contextmanager
    def simulating(self, coefficients: Tensor) -> Iterator[None]:
        """Rows are grouped by candidate: the batch is [M * b, T] for coefficients [M, K].

        Losses can be differentiated with respect to the coefficients, and to nothing else.
        """
        with self._switched(Mode.SIMULATE, coefficients.to(self.parameters()[0])):
            yield

    @contextmanager
    def merged(self, u: Tensor) -> Iterator[None]:
        """The base's weights are W + s * sum_c u_c B_c A_c inside (u [K]), and exactly W again after."""
        kept = {name: layer.base.weight.data for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                weight = layer.base.weight
                weight.data = (weight.data + self.scale * layer.delta(u)).to(weight.dtype)
            yield
        finally:
            for name, layer in self.layers.items():
                layer.base.weight.data = kept[name]

    @contextmanager
    def _switched(self, mode: Mode, coefficients: Tensor | None) -> Iterator[None]:
        before = self.mode, self.coefficients
        self.mode, self.coefficients = mode, coefficients
        try:
            yield
        finally:
            self.mode, self.coefficients = before

    def remove(self) -> PreTrainedModel:
        """Put the plain linear layers back."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base)
        return self.model

    def save_peft(self, index: int, folder: Path, base_model: str) -> None:
        """One adapter in PEFT's format; ``PeftModel.from_pretrained`` loads the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A.detach()[index].cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B.detach()[index].cpu().contiguous()
        LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=sorted(self.layers),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            inference_mode=True,
        ).save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})

    def load_peft(self, index: int, folder: Path) -> None:
        """Read one adapter back; UserError when its layers or shapes are not this model's."""
        tensors = load_file(folder / ADAPTER_FILE)
        for name, layer in self.layers.items():
            for half, stacked in (("A", layer.A), ("B", layer.B)):
                key = f"base_model.model.{name}.lora_{half}.weight"
                if key not in tensors or tensors[key].shape != stacked.shape[1:]:
                    raise UserError(f"{folder / ADAPTER_FILE} does not fit this model at {key}")
                stacked.data[index].copy_(tensors[key])
