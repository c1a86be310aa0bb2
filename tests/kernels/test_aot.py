"""Every shipped configuration compiles for each architecture and would run well, as the compiler reports.

In processes of their own: this one interprets kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opmix_kernels import aot, runtime

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", runtime.TUNING_FILE)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=580
    )


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    # float16 differs from bfloat16 in the type of operands only, and float32 runs on no GPU by default: the
    # committed table has both for all
    [*((architecture, "bfloat16") for architecture in runtime.ARCHITECTURES), ("sm_90", "float32")],
)
def test_what_is_shipped_compiles_and_would_run_well(architecture: str, dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    options = ("--architecture", architecture, "--dtype", dtype, "--json", str(file))
    done = run("-m", "opmix_kernels.aot", *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (rows,) = json.loads(file.read_text()).values()
    assert {(row["architecture"], row["dtype"]) for row in rows} == {(architecture, dtype)}
    assert all(row["registers"] > 0 for row in rows)
    products = {kernel.name for kernel in runtime.shipped_kernels() if kernel.is_product}
    without = {row["kernel"] for row in rows if not row["matrix_instructions"]}
    assert dtype == "float32" or not without & products
    assert {row["default"] for row in rows} >= {True}
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(rows) + 1


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_every_kernel_is_compiled(architecture: str) -> None:
    launches = [launch for dtype in aot.DTYPES for launch in aot.shipped_launches(architecture, dtype)]
    shipped = {kernel.name for kernel in runtime.shipped_kernels() if architecture in kernel.shipped}
    assert {launch.kernel.name for launch in launches} == shipped


def test_kernels_have_names_of_their_own() -> None:
    names = [kernel.name for kernel in runtime.shipped_kernels()]
    assert len(names) >= 5
    assert sorted(names) == sorted(set(names))


FAULTY = """
import torch
from opmix_kernels import aot, merge, runtime
from opmix_kernels.runtime import Config

def faults(architecture, tile):
    merge.MERGE.shipped = {architecture: {2: [Config({"BN": tile, "BD": tile}, warps=4, stages=2)]}}
    with runtime.recording(architecture) as found:
        found.label = "bfloat16"
        merge.examples(torch.bfloat16)
    launch = found.launches[0]
    return aot.compile_launch(launch, architecture, launch.config).faults()

for architecture, tile in (("sm_80", 32), ("sm_80", 128), ("sm_90", 32)):
    print(faults(architecture, tile))
aot.SHARED_BYTES["sm_90"], aot.SHARED_BYTES_OF_SMALL = 1000, 500
print(faults("sm_90", 64))
print(faults("sm_80", 32))
"""


def test_the_checks_can_fail() -> None:
    """Tiles that are too large spill, 32 rows are too few for sm_90's instructions, memory is limited."""
    done = run("-c", FAULTY)
    assert done.returncode == 0, done.stderr
    good, spilling, narrow, too_much, too_much_for_small = done.stdout.splitlines()
    assert good == "[]"
    assert "a default that spills" in spilling
    assert "a product without matrix instructions" in narrow
    assert "of shared memory, a block may have 1000" in too_much
    assert "and sm_86 has 500: the last" in too_much_for_small


def test_an_unknown_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--kernel", "nothing"])
    with pytest.raises(SystemExit, match=r"no kernel is called 'nothing': .*merge_kernel"):
        aot.main()


def test_the_interpreter_is_refused() -> None:
    with runtime.recording("sm_90") as found:
        aot.merge.examples(aot.torch.float32)
    launch = found.launches[0]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot.compile_launch(launch, "sm_90", launch.config)
