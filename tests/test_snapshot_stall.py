"""benchmarks/snapshot_stall.py: what it measures, and how its table puts it."""

from __future__ import annotations

from benchmarks.snapshot_stall import Times, report, works


def test_the_built_in_configuration_is_measured_as_it_is() -> None:
    demo = works(quick=False)["demo"]
    assert (demo.samples, demo.micro) == (16, 8)
    assert demo.config["hidden_size"] == 128


def test_a_row_puts_the_stall_beside_a_step() -> None:
    text = report({"demo/fsdp": Times(1_300_000, step=0.5, stall=0.1, writing=0.6, written=2.0)})
    assert "| demo | 1.3 M | fsdp | 0.500 | 0.100 | 0.20 | 1.20 | 2.00 |" in text
