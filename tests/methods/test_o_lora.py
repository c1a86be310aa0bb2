"""O-LoRA's penalty and its gradient by hand, and against autograd."""

from __future__ import annotations

import pytest
import torch

from opmix_dist.method_config import OLoRAConfig
from opmix_dist.methods.o_lora import overlap

P = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, -3.0]])
# P A^T = [[1, -6], [1, 3]]


def test_absolute_by_hand() -> None:
    """|1| + |-6| + |1| + |3| = 11; row 1 of A gets P_1 + P_2, row 2 gets P_2 - P_1."""
    value, slope = overlap(P, A, OLoRAConfig(strength=0.5))
    assert value.item() == 5.5
    assert slope.tolist() == [[0.5, 0.5, 0.5], [-0.5, 0.5, -1.5]]


def test_squared_by_hand() -> None:
    """1 + 36 + 1 + 9 = 47; row 1 of A gets 2 (P_1 + P_2), row 2 gets 2 (3 P_2 - 6 P_1)."""
    value, slope = overlap(P, A, OLoRAConfig(strength=1.0, overlap="squared"))
    assert value.item() == 47
    assert slope.tolist() == [[2, 2, 2], [-12, 6, -30]]


@pytest.mark.parametrize("kind", ["absolute", "squared"])
def test_gradient_is_autograds(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    earlier, rows = torch.randn(6, 9, generator=generator), torch.randn(4, 9, generator=generator)
    rows.requires_grad_()
    value, slope = overlap(earlier, rows, OLoRAConfig(strength=0.3, overlap=kind))
    value.backward()
    torch.testing.assert_close(rows.grad, slope.detach())
