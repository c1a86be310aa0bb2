"""The linear layer that several adapters share, and its low-rank terms in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[["JointLoRALinear", Tensor], Tensor]
"""x [..., d_in] to what the layer gives for it now [..., d_out]."""


class JointLoRALinear(nn.Module):
    """A frozen linear layer with K adapters: A [K, r, d_in], B [K, d_out, r], float32 or the base's dtype.

    Rows come as [b, T, d_in], or one behind the other as [1, b * T, d_in] for flash attention's sake.
    """

    def __init__(self, base: nn.Linear, num_adapters: int, rank: int, forward: Forward) -> None:
        super().__init__()
        weight = base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base = base
        # plain tensors, also where the base's weights are sharded: every rank has whole adapters
        fresh = partial(torch.zeros, dtype=dtype, device=weight.device)
        self.A = nn.Parameter(fresh(num_adapters, rank, base.in_features))
        self.B = nn.Parameter(fresh(num_adapters, base.out_features, rank))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)

    def delta(self, u: Tensor) -> Tensor:
        """sum_c u_c B_c A_c (without the scale), u [K] to [d_out, d_in]."""
        return torch.einsum("k,kor,kri->oi", u.to(self.B), self.B, self.A)


def add_joint(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """y + s * B_k A_k drop(x) for K equal groups of rows, each through its adapter: two batched products,
    the sum in the second.

    Args:
        y: W x [K * b, T, d_out]; the result has its dtype.
        x: [K * b, T, d_in]; computed in A's dtype.
        A, B: [K, r, d_in], [K, d_out, r].
        drop: of [K, b * T, d_in].
    """
    groups = len(A)
    grouped = x.reshape(groups, -1, x.shape[-1]).to(A.dtype)  # [K, b * T, d_in]
    low = scale * torch.bmm(drop(grouped), A.mT)  # [K, b * T, r]
    wide = torch.baddbmm(y.reshape(groups, -1, y.shape[-1]).to(low.dtype), low, B.mT)
    return wide.view(y.shape).to(y.dtype)


def add_simulated(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, gates: Tensor) -> Tensor:
    """y + s * sum_k u_mk B_k A_k x for M equal groups of rows, one for each row of the gates u [M, K].

    Args:
        y: W x [M * b, T, d_out]; the result has its dtype.
        x: [M * b, T, d_in]; computed in A's dtype.
        A, B: [K, r, d_in], [K, d_out, r].
        gates: may require gradients.
    """
    low = F.linear(x.to(A.dtype), A.flatten(0, 1))  # [M * b, T, K * r]
    columns = (scale * gates).repeat_interleave(A.shape[1], dim=1)[:, None, :]  # [M, 1, K * r]
    low = low.view(len(gates), -1, low.shape[-1]) * columns
    stacked = B.transpose(0, 1).reshape(B.shape[1], -1)  # [d_out, K * r]
    flat = y.reshape(-1, y.shape[-1]).to(A.dtype)
    # gates are float32: in 16 bits the product with them is rounded once, not they before it
    low = low.reshape(len(flat), -1).to(A.dtype)
    return torch.addmm(flat, low, stacked.T).view(y.shape).to(y.dtype)
