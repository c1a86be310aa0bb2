"""The figures of benchmarks/candidate_precision.py, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.candidate_precision import designs, errors, weights_in


def test_errors_of_losses_and_of_differences() -> None:
    """`old` is off by 1, the others by 1, 3 and 5: differences 0, 2, 4; two of three ranks are swapped."""
    exact = np.array([10.0, 20.0, 19.0, 30.0])
    found = errors(exact + np.array([1.0, 1.0, 3.0, 5.0]), exact)
    assert found["rms"] == pytest.approx(np.sqrt((1 + 1 + 9 + 25) / 4))
    assert found["mean"] == 2.5
    assert found["differences"] == pytest.approx(np.sqrt((0 + 4 + 16) / 3))
    assert found["scatter"] == 2.0
    assert found["spearman"] == pytest.approx(0.5)


def test_designs_begin_with_old_and_lie_in_the_simplex() -> None:
    spread, close = designs(4).values()
    for design in (spread, close):
        assert design[0].tolist() == [1, 0, 0, 0]
        assert np.allclose(design.sum(1), 1)
        assert (design >= 0).all()
    assert np.abs(close[1:] - 0.25).max() <= 0.02 * 0.75


def test_weights_come_back_as_they_were() -> None:
    class Adapters:
        model = torch.nn.Linear(3, 2)

    before = [p.data.clone() for p in Adapters.model.parameters()]
    with weights_in(Adapters, torch.bfloat16):  # type: ignore[arg-type]
        assert {p.dtype for p in Adapters.model.parameters()} == {torch.bfloat16}
    for p, data in zip(Adapters.model.parameters(), before, strict=True):
        assert torch.equal(p.data, data)
