"""In which arithmetic simulated models compute, and the one place that imports the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from opmix_dist.errors import UserError


@dataclass(frozen=True)
class Compute:
    """How adapted layers, norms and the LM head compute.

    In 16 bits the residual stream and the logits stay in float32: differences between candidates are of the
    order of 1e-3, and a sum in bfloat16 has 8 bits.
    """

    dtype: torch.dtype = torch.float32
    """Of the matrix products' operands and of attention; what a product sums is float32 in any case."""
    kernels: bool = False
    """Triton kernels (:mod:`opmix_kernels`) in place of plain torch."""


FLOAT32 = Compute()
"""As models compute by themselves."""


def kernels_fault(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``; None where they can."""
    try:
        from opmix_kernels import runtime
    except ImportError as error:  # no Triton on this machine
        return str(error)
    if not runtime.available(device):
        return f"Triton kernels need a GPU, and this rank computes on {device.type}"
    try:
        runtime.architecture_of(device)
    except RuntimeError as error:
        return str(error)
    return None


def load_kernels(device: torch.device) -> ModuleType:
    """:mod:`opmix_kernels`, imported now: machines without Triton need none of it.

    Raises:
        UserError: the kernels cannot run on ``device``.
    """
    fault = kernels_fault(device)
    if fault is not None:
        raise UserError(f"search.kernels: {fault}. Set it to torch")
    import opmix_kernels

    return opmix_kernels
