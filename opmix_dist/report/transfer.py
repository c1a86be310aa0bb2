"""What stages of training did to each other: the matrix (after stage s, on domain d), and measures of it.

The measures are those of Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning (2017),
section 2, and the forgetting of Chaudhry et al., Riemannian Walk for Incremental Learning (2018), with
domains in the place of tasks. They are written there for accuracies; here the metric is a loss or an error
rate, of which less is better, so every difference is turned around. What they say stays the same: forgetting
above 0 is worse, while acquisition and both transfers above 0 are better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Matrix:
    """A metric of which less is better, after each of S stages on each of D domains."""

    metric: str
    """What was measured, with its unit: "loss, nats per token"."""
    stages: tuple[str, ...]
    """[S] names."""
    domains: tuple[str, ...]
    """[D] names."""
    values: np.ndarray
    """[S + 1, D]: row 0 before the first stage, row s after stage s; nan where it was not measured."""
    joined: np.ndarray
    """[D] number of the stage, from 1, that first read the domain; 0: it was read before; S + 1: by none."""

    def __post_init__(self) -> None:
        rows, columns = len(self.stages) + 1, len(self.domains)
        if self.values.shape != (rows, columns) or self.joined.shape != (columns,):
            raise ValueError(
                f"values {self.values.shape} and joined {self.joined.shape} must be ({rows}, {columns}) and "
                f"({columns},)"
            )

    @classmethod
    def of(
        cls,
        metric: str,
        stages: Sequence[str],
        before: Mapping[str, float],
        after: Sequence[Mapping[str, float]],
        tokens: Sequence[Mapping[str, int]],
        history: Mapping[str, int] | None = None,
    ) -> Matrix:
        """From what each stage measured.

        Args:
            before: value by domain before the first stage; empty: nothing was measured then.
            after: value by domain after each stage [S].
            tokens: what each stage read of each domain [S].
            history: the same of what came before the first stage.
        """
        domains = tuple(dict.fromkeys(name for row in after for name in row))
        rows = [before, *after]
        values = np.array([[row.get(name, np.nan) for name in domains] for row in rows], dtype=np.float64)
        read = [history or {}, *tokens]
        joined = [next((s for s, t in enumerate(read) if t.get(name, 0)), len(read)) for name in domains]
        return cls(metric, tuple(stages), domains, values, np.array(joined, dtype=np.int64))

    @property
    def last(self) -> int:
        """Number of the last stage, S."""
        return len(self.stages)

    def old(self, stage: int) -> np.ndarray:
        """[D] mask of the domains that were read before stage ``stage``, which counts from 1."""
        return self.joined < stage

    def new(self, stage: int) -> np.ndarray:
        """[D] mask of the domains that joined in a stage."""
        return self.joined == stage

    def forgetting(self, stage: int) -> np.ndarray:
        """[D] rise over the best value so far, of a stage's old domains, nan elsewhere: R[s, d] - min over
        r < s of R[r, d]. Below 0 where the stage has improved on it."""
        rise = _minus(self.values[stage], np.fmin.reduce(self.values[:stage]))
        return np.where(self.old(stage), rise, np.nan)

    def acquisition(self, stage: int) -> np.ndarray:
        """[D] fall during a stage, of the domains that joined in it, nan elsewhere: R[s - 1, d] - R[s, d]."""
        return np.where(self.new(stage), _minus(self.values[stage - 1], self.values[stage]), np.nan)

    def mean_forgetting(self, stage: int) -> float:
        """Over the stage's old domains; nan where it has none."""
        return _mean(self.forgetting(stage), self.old(stage))

    def mean_acquisition(self) -> float:
        """Over the domains that joined a model which had read others before: each in its own stage."""
        rows = np.arange(len(self.domains))
        joins = np.minimum(self.joined, self.last)
        fall = _minus(self.values[np.maximum(joins - 1, 0), rows], self.values[joins, rows])
        first = 1 if (self.joined == 0).any() else 2
        return _mean(fall, (self.joined >= first) & (self.joined <= self.last))

    def backward_transfer(self) -> float:
        """Mean over the last stage's old domains of R[j, d] - R[S, d], where j is the stage in which d
        joined: above 0 where later stages lowered it. Minus BWT of a metric of which more is better."""
        rows = np.arange(len(self.domains))
        learnt = self.values[np.minimum(self.joined, self.last), rows]
        return _mean(_minus(learnt, self.values[self.last]), self.old(self.last))

    def forward_transfer(self) -> float:
        """Mean over the domains that joined in stage j = 2 or later of R[0, d] - R[j - 1, d]: above 0 where
        what was read before they joined had lowered it. FWT with the model before the first stage in the
        place of a random one, which it is where the first stage starts from fresh weights."""
        rows = np.arange(len(self.domains))
        eve = self.values[np.clip(self.joined - 1, 0, self.last), rows]
        return _mean(_minus(self.values[0], eve), (self.joined >= 2) & (self.joined <= self.last))

    def average(self, stage: int, mask: np.ndarray | None = None) -> float:
        """Mean over domains after a stage, of those in ``mask`` [D], or of all."""
        return _mean(self.values[stage], np.ones(len(self.domains), bool) if mask is None else mask)


@dataclass(frozen=True)
class MeanMatrix:
    """Matrices of several seeds put together."""

    one: Matrix
    """The first seed's, for what all have in common."""
    values: np.ndarray
    """[S + 1, D] mean over seeds."""
    forgetting: np.ndarray
    """[S + 1, D] mean over seeds of each one's forgetting, nan where a domain is not old; row 0 is nan."""

    @classmethod
    def of(cls, matrices: Sequence[Matrix]) -> MeanMatrix:
        """Of the same stages, each over the domains of the first; ValueError otherwise."""
        first = matrices[0]
        for other in matrices[1:]:
            if other.stages != first.stages or {*other.domains} != {*first.domains}:
                raise ValueError("matrices of other stages or domains have no mean")
        orders = [[other.domains.index(name) for name in first.domains] for other in matrices]
        values = [other.values[:, order] for other, order in zip(matrices, orders, strict=True)]
        rises = [_forgetting(other)[:, order] for other, order in zip(matrices, orders, strict=True)]
        with np.errstate(invalid="ignore"):  # of inf and -inf
            return cls(first, np.mean(values, axis=0), np.mean(rises, axis=0))

    @property
    def staged(self) -> bool:
        """There is more to see than one column of losses: several stages, or domains that were old."""
        return len(self.one.stages) > 1 or bool((self.one.joined == 0).any())


def _forgetting(matrix: Matrix) -> np.ndarray:
    """[S + 1, D]."""
    first = np.full(len(matrix.domains), np.nan)
    return np.stack([first, *(matrix.forgetting(stage) for stage in range(1, matrix.last + 1))])


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    """Of the values [D] in a mask. nan where there are none, or one was not measured: a mean of the others
    would be one of something else."""
    return float(values[mask].mean()) if mask.any() else float("nan")


def _minus(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """A difference; of a loss that diverged before and after nobody knows it."""
    with np.errstate(invalid="ignore"):
        return np.asarray(values - others)
