"""How often a domain may be gone through, what happens when it is used up, and the warnings on the way.

D domains.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from opmix_dist.data.allocation import TOLERANCE
from opmix_dist.errors import UserError

log = logging.getLogger(__name__)

OnExhausted = Literal["stop", "renormalize"]

# Share of a cap at which its user is told; time enough to prepare more data.
NEARLY = 0.9


class UsedUpError(UserError):
    """``max_epochs`` allows no further batch. Position and weights decide it, so all ranks raise it alike."""


class EpochCaps:
    """Caps on the samples that may be drawn of each domain.

    Args:
        names: [D].
        totals: samples of each domain, int64 [D].
        max_epochs: name to epochs; what is not named has no cap.
        on_exhausted: ``stop`` or ``renormalize``, see :class:`~opmix_dist.data.sampler.MixtureSampler`.

    Raises:
        UserError: an unknown domain, or a cap that is not above 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        totals: np.ndarray,
        max_epochs: Mapping[str, float],
        *,
        on_exhausted: OnExhausted,
    ) -> None:
        if on_exhausted not in get_args(OnExhausted):
            raise UserError(f"on_exhausted is {on_exhausted!r}: give stop or renormalize")
        require_known("max_epochs", max_epochs, names)
        for name, epochs in max_epochs.items():
            if not epochs > 0:
                raise UserError(f"max_epochs: {name} is {epochs}: give a number > 0, or weight 0")
        epochs_of = np.array([max_epochs.get(name, math.inf) for name in names], dtype=np.float64)
        self.names, self.totals, self.on_exhausted = tuple(names), totals, on_exhausted
        self.samples = np.floor(epochs_of * totals + TOLERANCE)  # float64 [D], inf without a cap
        self._told: set[tuple[str, str]] = set()
        self._quiet = False

    def extended(
        self, names: Sequence[str], totals: np.ndarray, max_epochs: Mapping[str, float]
    ) -> EpochCaps:
        """These caps, and those of domains [D'] that are appended."""
        more = EpochCaps(names, totals, max_epochs, on_exhausted=self.on_exhausted)
        other = copy.copy(self)
        other.names, other.totals = self.names + more.names, np.append(self.totals, more.totals)
        other.samples = np.append(self.samples, more.samples)
        return other

    def quiet(self) -> EpochCaps:
        """The same caps, without warnings."""
        other = copy.copy(self)
        other._quiet = True
        return other

    def exhausted(self, drawn: np.ndarray) -> np.ndarray:
        """The domains, bool [D], that the next batch leaves out whatever its counts."""
        if self.on_exhausted == "stop":
            return np.zeros(len(self.names), dtype=np.bool_)
        return self.samples - drawn < 1

    def over(self, drawn: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The domains, bool [D], that a batch which leads to ``drawn`` [D] has to leave out.

        One of weight 0, that was owed the rest of a sample, is left out in any case.

        Raises:
            UserError: one of them has a weight, and the run is to stop then.
        """
        over = drawn > self.samples
        if self.on_exhausted == "stop" and (over & (weights > 0)).any():
            raise self.used_up(over & (weights > 0))
        return over

    def used_up(self, which: np.ndarray, attribute: str = "") -> UsedUpError:
        """What stops the run: the first domain in ``which``, bool [D]."""
        i = int(which.argmax())
        return UsedUpError(
            f"domain {self.names[i]}{attribute} is used up: max_epochs allows {int(self.samples[i])} samples "
            f"of its {self.totals[i]}; lower its weight or raise its max_epochs"
        )

    def tell(self, before: np.ndarray, drawn: np.ndarray, left_out: np.ndarray) -> None:
        """Warn, once per domain and event, of what the batch from ``before`` to ``drawn`` begins; [D] each.

        Args:
            left_out: domains with a weight that the batch had to leave out, bool [D].
        """
        if self._quiet:
            return
        for i in self._untold("repeat", (drawn > self.totals) & (before <= self.totals)):
            log.warning("domain %s begins to repeat: all its samples were drawn once", self.names[i])
        stops, threshold = self.on_exhausted == "stop", NEARLY * self.samples
        reached = left_out | ((drawn == self.samples) & (before < self.samples))
        near = (drawn >= threshold) & (before < threshold) & ~reached
        then = "the run stops" if stops else "it leaves the mixture and the other weights grow"
        for i in self._untold("near", near):
            log.warning("domain %s has drawn %s: %s when they are used up", *self._use(i, drawn), then)
        then = "the next batch with it stops the run" if stops else then
        for i in self._untold("reached", reached):
            log.warning("domain %s is used up, at %s: %s", *self._use(i, drawn), then)

    def _use(self, i: int, drawn: np.ndarray) -> tuple[str, str]:
        return self.names[i], f"{drawn[i]} of the {int(self.samples[i])} samples that its max_epochs allows"

    def _untold(self, event: str, which: np.ndarray) -> list[int]:
        """Indices of the domains in ``which``, bool [D], whose event is new; it is not from now on."""
        news = [i for i in np.flatnonzero(which).tolist() if (event, self.names[i]) not in self._told]
        self._told.update((event, self.names[i]) for i in news)
        return news


def require_known(key: str, given: Iterable[str], known: Collection[str]) -> None:
    """UserError when one of the names ``given`` under a key is not ``known``."""
    unknown = set(given).difference(known)
    if unknown:
        raise UserError(f"{key}: {min(unknown)!r} is none of the {len(known)} domains: mend it or prepare it")
