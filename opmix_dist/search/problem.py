"""What a proposal minimises and must respect: one description for every law and for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from scipy.special import rel_entr

from opmix_dist.search.simplex import require_simplex

Objective = Literal["mean", "relative", "worst", "worst_change"]
"""mean: sum_i omega_i L_i. relative: sum_i omega_i L_i / reference_i, the log-perplexities relative to the
current model's. worst: max_i L_i. worst_change: max_i (L_i - reference_i). Where the worst counts, omega only
says which losses take part: those whose omega is above 0."""

Expansion = Literal["effective", "paper"]

TOLERANCE = 1e-6
"""A bound that is passed by less (nats, or shares) is met: what the solvers resolve."""


@dataclass(frozen=True)
class Problem:
    """min over u on the simplex of objective(L(u)) + kl KL(x || prior), x = C^T u, subject to

        floors <= x <= caps    and    L_i(u) <= reference_i + max_increase_i.

    The objective ``mean`` with its KL term is OP-Mix's (arXiv 2605.15220), constants of the laws included.

    A domain of prior 0 has an infinite KL wherever its share is above 0: components that contain it get no
    weight. With kl = 0 the prior plays no part.

    composition: C [K, X]; prior: [X], a mixture; omega: weights of the D losses [D], not negative, None is
    1 / D; reference: losses of the current model [D], nats per token; max_increase: [D], nats, inf where a
    loss may rise freely; floors, caps: [X]; domains, losses: names of the X domains and the D losses, for
    messages.
    expansion: ``paper`` for ``paper_composition``; expanded: [K, X], C as x = C^T u takes it.

    Raises ValueError where shapes or values are wrong, an objective or a bound needs a reference that is
    not there, or the prior rules out every component.
    """

    composition: np.ndarray
    prior: np.ndarray
    kl: float = 0.05
    objective: Objective = "mean"
    omega: np.ndarray | None = None
    reference: np.ndarray | None = None
    max_increase: np.ndarray | None = None
    floors: np.ndarray | None = None
    caps: np.ndarray | None = None
    expansion: Expansion = "effective"
    domains: Sequence[str] = ()
    losses: Sequence[str] = ()
    expanded: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Arrays become float64."""
        _require_choice("objective", self.objective, get_args(Objective))
        _require_choice("expansion", self.expansion, get_args(Expansion))
        composition = np.asarray(self.composition, dtype=np.float64)
        if composition.ndim != 2 or not composition.size:
            raise ValueError(f"the composition must be [K, X], not {composition.shape}")
        composition = require_simplex(composition, "each row of the composition")
        self._set("composition", composition)
        self._set("expanded", paper_composition(composition) if self.expansion == "paper" else composition)
        if not (np.isfinite(self.kl) and self.kl >= 0):
            raise ValueError(f"kl must be finite and not negative, got {self.kl}")
        self._check_domains(composition.shape[1])
        self._check_losses()
        self._check_prior()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_domains(self, count: int) -> None:
        self._set("domains", tuple(self.domains) or tuple(f"domain {j}" for j in range(count)))
        if len(self.domains) != count:
            raise ValueError(f"the composition has {count} domains, but {len(self.domains)} are named")
        prior = np.asarray(self.prior, dtype=np.float64)
        if prior.shape != (count,):
            raise ValueError(f"the prior must have {count} entries, got an array {prior.shape}")
        self._set("prior", require_simplex(prior, "the prior"))
        for what in ("floors", "caps"):
            values = getattr(self, what)
            if values is not None:
                self._set(what, _checked(values, what, self.domains))
        if self.floors is not None and not np.isfinite(self.floors).all():
            raise ValueError(f"floors must be finite, got {self.floors.tolist()}")

    def _check_losses(self) -> None:
        names = tuple(self.losses)
        given = [v for v in (self.omega, self.reference, self.max_increase) if v is not None]
        if not names and given:
            names = tuple(f"loss {i}" for i in range(np.size(given[0])))
        for what in ("omega", "reference", "max_increase"):
            values = getattr(self, what)
            if values is not None:
                self._set(what, _checked(values, what, names))
        if self.omega is not None and not (np.isfinite(self.omega).all() and self.omega.any()):
            raise ValueError(f"omega must be finite and one of it above 0, got {self.omega.tolist()}")
        if self.reference is not None:
            bad = np.flatnonzero(~(np.isfinite(self.reference) & (self.reference > 0)))
            if bad.size:
                value = self.reference[bad[0]]
                raise ValueError(f"reference of {names[bad[0]]} is {value}: it must be finite and above 0")
        elif self.objective in ("relative", "worst_change"):
            raise ValueError(f"the objective {self.objective} needs the current model's losses as reference")
        elif self.max_increase is not None and np.isfinite(self.max_increase).any():
            raise ValueError("max_increase needs the current model's losses as reference")

    def _check_prior(self) -> None:
        if self.kl == 0 or (self.prior > 0).all():
            return
        missing = [name for name, share in zip(self.domains, self.prior, strict=True) if share == 0]
        if not self.usable.any():
            raise ValueError(
                f"the prior is 0 for {', '.join(missing)}, and every component contains one of them: "
                "give them a prior above 0, or set kl to 0"
            )
        for name, share, floor in zip(self.domains, self.prior, self.lowest, strict=True):
            if share == 0 and floor > 0:
                raise ValueError(
                    f"{name} has a floor of {floor:.4g} and a prior of 0, which gives it nothing: "
                    "give it a prior above 0, or set kl to 0"
                )

    @property
    def usable(self) -> np.ndarray:
        """Components [K] bool whose weight may be above 0: with kl > 0, those without a domain of prior 0."""
        if self.kl == 0:
            return np.full(len(self.expanded), True)
        return ~(self.expanded[:, self.prior == 0] > 0).any(axis=1)

    @property
    def lowest(self) -> np.ndarray:
        """Floors [X], 0 where there is none."""
        return np.zeros(len(self.prior)) if self.floors is None else self.floors

    @property
    def highest(self) -> np.ndarray:
        """Caps [X], inf where there is none."""
        return np.full(len(self.prior), np.inf) if self.caps is None else self.caps

    @property
    def bounds_losses(self) -> bool:
        """Whether any loss is bounded."""
        return self.max_increase is not None and bool(np.isfinite(self.max_increase).any())

    def ceiling(self, num_losses: int) -> np.ndarray:
        """Highest value that each loss may have [D], nats per token; inf where it may rise freely."""
        if self.reference is None or self.max_increase is None:
            return np.full(num_losses, np.inf)
        return self.reference + self.max_increase

    def require_losses(self, num_losses: int) -> None:
        """ValueError where a law, or a measurement, has another number of losses than this problem."""
        for what in ("losses", "omega", "reference", "max_increase"):
            values = getattr(self, what)
            if values is None or (what == "losses" and not values):
                continue
            if len(values) != num_losses:
                raise ValueError(f"{what} must have {num_losses} entries as the laws have, got {len(values)}")

    def value(self, losses: np.ndarray) -> np.ndarray:
        """The objective without its KL term [...], of losses [..., D]: what a gain is measured in."""
        losses = np.asarray(losses, dtype=np.float64)
        if self.objective in ("mean", "relative"):
            return losses @ self.rates(losses.shape[-1])
        return (losses - self.offsets(losses.shape[-1])).max(axis=-1)

    def slope(self, losses: np.ndarray) -> np.ndarray:
        """d value / d L_i [D] at losses [D]; at a tie of the worst, of one of them."""
        count = len(losses)
        if self.objective in ("mean", "relative"):
            return self.rates(count)
        return np.eye(count)[(losses - self.offsets(count)).argmax()]

    def rates(self, num_losses: int) -> np.ndarray:
        """What a nat of each loss adds to ``mean`` or ``relative`` [D]."""
        omega = np.full(num_losses, 1 / num_losses) if self.omega is None else self.omega
        if self.objective == "relative":
            assert self.reference is not None
            return omega / self.reference
        return omega

    def offsets(self, num_losses: int) -> np.ndarray:
        """What ``worst`` and ``worst_change`` take off each loss [D]; inf for a loss that does not count."""
        counts = np.full(num_losses, True) if self.omega is None else self.omega > 0
        zero = self.reference if self.objective == "worst_change" else None
        return np.where(counts, np.zeros(num_losses) if zero is None else zero, np.inf)

    def divergence(self, u: np.ndarray) -> float:
        """KL(C^T u || prior) in nats; inf where the prior is 0 and x is not."""
        return float(rel_entr(u @ self.expanded, self.prior).sum())

    def total(self, losses: np.ndarray, u: np.ndarray) -> float:
        """value + kl KL(x || prior) of losses [D] at u [K]."""
        return float(self.totals(losses[None], u[None])[0])

    def totals(self, losses: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """value + kl KL(x || prior) [N] of losses [N, D] at U [N, K]."""
        value = self.value(losses)
        if self.kl == 0:
            return value
        return value + self.kl * rel_entr(candidates @ self.expanded, self.prior).sum(axis=-1)

    def excesses(self, losses: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """How far caps, floors and loss bounds are passed [N, X + X + D], of losses [N, D] at U [N, K]."""
        over = np.maximum(losses - self.ceiling(losses.shape[-1]), 0)
        return np.concatenate([self.share_excesses(candidates), over], axis=-1)

    def share_excesses(self, candidates: np.ndarray) -> np.ndarray:
        """How far caps and floors are passed at U [N, K]: [N, X + X]."""
        mixtures = candidates @ self.expanded
        return np.maximum(np.concatenate([mixtures - self.highest, self.lowest - mixtures], axis=-1), 0)

    def violations(self, losses: np.ndarray, u: np.ndarray, tolerance: float = TOLERANCE) -> list[str]:
        """Each bound that is passed by more than the tolerance, in words with the amount; empty: feasible."""
        excess = self.excesses(losses[None], u[None])[0]
        return self.in_words(excess, tolerance)

    def in_words(self, excess: np.ndarray, tolerance: float = TOLERANCE) -> list[str]:
        """``excesses`` [X + X + D] that are above the tolerance, one phrase each."""
        count = len(self.domains)
        names = self.losses or tuple(f"loss {i}" for i in range(len(excess) - 2 * count))
        phrases = []
        for position in np.flatnonzero(excess > tolerance):
            which, amount = position % count, f"{excess[position]:.4g}"
            if position < count:
                bound = f"cap of {self.domains[which]} ({self.highest[which]:.4g})"
                phrases.append(f"{bound} is exceeded by {amount}")
            elif position < 2 * count:
                bound = f"floor of {self.domains[which]} ({self.lowest[which]:.4g})"
                phrases.append(f"{bound} is missed by {amount}")
            else:
                assert self.max_increase is not None
                which = position - 2 * count
                allowed = self.max_increase[which]
                rise = f"loss of {names[which]} rises by {excess[position] + allowed:.4g}"
                phrases.append(f"{rise}, max_increase allows {allowed:.4g}")
        return phrases


def paper_composition(composition: np.ndarray) -> np.ndarray:
    """C [K, X] as the authors' pretraining code expands u: a domain's probe counts as the pure domain.

    Row 0 is ``old`` and stays. Row k was trained on s d + (1 - s) old for some domain d and share s; it
    becomes the one-hot row of d. Two probes for one new domain stay as they are: there the authors, too,
    work with the effective shares.

    Raises:
        ValueError: a row is not of that form.
    """
    if len(composition) == 2:
        return composition
    old, excess = composition[0], composition[1:] - composition[0]  # s (onehot(d) - old)
    pure = np.eye(len(old))[excess.argmax(axis=1)]
    pure = np.where(np.abs(excess).max(axis=1, keepdims=True) < 1e-9, composition[1:], pure)  # old itself
    towards = pure - old
    share = (excess * towards).sum(axis=1) / np.maximum((towards**2).sum(axis=1), 1e-18)
    wrong = np.flatnonzero(np.abs(excess - share[:, None] * towards).max(axis=1) > 1e-6)
    if wrong.size:
        raise ValueError(
            f"expansion 'paper' needs components that mix one domain with the old mixture, and component "
            f"{wrong[0] + 1} does not: use 'effective'"
        )
    return np.vstack([old, pure])


def _require_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value}")


def _checked(values: np.ndarray, what: str, names: Sequence[str]) -> np.ndarray:
    """Float64 [len(names)], not negative, not nan; a single number holds for each name."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0:
        values = np.full(len(names), float(values))
    if values.shape != (len(names),):
        raise ValueError(f"{what} must have {len(names)} entries, got an array {values.shape}")
    bad = np.flatnonzero(~(values >= 0))
    if bad.size:
        raise ValueError(f"{what} must not be negative, got {values[bad[0]]} for {names[bad[0]]}")
    return values
