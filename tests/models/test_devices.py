"""Peaks of devices by the names that drivers report, and the one that a configuration is measured by."""

from __future__ import annotations

import pytest
import torch

from opmix_dist.config import EngineConfig
from opmix_dist.models.devices import DEVICES, engine_peak_flops, peak_flops, product_precision


@pytest.mark.parametrize(
    ("name", "bfloat16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H800", 989.5e12),
        ("NVIDIA H800 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 2080", None),
        ("", None),
    ],
)
def test_devices_are_told_by_their_names(name: str, bfloat16: float | None) -> None:
    assert peak_flops(name, "bfloat16") == bfloat16


def test_dense_peaks_double_with_each_halving_of_the_factors() -> None:
    """So a figure with sparsity, twice the dense one, would stand out. Sheets are rounded."""
    for peaks in DEVICES:
        if peaks.tf32 is not None and peaks.bfloat16 is not None:
            assert peaks.bfloat16 == pytest.approx(2 * peaks.tf32, rel=0.02), peaks.name
        if peaks.float8 is not None and peaks.bfloat16 is not None:
            assert peaks.float8 == pytest.approx(2 * peaks.bfloat16, rel=0.02), peaks.name


def test_the_precision_in_use_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert engine_peak_flops(EngineConfig(), cuda) == 67e12
    assert engine_peak_flops(EngineConfig(param_dtype="bfloat16"), cuda) == 989.5e12
    assert engine_peak_flops(EngineConfig(param_dtype="bfloat16", float8=True), cuda) == 1979e12
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert product_precision(EngineConfig()) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert engine_peak_flops(EngineConfig(peak_tflops=100), cuda) == 100e12


def test_a_cpu_has_no_peak_unless_it_is_given() -> None:
    assert engine_peak_flops(EngineConfig(), torch.device("cpu")) is None
    assert engine_peak_flops(EngineConfig(peak_tflops=0.5), torch.device("cpu")) == 0.5e12
