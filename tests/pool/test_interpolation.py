"""How deltas are put together: lengths by hand, inner products of whole deltas, gradients by differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.data.build import held_out_samples
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.candidates import evaluate_candidates
from opmix_dist.pool.interpolation import Interpolation, gram
from tests.conftest import DOMAINS
from tests.helpers import tiny_llama
from tests.pool.searches import answer, quick_config, request

COMPONENTS = ("old", *DOMAINS)


def test_inner_products_are_those_of_the_deltas() -> None:
    adapters = JointAdapters(tiny_llama(), COMPONENTS, rank=2, alpha=6, seeds=[0, 1, 2, 3])
    for layer in adapters.layers.values():
        layer.B.data.normal_(generator=torch.Generator().manual_seed(5))
    eye = torch.eye(4)
    deltas = torch.stack(
        [torch.cat([(3 * layer.delta(u)).flatten() for layer in adapters.layers.values()]) for u in eye]
    ).double()
    assert gram(adapters) == pytest.approx((deltas @ deltas.T).detach().numpy(), rel=1e-5, abs=1e-2)


def test_a_mean_gets_the_length_that_its_parts_have_on_average() -> None:
    """Lengths 3 and 4 at a right angle: the mean at (1/2, 1/2) has 2.5 where they have 3.5."""
    norm = Interpolation(np.diag([9.0, 16.0]))
    U = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert norm.coefficients(U) == pytest.approx(np.array([[0.7, 0.7], [1, 0], [0, 1], [0, 0]]))
    assert Interpolation().coefficients(U) is U
    opposed = Interpolation(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert opposed.coefficients(np.array([[0.5, 0.5], [0.6, 0.4]])) == pytest.approx(
        np.sqrt(2) * np.array([[0.5, 0.5], [0.6, 0.4]])
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_lengths_and_gradients_on_random_deltas(seed: int, count: int) -> None:
    draws = np.random.default_rng(seed)
    deltas = draws.normal(size=(count, 40)) * draws.uniform(0.1, 3, size=(count, 1))
    norm = Interpolation(deltas @ deltas.T)
    U = draws.dirichlet(np.ones(count), size=3)
    lengths = np.linalg.norm(norm.coefficients(U) @ deltas, axis=1)
    most = np.sqrt(count) * np.linalg.norm(U @ deltas, axis=1)
    assert lengths == pytest.approx(np.minimum(U @ np.linalg.norm(deltas, axis=1), most))

    of_c = draws.normal(size=(3, 2, count))  # of two losses that are linear in c
    found = norm.gradients(U, of_c)
    for k in range(count):
        step = 1e-6 * np.eye(count)[k]
        change = norm.coefficients(U + step) - norm.coefficients(U - step)
        assert found[:, :, k] == pytest.approx(np.einsum("mdk,mk->md", of_c, change) / 2e-6, abs=1e-6)


def test_a_search_simulates_by_the_coefficients(tiny_data: Path, tmp_path: Path) -> None:
    config = quick_config(tiny_data, tmp_path / "run", candidates={"interpolation": "norm"}, gradients=True)
    search = answer(config, request(config))
    catalogue = Catalogue.open(tiny_data, DOMAINS)
    heldout = held_out_samples(config.data, catalogue, samples_per_domain=2, seed=config.seed)
    adapters = JointAdapters(tiny_llama(vocab_size=512), COMPONENTS, rank=2, alpha=32, seeds=[0] * 4)
    for index, name in enumerate(COMPONENTS):
        adapters.load_peft(index, search.probe(name))
    rows = [row for row in pq.read_table(search.candidates_file).to_pylist() if row["kind"] == "candidate"]
    losses = np.array([row["loss"] for row in rows]).reshape(-1, len(DOMAINS))
    U = np.array([[row[f"u_{name}"] for name in COMPONENTS] for row in rows[:: len(DOMAINS)]])
    c = Interpolation(gram(adapters)).coefficients(U)
    assert (c.sum(axis=1) > 1.3).any(), "the deltas are far from parallel"
    for coefficients, agrees in ((c, True), (U, False)):
        found = evaluate_candidates(
            adapters,
            coefficients,
            heldout.batch,
            heldout.domain_ids,
            len(DOMAINS),
            method="lowrank",
            batch_size=6,
        )
        assert (np.abs(found.loss - losses).max() < 1e-5) == agrees
