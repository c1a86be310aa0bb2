"""What every family of laws has in common: what was measured, what a law answers, how well it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import cvxpy as cp
import numpy as np

from opmix_dist.search.simplex import require_simplex


@dataclass(frozen=True)
class Observations:
    """Losses at candidates, as a search or somebody's table of runs holds them.

    candidates: U [M, K], rows on the simplex; losses: [M, D], nats per token, above 0.
    stderr: standard error of each loss [M, D], or None: all count the same.
    gradients: dL_i / du_k [M, D, K], nan in the rows of candidates whose gradient was not taken; None: of
        none. Only their differences between components matter, as u stays on the simplex.
    composition: C [K, X], the data mixture of each component, rows sum to 1. None: components are domains.
    names: of the D losses; components: of the K components; domains: of the X domains of the composition,
        None: components are domains. For messages, and to find a loss's own domain by its name.
    """

    candidates: np.ndarray
    losses: np.ndarray
    stderr: np.ndarray | None = None
    gradients: np.ndarray | None = None
    composition: np.ndarray | None = None
    names: Sequence[str] = ()
    components: Sequence[str] = ()
    domains: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Float64 throughout; ValueError that names the row and the loss, where something is not as above."""
        candidates, losses = (np.asarray(a, dtype=np.float64) for a in (self.candidates, self.losses))
        if candidates.ndim != 2 or losses.ndim != 2 or len(candidates) != len(losses) or not losses.size:
            raise ValueError(f"need U [M, K] and losses [M, D], got {candidates.shape} and {losses.shape}")
        components = candidates.shape[1]
        names = tuple(self.names) or tuple(f"domain {i}" for i in range(losses.shape[1]))
        labels = tuple(self.components) or tuple(f"component {k}" for k in range(components))
        for what, given, count in (("losses", names, losses.shape[1]), ("candidates", labels, components)):
            if len(given) != count:
                raise ValueError(f"{what} have {count} columns, but {len(given)} are named")
        bad = np.argwhere(~(np.isfinite(losses) & (losses > 0)))
        if bad.size:
            row, column = bad[0]
            value = losses[row, column]
            raise ValueError(
                f"loss of {names[column]} in row {row} is {value}: it must be finite and above 0"
            )
        set_field = object.__setattr__
        set_field(self, "candidates", require_simplex(candidates, "each row of the candidates"))
        set_field(self, "losses", losses)
        set_field(self, "names", names)
        set_field(self, "components", labels)
        if self.stderr is not None:
            stderr = _shaped(self.stderr, losses.shape, "stderr")
            if not (np.isfinite(stderr) & (stderr >= 0)).all():
                raise ValueError("standard errors must be finite and not negative")
            set_field(self, "stderr", stderr)
        if self.gradients is not None:
            set_field(self, "gradients", _shaped(self.gradients, (*losses.shape, components), "gradients"))
        if self.composition is not None:
            composition = np.asarray(self.composition, dtype=np.float64)
            if composition.ndim != 2 or len(composition) != components:
                raise ValueError(f"the composition must be [{components}, X], not {composition.shape}")
            set_field(self, "composition", require_simplex(composition, "each row of the composition"))
        if self.domains and len(self.domains) != self.mixtures.shape[1]:
            raise ValueError(
                f"mixtures have {self.mixtures.shape[1]} columns, but {len(self.domains)} are named"
            )

    @property
    def mixtures(self) -> np.ndarray:
        """X [M, X] = U C: what each candidate stands for."""
        return self.candidates if self.composition is None else self.candidates @ self.composition

    @property
    def mixture_domains(self) -> Sequence[str]:
        """Names of the X columns of ``mixtures``; empty where they are not known."""
        return self.domains or (self.components if self.composition is None else ())

    @property
    def weights(self) -> np.ndarray:
        """Of each loss in a fit [M, D], with mean 1 for each of the D losses: 1 / stderr^2.

        A standard error counts as half of the median at least. No law is exact, so below some error it is the
        law that decides how well a point can be met, and a point that claims more must not decide alone: none
        weighs more than four times a typical one, nor does an error of 0 divide by 0.
        """
        if self.stderr is None:
            return np.ones_like(self.losses)
        least = np.median(self.stderr, axis=0) / 2
        positive = np.where(self.stderr > 0, self.stderr, np.inf).min(axis=0)
        least = np.where(least > 0, least, np.where(np.isfinite(positive), positive / 2, 1.0))
        precision = np.maximum(self.stderr, least) ** -2
        weights: np.ndarray = precision / precision.mean(axis=0)
        return weights

    def take(self, rows: np.ndarray | Sequence[int]) -> Observations:
        """Some of the candidates, by number or by mask."""
        rows = np.asarray(rows)

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        return Observations(
            self.candidates[rows],
            self.losses[rows],
            part(self.stderr),
            part(self.gradients),
            self.composition,
            self.names,
            self.components,
            self.domains,
        )


def _shaped(values: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != shape:
        raise ValueError(f"{what} must be {shape}, not {values.shape}")
    return values


@runtime_checkable
class Law(Protocol):
    """From coefficients u over K components to D losses.

    A law may hold a term that is about averaging and not about data: the same mixture x can be reached
    through different u, and the more probes u mixes, the more their noise averages out. ``averaging=False``
    leaves that term at its value for a single probe, where nothing is averaged, so that a gain of averaging
    is not taken for one of the mixture. Laws without such a term ignore the argument.
    """

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        ...


@runtime_checkable
class SmoothLaw(Law, Protocol):
    """A law with slopes, which those of steps (trees) do not have."""

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        ...


@runtime_checkable
class ConvexLaw(SmoothLaw, Protocol):
    """A law that is convex in u and can say so to cvxpy, without its averaging term."""

    def expression(self, u: cp.Expression) -> cp.Expression:
        """The D losses as one convex cvxpy expression."""
        ...


@dataclass(frozen=True)
class LawFit:
    """A law and how well it holds, for each of D losses.

    family: its name in ``FAMILIES``; fitter: that family in the settings of this fit, for refits.
    left_out: prediction of each candidate by a law that was fitted to the others [M, D] (in folds where
        candidates are many); nan where that is impossible. The quality below that matters comes from it.
    r2, spearman: predicted against measured losses of the candidates that were fitted [D], nan where the
        losses are constant.
    loo_error: root mean square of left_out - measured, nats [D].
    calibration: slope of measured losses regressed on left_out [D]: 1 is calibrated, below 1 the law
        exaggerates differences; nan where the losses are constant.
    comparison: cross-validated root mean square error [D] by family, where several were compared.
    """

    law: Law
    family: str
    fitter: Family
    observations: Observations
    predicted: np.ndarray
    left_out: np.ndarray
    r2: np.ndarray
    spearman: np.ndarray
    loo_error: np.ndarray
    calibration: np.ndarray
    warnings: tuple[str, ...] = ()
    comparison: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def measured(self) -> np.ndarray:
        return self.observations.losses


class Family(Protocol):
    """How a family fits. Instances hold settings; ``FAMILIES`` in ``laws/__init__.py`` names them."""

    name: str
    most_folds: int
    """Up to so many candidates each is left out by itself, as refits are cheap; above, in ten folds."""

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        ...

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits near ``law``, for cross-validation and the bootstrap: all at once where the family can.

        Args:
            losses: R sets of losses at the same candidates [R, M, D].
            weights: of the candidates in each refit [R, M]; 0 leaves one out.
            law: of all candidates, a start.
        """
        ...
