"""The KL divergences and their gradients against autograd, in both directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opmix_dist.method_config import Direction
from opmix_dist.methods.divergence import divergences

DIRECTIONS: tuple[Direction, ...] = ("reverse", "forward")


def by_autograd(student: Tensor, teacher: Tensor, direction: Direction, top_k: int | None) -> Tensor:
    """[R], with all distributions whole."""
    if top_k is not None:
        kept = teacher.topk(top_k, dim=1).indices
        student, teacher = student.gather(1, kept), teacher.gather(1, kept)
    q, p = student.softmax(1), teacher.softmax(1)
    if direction == "reverse":
        return (q * (q / p).log()).sum(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_tokens_by_hand(direction: Direction) -> None:
    """q = (1/2, 1/2), p = (1/4, 3/4)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    wanted = {
        "reverse": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "forward": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    }
    assert divergences(student, teacher, direction).item() == pytest.approx(wanted[direction], abs=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("top_k", [None, 1, 4, 11, 50])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_value_and_gradient(direction: Direction, top_k: int | None, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = divergences(ours, teacher, direction, top_k=top_k, rows=rows)
    wanted = by_autograd(theirs, teacher, direction, None if top_k == 50 else top_k)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert (found > -1e-12).all()
    (found @ weights).backward()
    (wanted @ weights).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_toy_policy_descends_to_its_teacher(direction: Direction) -> None:
    """A linear policy of 4 contexts and 6 tokens, whose parameters then are the teacher's but for a constant
    of each context."""
    generator = torch.Generator().manual_seed(1)
    contexts = torch.eye(4)
    teacher = torch.randn(4, 6, generator=generator)
    policy = torch.zeros(4, 6, requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        divergences(contexts @ policy, teacher, direction, rows=3).sum().backward()
        optimizer.step()
    assert torch.allclose(policy.softmax(1), teacher.softmax(1), atol=1e-3)


def test_equal_distributions_have_none_and_16_bits_are_summed_in_32() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    for direction in DIRECTIONS:
        found = divergences(logits, logits.detach(), direction)
        assert found.dtype == torch.float32
        assert found.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.dtype == torch.bfloat16
        assert gradient.abs().max() < 1e-6


def test_no_rows() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    divergences(student, torch.zeros(0, 5), "reverse").sum().backward()
    assert student.grad is not None
