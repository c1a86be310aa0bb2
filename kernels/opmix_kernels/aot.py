"""Ahead-of-time compilation of every kernel and shipped configuration, without a GPU, and what came out.

    python -m opmix_kernels.aot [--architecture sm_90] [--kernel merge_kernel]

prints registers, spills, shared memory and matrix instructions of each. The launches are those that the
operations themselves make on tensors of the meta device (each module's ``examples``), specialised as Triton
would at run time. Not to be run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opmix_kernels import cross_entropy, gated_lowrank, merge, segments, shrink
from opmix_kernels.language import INTERPRETED
from opmix_kernels.runtime import ARCHITECTURES, Config, Launch, Tiled, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Shared memory that one block may have."""
MATRIX_INSTRUCTION = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "gfx942": r"\bv_mfma_\w+"}

EXAMPLES = (cross_entropy, gated_lowrank, merge, segments, shrink)
"""Modules of operations, each with a function `examples`."""

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports of one kernel for one architecture."""

    launch: Launch
    architecture: str
    config: Config
    registers: int
    spilled: int
    """Bytes (NVIDIA) or registers (AMD) that did not fit and go through memory."""
    shared: int
    """Bytes of shared memory of a block."""
    matrix_instructions: int

    @property
    def title(self) -> str:
        return f"{self.launch.kernel.name} {self.launch.label} {self.architecture} {self.config}"


def compile_launch(launch: Launch, architecture: str, config: Config) -> Compiled:
    """Compile one recorded launch with this configuration."""
    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    constants: dict[str, Any] = {**launch.constexprs, **config.blocks}
    signature, attributes = {}, {}
    for index, name in enumerate(launch.kernel.fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind, constant, aligned = _specialised(launch.arguments[name], config)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = constant
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel.fn, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True  # a build from the cache reports nothing
        knobs.nvidia.dump_ptxas_log = True
        printed = io.StringIO()
        with redirect_stdout(printed):
            built = triton.compile(source, target=TARGETS[architecture], options=options)
    if architecture.startswith("sm_"):
        registers, spilled, instructions = _nvidia(built.asm["cubin"], printed.getvalue())
    else:
        registers, spilled, instructions = _amd(built.asm["amdgcn"])
    found = len(re.findall(MATRIX_INSTRUCTION[architecture], instructions))
    return Compiled(launch, architecture, config, registers, spilled, built.metadata.shared, found)


def _specialised(value: Any, config: Config) -> tuple[str, Any, bool]:
    """Type, constant and divisibility by 16 of one argument, as Triton's launcher specialises it."""
    if isinstance(value, Tensor):  # the allocator aligns; views that do not start at 16 bytes are rare
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return f"*{_TYPES[value.dtype]}", None, aligned
    if isinstance(value, Tiled):
        tile = [config.blocks[name] for name in value.tile]
        return f"tensordesc<{_TYPES[value.matrix.dtype]}{tile}>", None, False
    if value is None:
        return "constexpr", None, False
    if isinstance(value, bool):
        return "i1", None, False
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return "i32" if -(2**31) <= value < 2**31 else "i64", None, value % 16 == 0


def _nvidia(cubin: bytes, log: str) -> tuple[int, int, str]:
    """Registers, spilled bytes, machine code."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas reported no registers or spills: {log[:300]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return int(registers[1]), int(spills[1]) + int(spills[2]), code


def _amd(code: str) -> tuple[int, int, str]:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), code


def shipped_launches(architecture: str) -> list[Launch]:
    """What the operations' examples launch on this architecture, in 16 bits and in float32."""
    launches: list[Launch] = []
    for module in EXAMPLES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with recording(architecture) as found:
                found.label = str(dtype).removeprefix("torch.")
                module.examples(dtype)
            launches += found.launches
    return launches


def compile_shipped(architecture: str, only: str = "") -> Iterator[Compiled]:
    """Every shipped configuration of every example launch.

    Args:
        only: name of the one kernel to compile; empty for all.
    """
    for launch in shipped_launches(architecture):
        if only not in ("", launch.kernel.name):
            continue
        for config in launch.kernel.choices(architecture, launch.itemsize):
            yield compile_launch(launch, architecture, config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--kernel", default="")
    options = parser.parse_args()
    for architecture in options.architecture or ARCHITECTURES:
        for built in compile_shipped(architecture, options.kernel):
            print(
                f"{built.title}: {built.registers} registers, {built.spilled} spilled, {built.shared} bytes "
                f"of shared memory, {built.matrix_instructions} matrix instructions",
                flush=True,
            )


if __name__ == "__main__":
    main()
