"""The page that ``make resume-matrix`` writes: who continues whose checkpoint, curves, proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from opmix_dist.exchange.schemas import Proposal
from tests.engines.matrix_ranks import MORE
from tests.engines.ranks import SAVED, STEPS

Curve = list[list[float]]
"""[loss, gradient norm] of each step."""
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")


def difference(found: Curve, expected: Curve) -> float:
    """The largest relative one of any loss or gradient norm."""
    a, b = (torch.tensor(curve, dtype=torch.float64) for curve in (found, expected))
    assert a.shape == b.shape
    return ((a - b).abs() / b.abs()).max().item()


def matrix_page(
    curves: Mapping[str, Curve],
    matrix: Mapping[str, Mapping[str, Any]],
    proposals: Mapping[str, Proposal],
) -> str:
    """
    Args:
        curves: by layout.
        matrix: by the layout that continued and the one that wrote, what matrix_ranks.continued found.
        proposals: of searches, by the layout that trained.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    cells = [found for row in matrix.values() for found in row.values()]
    whole = sum(not cell["differ"] and cell["optimizer_steps"] == SAVED for cell in cells)
    return "\n".join(
        [
            "# Engines side by side",
            "",
            f"Written by `make resume-matrix`; CPU, float32, gloo; {packages}. A Llama of two blocks, its "
            "weights and data the same everywhere, packed documents, some micro-batches without a target. "
            "Layouts say how many ranks hold or share what: `FSDP x2, TP2` are four.",
            "",
            "## Checkpoints",
            "",
            f"Rows: written by, after {SAVED} steps. Columns: continued by, for {MORE} steps more. In a "
            "cell: the largest relative difference of a loss or gradient norm from the writer's own next "
            f"steps; `exact`: none in any bit. In {whole} of {len(cells)} cells the parameters, both moments "
            "and the step count of AdamW were, after loading, those of the checkpoint bit for bit.",
            "",
            *_table(
                "written by",
                list(matrix),
                {
                    writer: [_cell(row[writer]["steps"], curves[writer]) for row in matrix.values()]
                    for writer in matrix
                },
            ),
            "",
            f"## Curves of {STEPS} steps",
            "",
            *_table(
                "layout",
                ["last loss", "largest difference from `single`"],
                {
                    name: [f"{curve[-1][0]:.6f}", f"{difference(curve, curves['single']):.1e}"]
                    for name, curve in curves.items()
                },
            ),
            "",
            "## Proposals",
            "",
            f"The same small search from the snapshot after {STEPS} steps.",
            "",
            *_proposals(proposals),
            "",
        ]
    )


def _cell(steps: Curve, curve: Curve) -> str:
    found = difference(steps, curve[SAVED : SAVED + MORE])
    return f"{found:.0e}" if found else "exact"


def _proposals(proposals: Mapping[str, Proposal]) -> list[str]:
    domains = list(proposals["single"].weights)
    rows = {
        name: [
            *(f"{found.weights[domain]:.5f}" for domain in domains),
            *(f"{found.simulated[domain]:.5f}" for domain in domains),
        ]
        for name, found in proposals.items()
    }
    titles = [f"share of {domain}" for domain in domains] + [
        f"predicted loss, {domain}" for domain in domains
    ]
    return _table("trained by", titles, rows)


def _table(corner: str, titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [[corner, *titles], ["---"] * (len(titles) + 1), *([name, *row] for name, row in rows.items())]
    return ["| " + " | ".join(line) + " |" for line in lines]
