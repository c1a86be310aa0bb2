"""What engines say they hold against the tensors that there are, and the same run twice: two real ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.held_ranks import CASES
from tests.helpers import on_ranks

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("held")
    on_ranks(2, "tests.engines.held_ranks", str(folder))
    return [json.loads((folder / f"held_{rank}.json").read_text()) for rank in range(2)]


# Multiples of the float32 model: parameters, gradients, optimizer. AdamW has two moments.
EXPECTED = {
    "fsdp": (0.5, 0.5, 1.0),
    "fsdp, replicas": (1.0, 1.0, 2.0),
    "zero 1": (1.0, 1.0, 1.5),  # float32 masters are tensors of their own
    "zero 2, bfloat16": (0.5, 0.5, 1.5),
    "zero 3": (1.5, 0.5, 1.5),  # so small a model stays gathered too
    "megatron": (1.0, 1.0, 1.0),
    "megatron, tensor": (0.5, 0.5, 1.0),
    "megatron, bfloat16": (0.5, 1.0, 1.5),
}
BUFFERED = ("zero 3", "megatron", "megatron, tensor", "megatron, bfloat16")
"""Gradients are there between steps."""


@pytest.mark.parametrize("name", CASES)
def test_bytes_by_kind(found: list[dict[str, Any]], name: str) -> None:
    """Exactly, but for padding and for what is whole on tensor-parallel ranks."""
    for rank in found:
        held, whole = rank[name]["held"], 4 * rank[name]["parameters"]
        kinds = [held[kind] / whole for kind in ("parameters", "gradients", "optimizer")]
        assert kinds == pytest.approx(EXPECTED[name], rel=0.01)
        assert held["offloaded"] == 0
        kept = held["parameters"] + held["optimizer"] + (held["gradients"] if name in BUFFERED else 0)
        assert kept == pytest.approx(rank[name]["live"], rel=0.02), "tensors that nobody counts"


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_twice_gives_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank[name]["curve"] == rank[name]["again"]
        assert len({step[-1] for step in rank[name]["curve"]}) == len(rank[name]["curve"]), "it stands still"
