"""The columns of the wide buffer and the matrices that fit them, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from opmix_kernels.wide import LowRankStack, WideLayout, padded_rows
from tests.kernels.checking import random


def test_columns_by_hand() -> None:
    layout = WideLayout(features=20, consumers=3, columns=10)  # 16 | 32 | 16 | 16
    assert layout.width == 80
    assert layout.x == slice(16, 36)
    assert [layout.z(i) for i in range(3)] == [slice(0, 10), slice(48, 58), slice(64, 74)]
    assert [layout.span(i) for i in range(3)] == [slice(0, 48), slice(16, 64), slice(16, 80)]


@pytest.mark.parametrize("consumer", [-1, 3])
def test_no_such_consumer(consumer: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        WideLayout(20, 3, 10).span(consumer)


def test_matrices_by_hand() -> None:
    layout = WideLayout(features=2, consumers=3, columns=2)  # 16 columns each
    weight, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0]], [[4.0]]])
    first, second, third = (layout.matrix(i, weight, B)[0] for i in range(3))
    assert first.nonzero().flatten().tolist() == [0, 1, 16, 17]
    assert first[[0, 1, 16, 17]].tolist() == [3, 4, 1, 2]
    assert second.nonzero().flatten().tolist() == [0, 1, 16, 17]
    assert second[[0, 1, 16, 17]].tolist() == [1, 2, 3, 4]
    assert third.nonzero().flatten().tolist() == [0, 1, 32, 33]  # 16..31 is the second's Z
    assert len(third) == 48


def test_every_consumer_finds_its_columns() -> None:
    """Spans times matrices are W x + B z, at odd sizes."""
    layout = WideLayout(features=37, consumers=4, columns=3 * 5)
    wide = torch.zeros(6, layout.width, dtype=torch.float64)
    wide[:, layout.x] = x = random(6, 37).double()
    for i in range(4):
        wide[:, layout.z(i)] = random(6, 15, seed=i).double()
    for i in range(4):
        weight, B = random(8, 37, seed=10 + i).double(), random(3, 8, 5, seed=20 + i)
        low = wide[:, layout.z(i)].view(6, 3, 5)
        expected = x @ weight.T + torch.einsum("tcr,cor->to", low, B.double())
        found = wide[:, layout.span(i)] @ layout.matrix(i, weight, B).T
        torch.testing.assert_close(found, expected)


def test_matrix_names_what_does_not_fit() -> None:
    layout = WideLayout(4, 1, 6)
    with pytest.raises(ValueError, match=r"weight must be \[d_out, 4\]"):
        layout.matrix(0, torch.zeros(3, 5), torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match=r"B must be \[C, 3, r\] with C \* r = 6"):
        layout.matrix(0, torch.zeros(3, 4), torch.zeros(2, 3, 2))


def test_stack_by_hand() -> None:
    weight, A, B = torch.full((1, 1), 1.0), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    stack = LowRankStack.build(weight, A, B)
    expected = torch.zeros(32, 32)
    expected[0, 16], expected[16, 0], expected[16, 16] = 2, 3, 1
    assert torch.equal(stack.storage, expected)
    assert stack.weight.tolist() == [[1]]
    assert stack.down[:, 0].tolist() == [2] + 15 * [0]
    assert stack.up[:, 0].tolist() == [3] + 15 * [0]


def test_stack_parts_share_its_storage_and_have_its_dtype() -> None:
    weight, A, B = random(33, 37), random(3, 5, 37, seed=1), random(3, 33, 5, seed=2)
    stack = LowRankStack.build(weight, A, B, torch.bfloat16)
    assert torch.equal(stack.weight, weight.bfloat16())
    assert torch.equal(stack.down[:15], A.flatten(0, 1).bfloat16())
    assert torch.equal(stack.up[:15], B.transpose(1, 2).flatten(0, 1).bfloat16())
    assert not stack.down[15:].any()
    assert not stack.up[15:].any()
    parts = (stack.weight, stack.down, stack.up, stack.forward_matrix, stack.backward_matrix)
    assert {part.untyped_storage().data_ptr() for part in parts} == {
        stack.storage.untyped_storage().data_ptr()
    }


@pytest.mark.parametrize("rank", [3, 16])
def test_rows_are_padded_after_each_consumer(rank: int) -> None:
    A = random(2, 1, rank, 5)
    rows = padded_rows(A)
    assert rows.shape == (32, 5)
    assert torch.equal(rows[:rank], A[0, 0])
    assert torch.equal(rows[16 : 16 + rank], A[1, 0])
    assert not rows[rank:16].any()
    assert (rows.data_ptr() == A.data_ptr()) == (rank == 16)  # nothing is copied where nothing is missing
