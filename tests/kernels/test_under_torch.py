"""What torch does around the operations: compiling for any number of rows, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from opmix_kernels import (
    gated_lowrank_linear,
    joint_lora_linear,
    linear_cross_entropy,
    merge_deltas,
    norm_shrink_gate,
    segment_sums,
)
from tests.kernels.checking import DEVICE, random

W, A, B, U = random(8, 16, seed=1), random(2, 4, 16, seed=2), random(2, 8, 4, seed=3), random(2, 2, seed=4)

Operation = Callable[[Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "gated_lowrank_linear": lambda x: gated_lowrank_linear(x, W, A, B, U, scale=0.7),
    "joint_lora_linear": lambda x: joint_lora_linear(x, W, A, B, scale=0.7),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, W, x.argmax(1) // 2),
    "merge_deltas": lambda x: merge_deltas(W, A, B, x[:, :2], scale=0.7),
    "norm_shrink_gate": lambda x: norm_shrink_gate(x, A[None], U, scale=0.7, norm_weight=W[0], eps=1e-6),
    "segment_sums": lambda x: segment_sums(x, torch.arange(16, device=DEVICE) // 5, 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_graph_serves_any_number_of_rows(name: str) -> None:
    """Torch may compile once more, for strides or divisibility that it assumed, but not for each number."""
    compiled_graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 6, 10):
        x = random(rows, 16)
        assert torch.equal(compiled(x), OPERATIONS[name](x))
    assert len(compiled_graphs) <= 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name: str) -> None:
    """Products are in the dtypes of their arguments: autocast of torch's own products inside would give
    results of another dtype than the fake implementations promise."""
    x = random(4, 16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = OPERATIONS[name](x)
    expected = OPERATIONS[name](x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["gated_lowrank_linear", "joint_lora_linear", "linear_cross_entropy"])
def test_gradients_of_a_pass_under_autocast(name: str) -> None:
    gradients = []
    for enabled in (True, False):
        x = random(4, 16).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            y = OPERATIONS[name](x)
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*gradients)
