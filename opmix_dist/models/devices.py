"""What devices can do at most: dense matrix products per second, as their vendors' data sheets have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from opmix_dist.config import EngineConfig

Precision = Literal["float32", "tf32", "bfloat16", "float8"]
"""Of the factors of a product. Bfloat16 and float16 have the same peaks; tf32 is how GPUs may multiply
float32."""


@dataclass(frozen=True)
class Peaks:
    """TFLOP/s of one device, without structured sparsity (half of what sheets with an asterisk say); None
    where the device has no such unit.

    float32 is that of its vector units, or, of AMD's, of its matrix units.
    """

    name: str
    """Pattern of what torch calls the device."""
    float32: float
    tf32: float | None
    bfloat16: float | None
    float8: float | None
    source: str

    def of(self, precision: Precision) -> float | None:
        found: float | None = getattr(self, precision)
        return found


# The first pattern that is found in a name is it: the special ones come first.
#
# Each row was compared with the figures of the sheet that it names. Sheets of Hopper and Blackwell give their
# tensor cores "with sparsity", which is halved here; those of Ampere and Ada have a dense column; AMD's dense
# rows are taken. Where a sheet rounds a GPU's figure (2.2 PFLOPS) the machine's divides exactly (36 PFLOPS
# with sparsity of 8 GPUs). Some projects halve the dense columns of A10, L4 and L40S, taking them for sums
# in float16; the sheets do not say so. Who measures otherwise sets engine.peak_tflops.
DEVICES = (
    Peaks(r"\bGB300\b", 80.0, 1250.0, 2500.0, 5000.0, "NVIDIA Blackwell Ultra data sheet, GB300 NVL72"),
    Peaks(r"\bB300\b", 75.0, 1125.0, 2250.0, 4500.0, "NVIDIA Blackwell Ultra data sheet, HGX B300"),
    Peaks(r"\bGB200\b", 80.0, 1250.0, 2500.0, 5000.0, "NVIDIA Blackwell data sheet, GB200 NVL72"),
    Peaks(r"\bB200\b", 75.0, 1125.0, 2250.0, 4500.0, "NVIDIA Blackwell data sheet, HGX B200"),
    Peaks(r"\bH200 NVL\b", 60.0, 417.5, 835.5, 1670.5, "NVIDIA H200 data sheet, NVL"),
    Peaks(r"\bG?H200\b", 67.0, 494.5, 989.5, 1979.0, "NVIDIA H200 and GH200 data sheets, SXM"),
    Peaks(r"\bH100 NVL\b", 60.0, 417.5, 835.5, 1670.5, "NVIDIA H100 data sheet, NVL"),
    Peaks(r"\bH(100|800) PCIe\b", 51.0, 378.0, 756.5, 1513.0, "NVIDIA H100 data sheet of 2022, PCIe"),
    Peaks(r"\bH(100|800)\b", 67.0, 494.5, 989.5, 1979.0, "NVIDIA H100 and H800 data sheets, SXM"),
    Peaks(r"\bA(100|800)\b", 19.5, 156.0, 312.0, None, "NVIDIA A100 and A800 data sheets, SXM and PCIe"),
    Peaks(r"\bA30\b", 10.3, 82.0, 165.0, None, "NVIDIA A30 data sheet"),
    Peaks(r"\bA40\b", 37.4, 74.8, 149.7, None, "NVIDIA A40 data sheet"),
    Peaks(r"\bA10\b", 31.2, 62.5, 125.0, None, "NVIDIA A10 data sheet"),
    Peaks(r"\bL40S\b", 91.6, 183.0, 362.05, 733.0, "NVIDIA L40S data sheet"),
    Peaks(r"\bL40\b", 90.5, 90.5, 181.05, 362.0, "NVIDIA L40 data sheet"),
    Peaks(r"\bL4\b", 30.3, 60.0, 121.0, 242.5, "NVIDIA L4 data sheet"),
    Peaks(r"\bV100-SXM2", 15.7, None, None, None, "NVIDIA V100 data sheet, SXM2; no bfloat16"),
    Peaks(r"\bMI3(00|25)X\b", 163.4, 653.7, 1307.4, 2614.9, "AMD Instinct MI300X and MI325X data sheets"),
    Peaks(r"\bMI250X\b", 47.85, None, 191.5, None, "AMD Instinct MI250X data sheet, one of its two dies"),
)  # fmt: skip


def peak_flops(device: str, precision: Precision) -> float | None:
    """FLOP/s of a device at most.

    Args:
        device: as ``torch.cuda.get_device_name`` has it.

    Returns:
        None: the device is not in the table, is a part of one, or cannot multiply in this precision.
    """
    if re.search(r"\bMIG\b", device):
        return None
    for peaks in DEVICES:
        if re.search(peaks.name, device):
            found = peaks.of(precision)
            return None if found is None else found * 1e12
    return None


def engine_peak_flops(config: EngineConfig, device: torch.device) -> float | None:
    """FLOP/s that one trainer rank's device has at most for the products of this engine, as
    ``engine.peak_tflops`` says or by the device's name; None of what is not known, CPUs above all."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), product_precision(config))


def product_precision(config: EngineConfig) -> Precision:
    """Of the products in the blocks; float32 ones are tf32 where torch may take that."""
    if config.float8:
        return "float8"
    if config.param_dtype == "bfloat16":
        return "bfloat16"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
