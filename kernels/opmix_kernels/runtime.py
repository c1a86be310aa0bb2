"""Launching: which tile sizes a kernel gets on which GPU, and how a launch is recorded to be compiled ahead.

Configurations are chosen by a table, not by timing at the first launch: another tile size sums in another
order, and ranks or restarts that chose differently would differ in the last digits. ``OPMIX_KERNELS_TUNING``
names a JSON file of choices that were measured (``python -m opmix_kernels.tune``); it is fixed, hence as
reproducible.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opmix_kernels.language import INTERPRETED

TUNING_FILE = "OPMIX_KERNELS_TUNING"
MAX_TUNING_BYTES = 64 << 20
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")

SMALL, SMALL_TAKES = "sm_86", "sm_80"
"""What NVIDIA's devices with 99 KiB of shared memory a block are called here (sm_86, sm_89, sm_120), and
whose configurations they take: the last that is shipped, which has to fit them (:mod:`opmix_kernels.aot`)."""


@dataclass(frozen=True)
class Config:
    """Tile sizes (the kernel's upper-case constexprs), warps and pipeline stages of one launch."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{tiles} warps={self.warps} stages={self.stages}"


Shipped = Mapping[str, Mapping[int, Sequence[Config]]]
"""Architecture to bytes per element of the inputs to configurations; the first is the default."""


@dataclass(frozen=True)
class Tiled:
    """A matrix argument that the kernel loads in tiles through a tensor descriptor (TMA from sm_90 on).

    Args:
        matrix: begins at a multiple of 16 bytes, as do its rows; elements of a row are side by side.
        tile: names of the configuration's blocks that are the tile's rows and columns.
    """

    matrix: Tensor
    tile: tuple[str, str]

    def descriptor(self, blocks: Mapping[str, int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.matrix, [blocks[name] for name in self.tile])


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what ahead-of-time compilation needs of its arguments."""

    kernel: Kernel
    arguments: Mapping[str, Any]
    """By parameter name: tensors (also on the meta device), Tiled ones, numbers and None."""
    constexprs: Mapping[str, Any]
    config: Config
    itemsize: int
    label: str


@dataclass
class Kernel:
    """A ``@triton.jit`` function and the configurations that are shipped for it.

    Args:
        is_product: whether it multiplies matrices, so that its machine code must use tensor cores in 16 bits.
        name: in tables and tuning files; the function's if not given. No two have the same.
    """

    fn: Any
    shipped: Shipped
    is_product: bool
    name: str = ""
    forced: Config | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or self.fn.__name__
        _kernels.append(self)

    def config(self, like: Tensor, key: str = "") -> Config:
        """For tensors like this one: that of the tuning file under ``key`` where it has one, or the shipped
        default.

        Raises:
            RuntimeError: an architecture that nothing is shipped for.
            ValueError: a tuning file that is not one for these kernels.
        """
        if self.forced is not None:
            return self.forced
        choices = self.choices(architecture_of(like.device), like.element_size())
        return choices[_tuned().get(self._tuning_key(like, key), 0)]

    def _tuning_key(self, like: Tensor, key: str) -> str:
        """What a tuning file calls a launch."""
        return f"{self.name} {architecture_of(like.device)} {like.element_size()} {key}".rstrip()

    def choices(self, architecture: str, itemsize: int) -> Sequence[Config]:
        """What is shipped, the default first."""
        by_size = self.shipped[SMALL_TAKES if architecture == SMALL else architecture]
        choices = by_size[itemsize] if itemsize in by_size else by_size[max(by_size)]
        return choices[-1:] if architecture == SMALL else choices

    @contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Every launch inside has this configuration: for tests and for tuning."""
        before, self.forced = self.forced, config
        try:
            yield
        finally:
            self.forced = before

    def __call__(
        self,
        grid: tuple[int, ...] | Callable[[Mapping[str, int]], tuple[int, ...]],
        *,
        like: Tensor,
        key: str = "",
        constexprs: Mapping[str, Any],
        **arguments: Any,
    ) -> None:
        """Launch on the device of ``like``; nothing waits for it.

        Args:
            grid: blocks of the grid, or a function of the configuration's tile sizes that gives them.
            like: tensor whose device and element size choose the configuration: an operand of the product.
            key: of the shapes in a tuning file.
            constexprs: others than the configuration's tile sizes.
        """
        config = self.config(like, key)
        if _recording is not None:
            launch = Launch(self, arguments, constexprs, config, like.element_size(), _recording.label)
            _recording.launches.append(launch)
            return
        size = grid(config.blocks) if callable(grid) else grid
        if 0 in size:
            return
        given = {k: v.descriptor(config.blocks) if isinstance(v, Tiled) else v for k, v in arguments.items()}
        # Triton launches on the current device, whichever the tensors are on
        on_device = torch.cuda.device(like.device) if like.is_cuda else nullcontext()
        with on_device, nullcontext() if _watch is None else _watch(self, self._tuning_key(like, key)):
            self.fn[size](
                **given, **constexprs, **config.blocks, num_warps=config.warps, num_stages=config.stages
            )


_kernels: list[Kernel] = []
"""All there are."""


def shipped_kernels() -> list[Kernel]:
    """The kernels of this package's modules that were imported."""
    return [kernel for kernel in _kernels if kernel.fn.fn.__module__.startswith("opmix_kernels.")]


Watch = Callable[["Kernel", str], AbstractContextManager[None]]
"""Called with the kernel and the tuning file's key of a launch, which happens inside of what it returns."""

_watch: Watch | None = None


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Every launch inside is told to ``watch``: for tuning."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


@dataclass
class Recording:
    """Launches of operations on tensors of the meta device, as if on a GPU of this architecture."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)
    label: str = ""


_recording: Recording | None = None


@contextmanager
def recording(architecture: str) -> Iterator[Recording]:
    """Launches inside are noted and not carried out."""
    global _recording
    before, _recording = _recording, Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = before


def architecture_of(device: torch.device) -> str:
    """The architecture whose configurations suit this device, or the one that is being recorded for.

    Raises:
        RuntimeError: naming the device that nothing is shipped for.
    """
    if _recording is not None:
        return _recording.architecture
    if INTERPRETED.value:
        return "sm_80"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(index: int) -> str:
    return _architecture_named(torch.cuda.get_device_properties(index))


def _architecture_named(properties: Any) -> str:
    found = None
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        found = name if name in ARCHITECTURES else None
    elif properties.major >= 8:
        enough = properties.shared_memory_per_block_optin >= 160 * 1024
        found = SMALL if not enough else "sm_90" if properties.major >= 9 else "sm_80"
    if found is None:
        raise RuntimeError(
            f"no kernel configurations for {properties.name}: set the kernels to plain torch "
            f"(shipped: {', '.join(ARCHITECTURES)})"
        )
    return found


@cache
def _tuned() -> dict[str, int]:
    """The tuning file's choices: "kernel architecture itemsize key" to an index into what is shipped."""
    path = os.environ.get(TUNING_FILE)
    return read_tuning(Path(path)) if path else {}


def read_tuning(file: Path) -> dict[str, int]:
    """Choices of a tuning file.

    Raises:
        ValueError: naming the file and the entry that no kernel, architecture or configuration here fits.
    """
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > MAX_TUNING_BYTES):
            raise ValueError("it is no ordinary file, or too large")
        choices = json.loads(file.read_text())["choices"]
        entries = {str(key): int(index) for key, index in choices.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{TUNING_FILE}: {file} is no tuning file: {error!r}") from error
    kernels = {kernel.name: kernel for kernel in _kernels}
    for key, index in entries.items():
        name, architecture, itemsize = (*key.split(" ", 3), "", "", "")[:3]
        if name not in kernels:
            raise ValueError(f"{TUNING_FILE}: {file} names the kernel {name!r}, which does not exist")
        if architecture not in (*ARCHITECTURES, SMALL) or itemsize not in ("2", "4", "8"):
            raise ValueError(f"{TUNING_FILE}: {file} has {key!r}: not kernel, architecture, bytes, shape")
        shipped = len(kernels[name].choices(architecture, int(itemsize)))
        if not 0 <= index < shipped:
            raise ValueError(f"{TUNING_FILE}: {file} has {index} for {key!r}, of {shipped} configurations")
    return entries


def available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device: on a GPU, or anywhere in the interpreter."""
    return device.type == "cuda" or bool(INTERPRETED.value)


def require_available(device: torch.device) -> None:
    """RuntimeError where :func:`available` is false."""
    if not available(device) and _recording is None:
        raise RuntimeError(
            f"Triton kernels need a GPU, and the tensors are on {device}: use opmix_kernels' plain-torch "
            "references there, or set TRITON_INTERPRET=1 before anything is imported to test"
        )


def own_dtypes(device: torch.device) -> AbstractContextManager[Any]:
    """For library products inside of an operation: autocast, where a caller is in it, would make 16-bit
    results of float32 operands, which the kernels beside them and the fake implementations do not expect."""
    return torch.autocast(device.type, enabled=False)


def as_rows(x: Tensor) -> Tensor:
    """[..., d] as [R, d] with elements of a row side by side: a view wherever strides allow, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)
