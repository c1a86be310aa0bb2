"""How kernels are checked: against float64, with poisoned memory, and by breaking them on purpose."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opmix_kernels.runtime import Kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative errors against float64, by dtype of the inputs."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that are exactly representable in ``dtype``, on the device of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; NaN counts as infinite."""
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / expected.double().abs().max().item() if difference == difference else float("inf")


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """AssertionError where the relative error is above that allowed for inputs of ``dtype``, or the result
    stayed NaN anywhere: freshly allocated memory is poisoned with it."""
    assert found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}"
    error = relative_error(found, expected)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.1e} with inputs of {dtype}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are NaN inside, so that an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class NoWaiting(TorchDispatchMode):
    """AssertionError where the host would wait for the device to learn a value or a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")
        assert func.overloadpacket.__name__ not in waits, f"{func} waits"
        return func(*args, **(kwargs or {}))


@contextmanager
def broken(kernel: Kernel, old: str, new: str) -> Iterator[None]:
    """Inside, ``kernel`` runs a copy of itself in whose source ``old``, which must be there exactly once, is
    replaced by ``new``."""
    right = kernel.fn
    source = inspect.getsource(right.fn)
    assert source.count(old) == 1, f"{kernel.name} has {source.count(old)} times `{old}`"
    with tempfile.TemporaryDirectory() as folder:  # triton reads a kernel's source from a file
        file = Path(folder) / f"broken_{kernel.name}.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        vars(module).update({k: v for k, v in right.fn.__globals__.items() if not k.startswith("__")})
        sys.modules[file.stem] = module
        try:
            spec.loader.exec_module(module)
            kernel.fn = getattr(module, right.fn.__name__)
            assert isinstance(kernel.fn, type(right)), triton.__version__
            yield
        finally:
            kernel.fn = right
            del sys.modules[file.stem]
