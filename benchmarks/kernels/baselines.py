"""What the kernels are compared with: merging in torch, PEFT's own forward, chunked logits in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_BYTES = 512 << 20
"""Of 16-bit logits at a time."""


class Stacked:
    """Adapters A [C, r, d_in] and B [C, d_out, r] as two matrices, [C r, d_in] and [d_out, C r]."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        self.rank, self.scale = A.shape[1], scale
        self.down = A.flatten(0, 1).contiguous()
        self.up = B.permute(1, 0, 2).flatten(1).contiguous()

    def gates(self, coefficients: Tensor) -> Tensor:
        """s u_c in each of adapter c's columns: [..., C] to [..., C r] in the adapters' dtype."""
        scaled = (self.scale * coefficients).to(self.down.dtype)[..., None]
        return scaled.expand(*coefficients.shape, self.rank).flatten(-2)

    def merge_into(self, out: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
        """out = W + s sum_c u_c B_c A_c by one library GEMM; coefficients [C]."""
        return torch.addmm(weight, self.up * self.gates(coefficients), self.down, out=out)

    def merged(self, weight: Tensor, coefficients: Tensor) -> Tensor:
        """[M, d_out, d_in] by one batched GEMM; coefficients [M, C]."""
        gated = self.up * self.gates(coefficients)[:, None, :]
        down = self.down.expand(len(gated), *self.down.shape)
        return torch.baddbmm(weight.expand(len(gated), *weight.shape), gated, down)

    def separate(self, x: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
        """Dense product, shrink, gates, expand-add: four library calls; x [M T, d_in]."""
        low = (x @ self.down.T).view(len(coefficients), -1, len(self.down)) * self.gates(coefficients)[
            :, None
        ]
        return (x @ weight.T).addmm_(low.view(len(x), -1), self.up.T)


class PeftMix:
    """A module with adapters in PEFT, all of them active; a candidate sets their scalings.

    Args:
        adapters: A and B stacked over adapters, by the name of the linear layer in ``module``.
    """

    def __init__(
        self, module: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        first, _ = next(iter(adapters.values()))
        self.names = [f"a{index}" for index in range(len(first))]
        config = LoraConfig(r=first.shape[1], lora_alpha=first.shape[1], target_modules=sorted(adapters))
        self.model = get_peft_model(module, config, self.names[0], autocast_adapter_dtype=False)
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        self.model.base_model.set_adapter(self.names)
        self.scale = scale
        found = dict(self.model.base_model.model.named_modules())
        self.layers: list[LoraLayer] = [found[name] for name in adapters]
        for layer, (A, B) in zip(self.layers, adapters.values(), strict=True):
            for index, name in enumerate(self.names):
                layer.lora_A[name].weight.data = A[index].clone()
                layer.lora_B[name].weight.data = B[index].clone()
        self.model.requires_grad_(False).eval()

    def mix(self, coefficients: Sequence[float]) -> None:
        for layer in self.layers:
            layer.scaling.update({n: self.scale * u for n, u in zip(self.names, coefficients, strict=True)})


@triton.jit
def _row_losses(LOGITS, TARGETS, OUT, V, row_stride, BLOCK: tl.constexpr):
    """logsumexp less the target's logit in one pass over a row of logits; a negative target gives 0."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    highest = tl.full((), -float("inf"), tl.float32)
    total, picked = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * row_stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        now = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - now) + tl.sum(tl.exp(x - now), axis=0)
        picked += tl.sum(tl.where(columns == target, x, 0.0), axis=0)
        highest = now
    loss = highest + tl.log(total) - picked
    tl.store(OUT + row, tl.where(target >= 0, loss, 0.0))


def one_pass_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Float32 losses [R] of 16-bit logits [R, V] that are read once."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _row_losses[(len(logits),)](
        logits, targets, out, logits.shape[1], logits.stride(0), BLOCK=min(8192, _power(logits.shape[1])),
        num_warps=8,
    )  # fmt: skip
    return out


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def chunked_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Library GEMM into chunks of 16-bit logits, one pass over each."""
    rows = max(128, CHUNK_BYTES // (2 * len(head)) // 128 * 128)  # whole tiles of the library's GEMM
    parts = [
        one_pass_losses(h @ head.T, t) for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts)


def torch_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Plain torch: logits in memory, in float32 or better."""
    logits = hidden @ head.T
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, targets, reduction="none")
