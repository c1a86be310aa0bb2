"""Tables of runs whose laws are known."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("web", "code", "math")
METRICS = ("web_loss", "code_loss", "math_loss")
LOG_C = np.array([0.3, 0.5, 0.2])
T = np.array([[-1.5, 0.2, 0.1], [0.1, -1.2, 0.3], [0.2, 0.1, -2.0]])
"""Of L_i(x) = exp(LOG_C_i) + exp(T_i . x)."""


def losses(ratios: np.ndarray) -> np.ndarray:
    """[M, 3] of mixtures [M, 3]."""
    return np.exp(LOG_C) + np.exp(ratios @ T.T)


def ratios(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(3), count)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_swarm(folder: Path, count: int = 20, *, noise: float = 0.0, seed: int = 0) -> tuple[Path, Path]:
    """As olmix publishes them: run, name and index before the columns that count."""
    mixtures = ratios(count, seed)
    values = losses(mixtures) + noise * np.random.default_rng([seed, 1]).normal(size=(count, 3))
    paths = []
    for name, columns, table in (("ratios", DOMAINS, mixtures), ("metrics", METRICS, values)):
        rows = [[f"r{i}", f"swarm-{i:04}", i, *row] for i, row in enumerate(table.tolist())]
        header = ["run", "name", "index", *columns]
        paths.append(write_csv(folder / f"{name}.csv", header, rows))
    return paths[0], paths[1]
