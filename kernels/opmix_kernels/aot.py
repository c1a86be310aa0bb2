"""Ahead-of-time compilation of every kernel and shipped configuration, without a GPU, and what came out.

    python -m opmix_kernels.aot [--architecture sm_90] [--dtype bfloat16] [--kernel NAME] [--json FILE]

prints registers, spills, shared memory and matrix instructions of each, and ends with 1 where something that
is shipped would not run well: a default that spills, more shared memory than a block may have, a product
without tensor cores. The launches are those that the operations themselves make on tensors of the meta device
(each module's ``examples``), specialised as Triton would at run time. Not to be run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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

from opmix_kernels import cross_entropy, gated_lowrank, joint_lora, merge, segments, shrink
from opmix_kernels.language import INTERPRETED
from opmix_kernels.runtime import (
    ARCHITECTURES,
    SMALL,
    SMALL_TAKES,
    Config,
    Launch,
    Tiled,
    recording,
    shipped_kernels,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Shared memory that one block may have."""
SHARED_BYTES_OF_SMALL = 101_376
DTYPES = ("bfloat16", "float16", "float32")
MATRIX_INSTRUCTION = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "gfx942": r"\bv_mfma_\w+"}

EXAMPLES = (cross_entropy, gated_lowrank, joint_lora, merge, segments, shrink)
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
    def is_default(self) -> bool:
        return self.config == self._choices[0]

    @property
    def _choices(self) -> Sequence[Config]:
        return self.launch.kernel.choices(self.architecture, self.launch.itemsize)

    @property
    def title(self) -> str:
        return f"{self.launch.kernel.name} {self.launch.label} {self.architecture} {self.config}"

    def row(self) -> dict[str, Any]:
        """Of the tables: numbers and words."""
        return {
            "kernel": self.launch.kernel.name,
            "dtype": self.launch.label,
            "architecture": self.architecture,
            "config": str(self.config),
            "default": self.is_default,
            "constants": {k: v for k, v in self.launch.constexprs.items() if v is not None},
            "registers": self.registers,
            "spilled": self.spilled,
            "shared_bytes": self.shared,
            "matrix_instructions": self.matrix_instructions,
        }

    def faults(self) -> list[str]:
        """Why this must not be shipped."""
        found = []
        if self.is_default and self.spilled:
            found.append(f"{self.title}: a default that spills {self.spilled}")
        limit = SHARED_BYTES[self.architecture]
        if self.shared > limit:
            found.append(f"{self.title}: {self.shared} bytes of shared memory, a block may have {limit}")
        limit = SHARED_BYTES_OF_SMALL
        if self.architecture == SMALL_TAKES and self.config == self._choices[-1] and self.shared > limit:
            found.append(f"{self.title}: {self.shared} bytes of shared memory, and {SMALL} has {limit}: the "
                         "last configuration must fit it")  # fmt: skip
        if self.launch.kernel.is_product and self.launch.itemsize == 2 and not self.matrix_instructions:
            found.append(f"{self.title}: a product without matrix instructions")
        return found


@dataclass(frozen=True)
class Specialised:
    """One launch's types, constants and alignments, as Triton's launcher finds them."""

    launch: Launch
    config: Config
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]

    @classmethod
    def of(cls, launch: Launch, config: Config) -> Specialised:
        constants: dict[str, Any] = {**launch.constexprs, **config.blocks}
        signature: dict[str, str] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
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
        return cls(launch, config, signature, constants, attributes)

    @property
    def key(self) -> str:
        """Equal for launches that are the same program."""
        known = (self.launch.kernel.name, str(self.config), self.signature, self.constants, self.attributes)
        return repr(known)

    def compile(self, architecture: str) -> Compiled:
        if INTERPRETED.value:
            raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
        source = ASTSource(
            fn=self.launch.kernel.fn,
            signature=self.signature,
            constexprs=self.constants,
            attrs=self.attributes,
        )
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
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
        return Compiled(
            self.launch, architecture, self.config, registers, spilled, built.metadata.shared, found
        )


def compile_launch(launch: Launch, architecture: str, config: Config) -> Compiled:
    """Compile one recorded launch with this configuration."""
    return Specialised.of(launch, config).compile(architecture)


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


def shipped_launches(architecture: str, dtype: str) -> list[Launch]:
    """What the operations' examples launch on this architecture in this dtype."""
    launches: list[Launch] = []
    for module in EXAMPLES:
        with recording(architecture) as found:
            found.label = dtype
            module.examples(getattr(torch, dtype))
        launches += found.launches
    return launches


def compile_shipped(architecture: str, dtype: str, only: str = "") -> Iterator[Compiled]:
    """Every shipped configuration of every example launch, each program once. In float16, which differs from
    bfloat16 in the type of an instruction, the defaults only.

    Args:
        only: name of the one kernel to compile; empty for all.
    """
    seen = set()
    for launch in shipped_launches(architecture, dtype):
        if only not in ("", launch.kernel.name):
            continue
        choices = launch.kernel.choices(architecture, launch.itemsize)
        for config in choices[:1] if dtype == "float16" else choices:
            program = Specialised.of(launch, config)
            if program.key not in seen:
                seen.add(program.key)
                yield program.compile(architecture)


def update_tables(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write these rows to a JSON file under this version of Triton, beside those of others, and all of them
    to a Markdown file of the same name."""
    tables = json.loads(file.read_text()) if file.exists() else {}
    tables[triton.__version__] = rows
    file.write_text(json.dumps(dict(sorted(tables.items(), reverse=True)), indent=1) + "\n")
    file.with_suffix(".md").write_text(_markdown(tables))


def _markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# What the compiler makes of every shipped configuration",
        "",
        "`python -m opmix_kernels.aot --json FILE`, on a machine without a GPU. Registers are those of a",
        "thread; spills are bytes (sm) or registers (gfx); shared memory is that of a block. Defaults are",
        "**bold**.",
    ]
    for version in sorted(tables, reverse=True):
        lines += ["", f"## Triton {version}", ""]
        lines.append("| kernel | dtype | architecture | configuration | constants | registers | spilled |"
                     " shared bytes | matrix instructions |")  # fmt: skip
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in tables[version]:
            config = f"**{row['config']}**" if row["default"] else row["config"]
            constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
            cells = (row["kernel"], row["dtype"], row["architecture"], config, constants, row["registers"],
                     row["spilled"], row["shared_bytes"], row["matrix_instructions"])  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--kernel", default="")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="update this table and the .md file beside it"
    )
    options = parser.parse_args()
    names = sorted({kernel.name for kernel in shipped_kernels()})
    if options.kernel not in ("", *names):
        raise SystemExit(f"no kernel is called {options.kernel!r}: {', '.join(names)}")
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for architecture in options.architecture or ARCHITECTURES:
        for dtype in options.dtype or DTYPES:
            for built in compile_shipped(architecture, dtype, options.kernel):
                rows.append(built.row())
                faults += built.faults()
                print(
                    f"{built.title}: {built.registers} registers, {built.spilled} spilled, {built.shared} "
                    f"bytes of shared memory, {built.matrix_instructions} matrix instructions",
                    flush=True,
                )
    if options.json is not None:
        update_tables(options.json, rows)
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
