"""Megatron-core without a GPU: what it asks of CUDA, the CPU gives, and gloo stands for NCCL.

Megatron's parallelism is the same code on any device, but the device's name is written into it in many
places. What is replaced here belongs to the whole process (``torch.cuda``'s functions, the meaning of
``device="cuda"``), so it is in place while Megatron's own code runs, and at no other time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
"""The distributed optimizer asks for a tensor's kind by the name of its CUDA type."""

_REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.cuda, "current_device", lambda: torch.device("cpu")),
    (torch.cuda, "synchronize", lambda *_: None),
    (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
    (torch.cuda, "manual_seed", torch.manual_seed),
    (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
    (megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
)


@contextmanager
def cpu_in_place_of_cuda() -> Iterator[None]:
    """For calls into Megatron, the backward passes that they start included."""
    with ExitStack() as stack:
        for owner, name, replacement in _REPLACED:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.enter_context(_CudaIsCpu())
        yield


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _TYPES.get(name, name)
        if _means_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _means_cuda(device: Any) -> bool:
    """A bare number is the index of a GPU."""
    return isinstance(device, int) or str(device).partition(":")[0] == "cuda"
