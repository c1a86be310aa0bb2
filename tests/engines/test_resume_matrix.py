"""Every engine and layout continues every other's checkpoint, all have one curve, and a search from any of
their snapshots proposes the same. Real ranks over gloo.

With RESUME_MATRIX=FILE in the environment, there are more layouts, and the tables are written to that file
(``make resume-matrix``).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from opmix_dist.exchange.schemas import Proposal
from tests.engines.matrix_ranks import LAYOUTS, MORE, RANKS
from tests.engines.matrix_table import Curve, difference, matrix_page
from tests.engines.ranks import SAVED, STEPS
from tests.helpers import on_ranks
from tests.pool.searches import answer, quick_config, request

pytestmark = pytest.mark.launch

CURVE = 1e-5
"""Largest relative difference of a loss or gradient norm in a curve from the same weights, of any two."""
CONTINUED = 1e-5
"""Of a step after a resume from the same step of the uninterrupted run; a moment or a step of AdamW that is
missing makes per cents."""
SHARES, PREDICTED = 5e-4, 5e-6
"""Of a proposal's shares (absolute) and predicted losses (relative): ten times what was measured and more."""
SEARCHED = [
    name
    for name in ("single", "FSDP x3", "HSDP 2x2", "FSDP x2, TP2", "ZeRO-3 x2", "Megatron TP2 PP2")
    if name in LAYOUTS
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    on_ranks(RANKS, "tests.engines.matrix_ranks", str(folder), timeout_s=900)
    return folder


@pytest.fixture(scope="module")
def curves(out: Path) -> dict[str, Curve]:
    """[loss, gradient norm] of each step, by layout."""
    return {name: json.loads((out / f"written {name}.json").read_text()) for name in LAYOUTS}


@pytest.fixture(scope="module")
def matrix(out: Path) -> dict[str, dict[str, Any]]:
    """What matrix_ranks.continued found, by the layout that continued and the one that wrote."""
    return {name: json.loads((out / f"continued {name}.json").read_text()) for name in LAYOUTS}


@pytest.fixture(scope="module")
def proposals(out: Path, tiny_data: Path) -> dict[str, Proposal]:
    """Of the same small search from the snapshot of each, in this process."""
    found = {}
    for name in SEARCHED:
        run = out / "searches" / name
        # faster probes of so small a model blow rounding up: at four times the rate, shares differ by 0.003
        probes = {"steps": 12, "batch_size": 4, "lr_multiplier": 0.25, "rank": 4}
        candidates = {"count": 16, "samples_per_domain": 6}
        config = quick_config(tiny_data, run, probes=probes, candidates=candidates)
        found[name] = answer(config, request(config, step=STEPS)).proposal()
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(curves: dict[str, Curve], name: str) -> None:
    assert len(curves[name]) == STEPS
    assert difference(curves[name], curves["single"]) <= CURVE


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
def test_any_continues_the_checkpoint_of_any(
    curves: dict[str, Curve], matrix: dict[str, dict[str, Any]], writer: str, reader: str
) -> None:
    """Parameters and AdamW's state are taken over bit by bit; the same layout goes on bit by bit too."""
    found = matrix[reader][writer]
    assert found["differ"] == []
    assert found["optimizer_steps"] == SAVED
    error = difference(found["steps"], curves[writer][SAVED : SAVED + MORE])
    assert error <= (0.0 if reader == writer else CONTINUED)


def test_a_search_proposes_the_same_whoever_trained(proposals: dict[str, Proposal]) -> None:
    expected = proposals["single"]
    assert max(expected.weights.values()) - min(expected.weights.values()) > 0.1, "a proposal of nothing"
    for name, found in proposals.items():
        assert found.weights == pytest.approx(expected.weights, abs=SHARES), name
        assert found.simulated == pytest.approx(expected.simulated, rel=PREDICTED), name


def test_tables_are_written_on_demand(
    curves: dict[str, Curve], matrix: dict[str, dict[str, Any]], proposals: dict[str, Proposal]
) -> None:
    page = matrix_page(curves, matrix, proposals)
    assert page.count("exact") >= len(LAYOUTS)
    if path := os.environ.get("RESUME_MATRIX"):
        Path(path).write_text(page)
