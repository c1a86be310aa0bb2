"""What the files of a run directory hold. Everything read from disk passes through these models."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""A domain or component: it becomes a folder name, so no separators and no leading dot."""


def _on_simplex(weights: dict[str, float]) -> dict[str, float]:
    if any(not math.isfinite(w) or w < 0 for w in weights.values()) or abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"weights must be finite, not negative and sum to 1, got {weights}")
    return weights


Mixture = Annotated[dict[Name, float], AfterValidator(_on_simplex)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MixtureRecord(Record):
    """A line of mixtures.jsonl: the decision of a policy at a step boundary. Steps count from 0."""

    version: int = Field(ge=0)
    step: int = Field(ge=0)
    weights: Mixture
    why: str
    search: str | None = None
    changed: bool = True
    requested_step: int | None = None


class SearchStage(StrEnum):
    """Where a search stands. `requested` (request.json exists) and `applied` (a line in mixtures.jsonl names
    it) are the trainer's to tell; the rest is written by the pool."""

    PROBING = "probing"
    EVALUATING = "evaluating"
    FITTING = "fitting"
    PROPOSED = "proposed"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (SearchStage.PROPOSED, SearchStage.FAILED)


class SearchStatus(Record):
    """status.json: the pool's sign of life. ``beat`` grows with every piece of work that was done."""

    stage: SearchStage
    done: int = Field(0, ge=0)
    total: int = Field(0, ge=0)
    beat: int = Field(0, ge=0)
    reason: str = ""


class SearchRequest(Record):
    """request.json: all that a search needs besides the run's configuration."""

    search: Name
    step: int = Field(ge=0)
    snapshot: str
    """Folder of the model within the run directory."""
    is_checkpoint: bool = False
    """``snapshot`` is a Hugging Face folder or hub id instead: a search alone writes no copy of the model."""
    new_domains: list[Name] = Field(default_factory=list)
    """Domains that join, with a probe each: of one, the two probes have 10% and 90%; none: a probe for each
    domain."""
    components: list[Name]
    domains: list[Name]
    composition: list[list[Finite]]
    """C [components, domains]; rows sum to 1."""
    current: Mixture
    prior: Mixture
    caps: list[Finite] | None = None
    """Largest share of each domain [domains], as set and from its tokens and the tokens to train."""
    floors: list[Finite] | None = None
    """Least share of each domain [domains]."""
    base_lr: float = Field(gt=0)
    seed: int = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _was_one(cls, given: object) -> object:
        """Searches that were requested when one domain at a time could join."""
        if not isinstance(given, dict) or "new_domain" not in given:
            return given
        one = given["new_domain"]
        rest = {key: value for key, value in given.items() if key != "new_domain"}
        return rest | {"new_domains": [] if one is None else [one]}

    @model_validator(mode="after")
    def _shapes(self) -> SearchRequest:
        rows, columns = len(self.components), len(self.domains)
        if len(self.composition) != rows or any(len(row) != columns for row in self.composition):
            raise ValueError(f"composition must be [{rows} components, {columns} domains]")
        for what, shares in (("caps", self.caps), ("floors", self.floors)):
            if shares is not None and len(shares) != columns:
                raise ValueError(f"{what} must have {columns} entries")
        if len({*self.domains}) != columns or len({*self.components}) != rows:
            raise ValueError("components and domains must not repeat")
        return self


class EvaluationPlan(Record):
    """evaluation.json: how the candidates of a search are evaluated. Each of these changes last digits, so
    they are decided once, and a search that goes on keeps to them."""

    method: Literal["lowrank", "merge"]
    joint: int = Field(ge=1)
    """Candidates in a pass; 1 where their deltas are merged."""
    batch_size: int = Field(ge=1)
    """Samples in a pass, of each candidate."""
    gradient_batch_size: int | None = Field(None, ge=1)
    """Samples in a pass that takes gradients; None as long as none are asked for."""
    dtype: Literal["float32", "bfloat16"]
    kernels: bool
    decided_for: dict[str, str | int]
    """Settings, device and sizes; for others it is decided anew."""


class PhaseCost(Record):
    """What a phase cost. ``device_seconds`` is wall time times the ranks that were busy with it."""

    seconds: float = 0.0
    device_seconds: float = 0.0
    flops: float = 0.0
    """Of the model; what activation checkpointing computes again is not among them."""
    tokens: int = 0
    possible_flops: float | None = None
    """What the devices can do at most in ``device_seconds``; None where their peak is not known."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over possible ones; None where there are none of either, or they are not known."""
        return self.flops / self.possible_flops if self.flops and self.possible_flops else None


class Interval(Record):
    low: Finite
    high: Finite


class Gain(Record):
    """What moving gains over staying, in the objective without its KL term, in its unit; above 0 is better.
    Both mix as many probes: averaging them lowers losses, whatever the mixture."""

    predicted: Finite | None
    """By the laws, None where there are none."""
    interval: Interval | None
    """Of the predicted gain, from laws that were fitted to resampled losses."""
    measured: Finite
    """Between the simulated models, on the same held-out samples."""
    stderr: Finite
    """Of the measured gain, paired by sample."""
    optimism: Finite | None = None
    """By how much the measured gain is too high on average, as the proposal was made on the same samples: the
    decision takes it off. None of searches without laws, or with gradients."""
    averaging: Finite | None = None
    """What averaging alone gains, and is no part of the above: the measured gain of staying with as many
    probes as the proposal mixes over staying with `old` alone. None where only one u gives a mixture."""


class Decision(Record):
    """Whether to move to the proposal, and why."""

    move: bool
    reason: str


class Proposal(Record):
    """proposal.json: the mixture that a search returns, and what it expects of it."""

    search: Name
    step: int = Field(ge=0)
    coefficients: dict[Name, Finite]
    weights: Mixture
    current: Mixture
    predicted: dict[Name, Finite]
    """Loss per domain that the laws predict at the proposal; without laws, what was measured there. Here and
    below nats per token, but for ``error_rates``."""
    simulated: dict[Name, Finite]
    """Loss per domain of the simulated model at the proposal, measured on the held-out tokens."""
    snapshot: dict[Name, Finite]
    """Loss per domain of the snapshot itself (no adapter), on the same tokens."""
    predicted_current: dict[Name, Finite]
    """Loss per domain that the laws predict for staying on the current mixture; without laws, as measured."""
    simulated_current: dict[Name, Finite]
    """Loss per domain of the simulated model that stays, measured like ``simulated``."""
    objective: Finite
    kl: Finite | None
    """KL(x || prior); None where it is infinite (a prior of 0 and no KL term)."""
    horizon_tokens: int
    """Training tokens that each probe read: how far ahead the prediction looks."""
    costs: dict[str, PhaseCost]
    error_rates: list[Name] = Field(default_factory=list)
    """Domains whose "losses" are error rates of replies to tasks, 0..1 (``search.metric: tasks``)."""
    objective_name: str = "mean"
    """As ``search.proposal.objective`` has them."""
    intervals: dict[Name, Interval] = Field(default_factory=dict)
    """Of each weight, from resampled laws; empty where there are none."""
    confidence: float | None = None
    """Of all intervals."""
    stay: dict[Name, Finite] = Field(default_factory=dict)
    """Coefficients that stand for staying: the current mixture with as many probes as the proposal mixes."""
    gain: Gain | None = None
    decision: Decision | None = None
    rounds: int = 1
    """Times that candidates were chosen and evaluated."""
    why_ended: str = ""
    """Why there were no more."""
    warnings: list[str] = Field(default_factory=list)

    @property
    def chosen(self) -> dict[str, float]:
        """The mixture that the decision is for: the proposal, or the current one where it stays."""
        return self.weights if self.decision is None or self.decision.move else self.current

    @model_validator(mode="after")
    def _same_domains(self) -> Proposal:
        for name in (
            "current",
            "predicted",
            "predicted_current",
            "simulated",
            "simulated_current",
            "snapshot",
        ):
            if getattr(self, name).keys() != self.weights.keys():
                raise ValueError(f"{name} must name the same domains as weights")
        if not {*self.error_rates} <= self.weights.keys():
            raise ValueError("error_rates must be among the domains of weights")
        return self


class Fit(Record):
    """fit.json: the laws, and how well they hold for each domain."""

    domains: list[Name]
    components: list[Name]
    family: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    """By name, as nested lists with an entry for each domain, where the family has a few of them: for
    log_linear, L_i(u) = exp(log_c_i) + exp(t_i . u)."""
    r2: list[float | None]
    spearman: list[float | None]
    loo_error: list[float | None]
    """Root mean square error of predicting a candidate from the others, in the domain's unit."""
    calibration: list[float | None]
    """Slope of measured losses over such predictions; below 1 the law exaggerates differences."""
    comparison: dict[str, list[float | None]] = Field(default_factory=dict)
    """Cross-validated root mean square error by family, where several were compared."""
    warnings: list[str] = Field(default_factory=list)


class MemoryUse(Record):
    """Bytes by kind, of the trainer rank whose peak was the highest; see docs/engines.md."""

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    activations_and_others: int
    """``peak`` without the three above. On a CPU it has Python and its libraries in it."""
    offloaded: int
    """Of parameters, gradients and optimizer, what lies in the host's memory and not in the device's."""
    peak: int
    reserved: int | None = None
    """What torch's allocator has taken of the device at most, for ``peak`` and for later."""
    measured: Literal["allocated", "resident"]
    """``peak`` is what tensors took of a GPU since the line before that has memory, or what the process took
    of the host's memory since it began."""


class TrainLine(Record):
    """A line of metrics/train.jsonl. ``step`` is the number of finished steps; losses in nats per token."""

    step: int
    loss: float
    domain_loss: dict[str, float]
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    mixture_version: int
    method: dict[str, float] = Field(default_factory=dict)
    """What the training method tells of the step, by name."""
    tokens_per_second_per_device: float | None = None
    seconds: float | None = None
    """Since the end of the step before, without evaluations, checkpoints, snapshots and searches."""
    data_seconds: float | None = None
    """Part of ``seconds`` that a rank waited for its batch; of the rank that waited longest."""
    mfu: float | None = None
    """Model FLOPs over what the devices can do; None where their peak is not known."""
    hfu: float | None = None
    """The same with what activation checkpointing computes again."""
    memory: MemoryUse | None = None
    """Every train.log_interval_steps."""


class EvalLine(Record):
    """A line of metrics/eval.jsonl: mean held-out loss per domain, nats per token, and its standard error."""

    step: int
    tokens: int
    loss: dict[str, float]
    stderr: dict[str, float]


class BadStep(Record):
    """A line of events.jsonl: a step that was not applied, and what followed. A resumed run does the same
    again, also where the reason is gone."""

    kind: Literal["nan", "spike", "gradient spike"]
    action: Literal["stop", "skip", "rollback"]
    step: int = Field(ge=0)
    """Finished steps."""
    batch: int = Field(ge=0)
    """Number of the global batch, from 0 at the start of the run."""
    reason: str
    domain_loss: dict[Name, Finite | None]
    """Of the batch, nats per token; None where it is NaN or inf."""
    at: str
    """UTC, ISO 8601."""
    checkpoint: int | None = Field(None, ge=0)
    """rollback: the step that the run went back to."""
    loader: dict[str, Any] | None = None
    """rollback: where the data go on from there."""
    domain_tokens: dict[Name, int] | None = None
    """rollback: tokens that were read by then."""

    @model_validator(mode="after")
    def _goes_somewhere(self) -> BadStep:
        if (self.action == "rollback") == (None in (self.checkpoint, self.loader, self.domain_tokens)):
            raise ValueError("checkpoint, loader and domain_tokens belong to a rollback")
        return self


class Stopped(Record):
    """stopped.json: the run was asked to stop and has done so; it goes on when it is started again."""

    step: int = Field(ge=0)
    """Finished steps."""
    checkpoint: int | None = Field(ge=0)
    """Step of the newest complete checkpoint, from which it goes on; None: from the beginning."""
    signal: str
    at: str
    """UTC, ISO 8601."""

    @property
    def text(self) -> str:
        start = "the beginning" if self.checkpoint is None else f"the checkpoint of step {self.checkpoint}"
        return f"stopped by {self.signal} after step {self.step}; started again, it goes on from {start}"


class Summary(Record):
    """summary.json: how a run ended."""

    steps: int
    tokens: int
    domain_tokens: dict[str, int]
    final_loss: dict[str, float]
    final_stderr: dict[str, float]
    final_search_loss: dict[str, float]
    """On the held-out samples that searches evaluate candidates on; those of ``final_loss`` are others."""
    mixture: dict[str, float]
    history: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Tokens that the model had read of each domain before this run began."""
    costs: dict[str, PhaseCost]
    parameters: int
    world_size: int
    versions: dict[str, Any]
