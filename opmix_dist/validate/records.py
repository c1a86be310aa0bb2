"""What a validation leaves in its folder; everything that is read back passes through these models.

Each real run and each comparison is one small file, named by a digest of all that it depends on: a validation
that was killed, or is called with other settings, uses what is still true and does the rest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from opmix_dist.exchange.schemas import Finite, Mixture, Name, PhaseCost, Record
from opmix_dist.pool.calibration import Calibration

Losses = dict[Name, Finite]
"""By domain, nats per token."""


def digest(*parts: Any) -> str:
    """Name of what depends on ``parts``, which JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class RealRun(Record):
    """runs/KEY.json: the model was trained on one mixture; its parameters are in models/KEY, until they are
    compared."""

    mixture: Mixture
    seed: int
    steps: int = Field(ge=1)
    tokens: int = Field(ge=1)
    losses: list[Finite]
    """Training loss of each step, nats per token."""
    seconds: float = Field(ge=0)
    flops: float = Field(ge=0)


class Comparison(Record):
    """compared/KEY.json: a real run's model beside one simulated model, on the same N held-out samples."""

    real: list[Finite]
    """Sums over each sample's targets [N], nats."""
    simulated: list[Finite]
    divergence: list[Finite] | None
    """KL(real || simulated) of the token distributions, summed over each sample's targets [N], nats."""
    seconds: float = Field(ge=0)
    flops: float = Field(ge=0)

    @model_validator(mode="after")
    def _one_set_of_samples(self) -> Comparison:
        if len({len(self.real), len(self.simulated), len(self.divergence or self.real)}) != 1:
            raise ValueError("real, simulated and divergence must have an entry for each sample")
        return self


class PointResult(Record):
    """One simulated model of each simulator, and the real run on its mixture."""

    name: Name
    kind: Literal["design", "proposal", "component", "average"]
    u: dict[Name, Finite]
    x: Mixture
    real: Losses
    """Mean over seeds."""
    simulated: dict[Name, Losses]
    """By simulator."""
    divergence: dict[Name, Losses]
    """KL(real || simulated) by simulator and domain, nats per token."""


class SimulatorResult(Record):
    """How one way to simulate compares with real training, over the mixtures tried."""

    name: Name
    about: str
    gap: Losses
    """Mean of simulated minus real loss."""
    largest_gap: Losses
    """The largest absolute gap."""
    spearman: dict[Name, Finite | None]
    """Rank correlation of simulated and real losses over mixtures; None where one of them is constant."""
    spearman_objective: Finite | None
    slope: dict[Name, Finite | None]
    """Of real changes from the mean regressed on simulated ones: above 1, differences are compressed."""
    mean_gap: Finite
    """Of the mean over domains."""
    regret: Finite
    """Real objective of the mixture that this simulator finds best, minus the least of all tried, nats."""
    divergence: Finite | None
    """Mean KL(real || simulated) over mixtures and domains, nats per token."""


class CalibrationResult(Record):
    """A correction of simulated losses, fitted to all mixtures, and how it does on mixtures left out."""

    calibration: Calibration
    error: Finite
    """Root mean square of corrected minus real loss over domains and mixtures, each left out, nats."""
    difference_error: Finite
    """The same of the differences from `old`, which are what a search goes by."""
    spearman_objective: Finite | None
    regret: Finite


class Sources(Record):
    """Where the gap comes from: means over mixtures and domains of simulated minus real loss, nats."""

    gap: Finite
    lora: Finite | None
    """Probes minus full-parameter deltas of the same components, through the same u."""
    averaging: Finite | None
    """Full-parameter deltas minus real: what interpolating between components does."""
    at_components: Finite | None
    """Gap of the probes where nothing is averaged: u is one component."""
    bonus: dict[Name, Finite]
    """By simulator: what `old`'s mixture gains through averages of the domains' probes over `old` alone; of
    real training, the mixture is one and the same."""
    bonus_full: dict[Name, Finite]
    """The same by averages, of full-parameter deltas; empty without them."""
    noise: Finite | None
    """Standard deviation of a real run's mean loss over seeds, None of one seed."""


class Validation(Record):
    """validation.json."""

    search: Name
    domains: list[Name]
    components: list[Name]
    objective: str
    steps: int
    tokens: int
    """Of a real run."""
    probe_tokens: int
    start: Literal["snapshot", "checkpoint"]
    seeds: list[int]
    samples: int
    """Held-out samples."""
    snapshot: Losses
    points: list[PointResult]
    mixtures: int
    """Among the points."""
    simulators: list[SimulatorResult]
    proposal_regret: Finite
    """Real objective at the proposal minus the least of all mixtures tried, nats."""
    proposal_rank: int
    """1: no mixture tried is better."""
    proposal_gain: Finite
    """Real objective at `old` minus that at the proposal, nats: above 0, moving has helped."""
    simulated_gain: Finite
    sources: Sources
    calibrations: list[CalibrationResult]
    chosen: str
    """The calibration that is written."""
    costs: dict[str, PhaseCost]


class ValidationDir:
    """Paths; opening it reads nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result_file = path / "validation.json"
        self.calibration_file = path / "calibration.json"
        self.page_file = path / "validate.html"
        self.models = path / "models"
        self.sweep = path / "sweep"

    def run_file(self, key: str) -> Path:
        return self.path / "runs" / f"{key}.json"

    def model(self, key: str) -> Path:
        return self.models / key

    def comparison_file(self, key: str) -> Path:
        return self.path / "compared" / f"{key}.json"
