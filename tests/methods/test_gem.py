"""GEM's quadratic program by hand and against a general solver; its steps on a linear model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch

from opmix_dist.methods.gem import GEM, own_share
from opmix_dist.methods.projection import dual
from tests.helpers import uneven_batch
from tests.methods.linear import LinearEngine, Points, around, config_of


def projected(M: list[list[float]], g: list[float], margin: float = 0.0) -> tuple[list[float], list[float]]:
    """v and z."""
    m, slope = np.array(M), np.array(g)
    v = dual(m @ m.T, m @ slope, margin)
    return v.tolist(), (slope + m.T @ v).tolist()


def test_two_dimensions_by_hand() -> None:
    assert projected([[0, 1]], [1, 1]) == ([0], [1, 1]), "nothing is violated"
    assert projected([[0, 1]], [1, -1]) == ([pytest.approx(1)], pytest.approx([1, 0]))
    v, z = projected([[0, 1], [-1, 0]], [1, -1])
    assert (v, z) == (pytest.approx([1, 1]), pytest.approx([0, 0])), "only 0 satisfies both"
    # m1 = (0, 1) and m2 = (2, -1): onto m1's line, g is (1, 0), where m2 . z = 2: only m1 is active
    v, z = projected([[0, 1], [2, -1]], [1, -3])
    assert (v, z) == (pytest.approx([3, 0]), pytest.approx([1, 0]))
    v, z = projected([[0, 1]], [1, -1], margin=1.5)
    assert (v, z) == (pytest.approx([1.5]), pytest.approx([1, 0.5])), "beyond the border"


def test_memories_that_depend_on_each_other_or_are_zero() -> None:
    v, z = projected([[0, 1], [0, 2], [0, 0]], [1, -1])
    assert z == pytest.approx([1, 0])
    assert min(v) >= 0
    assert projected([[0, 0]], [1, -1])[1] == [1, -1]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_nearest_gradient_that_raises_no_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    M, g = rng.normal(size=(5, 7)), rng.normal(size=7) - 1
    z = g + M.T @ dual(M @ M.T, M @ g)
    assert (M @ g).min() < -0.1
    assert (M @ z).min() > -1e-9
    wanted = cvxpy.Variable(7)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(wanted - g)), [M @ wanted >= 0]).solve(solver="CLARABEL")
    assert z == pytest.approx(wanted.value, abs=1e-6)


def gem(engine: LinearEngine, data: Path, run: Path, **settings: Any) -> GEM:
    method = {"name": "gem", "gem": {"domains": ["json", "prose"], **settings}}
    return GEM(around(engine, config_of(data, run, method)))


def memory() -> dict[str, Points]:
    """Gradients at w = (1, 1): of json (1, 0), the mean over two samples; of prose (0, 2)."""
    json = Points.of(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 1.0]))
    return {"json": json, "prose": Points.of(torch.tensor([[0.0, 1.0]]), torch.tensor([-1.0]))}


def stepped(method: GEM, engine: LinearEngine, x: list[float], y: float) -> torch.Tensor:
    """The gradient that AdamW got: a step's first moment is a tenth of it."""
    work = method.prepare(0, [Points.of(torch.tensor([x]), torch.tensor([y]))])
    engine.train_step(work.microbatches, lr=1e-3, adjust=work.adjust)
    return engine.optimizer.state[engine.model.weight]["exp_avg"][0] / 0.1


def test_a_step_on_a_linear_model(tiny_data: Path, tmp_path: Path) -> None:
    """The new sample's gradient is (w . x - y) x = (-3, 1.5): against json's, along prose's."""
    engine = LinearEngine([1.0, 1.0])
    method = gem(engine, tiny_data, tmp_path)
    method.memory = dict(memory())
    found = stepped(method, engine, [-2.0, 1.0], -2.5)
    assert found.tolist() == pytest.approx([0.0, 1.5])
    assert method.numbers() == {"violated": 1.0}
    # three samples of memory, read once
    assert method.around.ledger.costs["memory gradients"].tokens == 3 * 2


def test_averaged_gem_has_one_constraint(tiny_data: Path, tmp_path: Path) -> None:
    """The mean gradient is (0.5, 1), and (-3, 1.5) is along it by 0: nothing changes. (-3, 1) is against it
    by 0.5, which is taken off along it: 0.5 / 1.25 of it."""
    for gradient, expected in (((-3.0, 1.5), (-3.0, 1.5)), ((-3.0, 1.0), (-2.8, 1.4))):
        engine = LinearEngine([1.0, 1.0])
        method = gem(engine, tiny_data, tmp_path, projection="a_gem")
        method.memory = dict(memory())
        x = list(gradient)
        found = stepped(method, engine, x, sum(x) - 1)
        assert found.tolist() == pytest.approx(list(expected))


def test_each_step_draws_of_the_memory(tiny_data: Path, tmp_path: Path) -> None:
    """One of json's two samples, whose gradients at w are (2, 0) and (0, 0), drawn by the step's number."""
    engine = LinearEngine([1.0, 1.0])
    method = gem(engine, tiny_data, tmp_path, samples_per_step=1)
    method.memory = dict(memory())
    drawn = [method._gradient("json", step)["weight"][0, 0].item() for step in range(12)]
    assert set(drawn) == {0.0, 2.0}
    assert drawn == [method._gradient("json", step)["weight"][0, 0].item() for step in range(12)]


def test_shares_are_all_samples_once() -> None:
    batch = uneven_batch(0, 5, 8)
    shares = [own_share(batch, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sum(int(share.targets.sum()) for share in shares) == int(batch.targets.sum())
    assert shares[2].targets[1] == 0


def test_memories_are_training_samples_that_count(tiny_data: Path, tmp_path: Path) -> None:
    engine = LinearEngine([1.0])
    method = gem(engine, tiny_data, tmp_path, samples_per_domain=5)
    method.begin(0)
    again = gem(engine, tiny_data, tmp_path, samples_per_domain=5)
    again.begin(7)
    assert list(method.memory) == ["json", "prose"]
    for name, batch in method.memory.items():
        assert 1 <= len(batch) <= 5
        assert (batch.targets > 0).all()
        assert torch.equal(batch.tokens, again.memory[name].tokens)
