"""A correction of simulated losses, as ``opmix validate`` has found it from real runs.

For coefficients u and a domain i, with the snapshot's loss b_i and the simulated loss s_i,

    corrected_i = b_i + offset_i + slope_i (s_i - b_i) + averaging_i (1 - sum_k u_k^2).

1 - sum u^2 is 0 where one probe stands alone, and grows with the number of probes that are averaged: the
last term takes off what averaging gains by itself. The correction is relative to the snapshot, so that it
can be carried over to a later snapshot of the same run; that it holds there is not shown by anything here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import model_validator

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import read_record
from opmix_dist.exchange.schemas import Finite, Name, Record
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.search_config import InterpolationName


def mixedness(candidates: np.ndarray) -> np.ndarray:
    """1 - sum_k u_k^2 of coefficients U [..., K]: [...]."""
    mixed: np.ndarray = 1 - (candidates**2).sum(axis=-1)
    return mixed


class Calibration(Record):
    """calibration.json."""

    method: str
    offset: dict[Name, Finite]
    """Nats per token, by domain; slope and averaging have the same domains."""
    slope: dict[Name, Finite]
    averaging: dict[Name, Finite]
    mixtures: int = 0
    """Real runs that it was fitted to."""
    interpolation: InterpolationName = "linear"
    """How the losses that it corrects were simulated; it fits no others."""

    @model_validator(mode="after")
    def _same_domains(self) -> Calibration:
        if not self.offset.keys() == self.slope.keys() == self.averaging.keys():
            raise ValueError("offset, slope and averaging must name the same domains")
        return self

    def of(self, domains: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """offset, slope and averaging [D] in the order of ``domains``; UserError where one is not there."""
        for name in domains:
            if name not in self.offset:
                raise UserError(
                    f"search.calibration knows no domain {name}, only {', '.join(self.offset)}: validate a "
                    "search of these domains, or set it to null"
                )
        parts = (self.offset, self.slope, self.averaging)
        offset, slope, averaging = (np.array([part[name] for name in domains]) for part in parts)
        return offset, slope, averaging

    def losses(
        self, simulated: np.ndarray, candidates: np.ndarray, snapshot: np.ndarray, domains: Sequence[str]
    ) -> np.ndarray:
        """Corrected losses [M, D] of simulated ones [M, D] at U [M, K]; ``snapshot``: its losses [D]."""
        offset, slope, averaging = self.of(domains)
        mixed = mixedness(candidates)[:, None]  # [M, 1]
        found: np.ndarray = snapshot + offset + slope * (simulated - snapshot) + averaging * mixed
        return found

    def applied(
        self, found: Evaluations, candidates: np.ndarray, snapshot: Evaluations, domains: Sequence[str]
    ) -> Evaluations:
        """The same of what was measured: sums [M, N] of samples and gradients [M, D, K], so that paired
        errors are those of corrected losses.

        Args:
            snapshot: of the snapshot alone, one candidate, on the same samples.
        """
        offset, slope, averaging = self.of(domains)
        of_sample = found.domain_ids
        base = snapshot.sums[0]  # [N]
        constant = offset + averaging * mixedness(candidates)[:, None]  # [M, D]
        sums = base + slope[of_sample] * (found.sums - base) + constant[:, of_sample] * found.targets
        gradients = None
        if found.gradients is not None:
            of_mixing = -2 * averaging[:, None] * candidates[:, None, :]  # [M, D, K]
            gradients = slope[:, None] * found.gradients + of_mixing
        return dataclasses.replace(found, sums=sums, gradients=gradients)


def read_calibration(
    path: str | None, domains: Sequence[str], interpolation: InterpolationName
) -> Calibration | None:
    """Of ``search.calibration``; UserError where it cannot be read, knows not all ``domains``, or corrects
    what is simulated in another way."""
    if path is None:
        return None
    found = read_record(Path(path), Calibration)
    found.of(domains)
    if found.interpolation != interpolation:
        raise UserError(
            "search.calibration corrects candidates of search.candidates.interpolation "
            f"{found.interpolation}, and this search has {interpolation}: validate one of these, or set "
            "search.calibration to null"
        )
    return found
