"""The settings of a search.

Defaults are those of the OP-Mix paper (arXiv 2605.15220), where it has one, but for how 20 evaluations are
spent: benchmarks/results/search_methods.md tells why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from opmix_dist.errors import UserError
from opmix_dist.settings import Section

Share = Annotated[float, Field(ge=0, le=1)]
Rise = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]
InterpolationName = Literal["linear", "norm"]


class ProbeConfig(Section):
    steps: int = Field(5000, ge=1, description="optimiser steps of each probe (paper: 5,000 in pretraining)")
    batch_size: int = Field(32, ge=1, description="samples per probe and step")
    micro_batch_size: Count | None = Field(
        None,
        description="samples per probe in a pass, of which a step makes several; passes are dealt out to the "
        "ranks that train a probe together; null: all of batch_size",
    )
    rank: int = Field(16, ge=1, description="LoRA rank")
    alpha: int = Field(32, gt=0, description="LoRA alpha; the delta is alpha / rank * B A")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on each adapter's input")
    lr_multiplier: float = Field(2.0, gt=0, description="probe learning rate over optimizer.lr; no warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay on A and B")
    max_grad_norm: float = Field(1.0, gt=0, description="each adapter's own gradient norm to clip to")
    domain_share: float = Field(0.9, gt=0, le=1, description="share of its domain in a domain's probe")
    max_joint: int = Field(
        4, ge=1, description="probes that are trained jointly, at most; groups of them are dealt out to ranks"
    )

    @model_validator(mode="after")
    def _whole_passes(self) -> ProbeConfig:
        if self.batch_size % self.samples_per_pass:
            raise ValueError(
                f"search.probes.batch_size {self.batch_size} must be a multiple of "
                f"search.probes.micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def samples_per_pass(self) -> int:
        """Of each probe."""
        return self.micro_batch_size or self.batch_size

    @property
    def passes(self) -> int:
        """That a step makes."""
        return self.batch_size // self.samples_per_pass


class CandidateConfig(Section):
    count: int = Field(12, ge=2, description="candidate mixtures to begin with (paper: 12 to 20)")
    design: Literal["dirichlet", "sobol"] = Field(
        "sobol",
        description="random draws as in the paper, or a scrambled Sobol sequence, which is more even",
    )
    include_current: bool = Field(
        True, description="make the current mixture the first candidate; the paper's are Dirichlet draws only"
    )
    dirichlet_alpha: float = Field(1.0, gt=0, description="concentration of the Dirichlet over components")
    interpolation: InterpolationName = Field(
        "linear",
        description="linear: the mean of the probes' deltas (paper); norm: with the length that they have on "
        "average, as training on the mixture has",
    )
    samples_per_domain: int = Field(
        64, ge=1, description="held-out samples per domain; never the reported ones"
    )
    batch_size: Count | Literal["auto"] = Field(
        "auto", description="samples per forward pass and candidate; auto: as many as fit in memory and help"
    )
    joint: Count | Literal["auto"] = Field("auto", description="candidates per forward pass (low-rank path)")
    method: Literal["auto", "lowrank", "merge"] = Field(
        "auto",
        description="add low-rank terms per candidate, or merge deltas in memory; auto measures once per "
        "shape on a GPU, and counts FLOPs elsewhere",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the matrix products of simulated models; auto: engine.param_dtype on a GPU, else "
        "float32",
    )
    early_stop: Confidence | None = Field(
        None,
        description="stop evaluating a candidate that is worse than staying with this confidence; null: "
        "every candidate sees all samples",
    )


class LawConfig(Section):
    family: Literal["log_linear", "power", "quadratic", "trees", "gaussian_process", "auto"] = Field(
        "log_linear", description="form of the laws (paper: log_linear); auto compares by cross-validation"
    )
    averaging: bool = Field(
        False,
        description="give the law a term for what averaging probes gains whatever their data (log_linear)",
    )
    huber_delta: float = Field(0.02, gt=0, description="Huber threshold on residuals of the log-linear law")
    num_starts: int = Field(64, ge=1, le=10_000, description="random starts per domain, all fitted at once")


class RefinementConfig(Section):
    rounds: int = Field(
        2,
        ge=0,
        description="times that the proposal and mixtures near it are evaluated and the laws fitted again "
        "(paper: 0)",
    )
    count: int = Field(4, ge=1, description="candidates of a round, the proposal among them")
    tolerance: float = Field(
        0.01, gt=0, description="end when a round moves no domain's share by more than this"
    )


class GradientConfig(Section):
    max_evaluations: int = Field(12, ge=1, description="mixtures that method gradient may evaluate")
    tolerance: float = Field(
        1e-4, gt=0, description="end when no step promises a lower objective by more than this, nats"
    )


class ProposalConfig(Section):
    objective: Literal["mean", "relative", "worst", "worst_change"] = Field(
        "mean",
        description="what is lowered: the mean loss (paper), the mean loss relative to the snapshot's, the "
        "worst domain's loss, or the worst change from the snapshot",
    )
    omega: dict[str, float] | None = Field(None, description="weight of each domain's loss; null: 1/n each")
    kl: float = Field(0.05, ge=0, description="lambda of KL(x || prior)")
    prior: Literal["current", "uniform", "natural"] = Field(
        "current", description="what the KL pulls towards"
    )
    expansion: Literal["effective", "paper"] = Field(
        "effective", description="x = C^T u; `paper` takes a domain's probe as the pure domain"
    )
    max_increase: Rise | dict[str, Rise] | None = Field(
        None,
        description="nats that a domain's loss, or by search.metric tasks its error rate, may rise above the "
        "snapshot's, for all or by name",
    )
    floors: dict[str, Share] = Field(default_factory=dict, description="least share of a domain, by name")
    caps: dict[str, Share] = Field(default_factory=dict, description="largest share of a domain, by name")
    max_repetitions: float | None = Field(
        None, gt=0, description="cap on the epochs over a domain in the whole run; null: no cap"
    )
    bootstrap: int = Field(
        100, ge=0, le=10_000, description="resampled laws behind the error bars; 0: no error bars"
    )
    confidence: float = Field(0.9, gt=0.5, lt=1, description="of the intervals and of the decision to move")
    no_move: bool = Field(True, description="keep the mixture where the gain is within its uncertainty")


class TaskMetricConfig(Section):
    per_domain: int = Field(64, ge=2, description="tasks of each domain that candidates are scored on")
    max_new_tokens: int = Field(64, ge=1, description="most tokens of a reply")
    batch_size: int = Field(16, ge=1, description="prompts, or choices, in a pass")
    choices: Literal["likelihood", "generation"] = Field(
        "likelihood", description="multiple choice by the choices' likelihoods, or by the reply"
    )
    allow_code: bool = Field(False, description="import and call the scorers that tasks name")


class SearchConfig(Section):
    metric: Literal["loss", "tasks"] = Field(
        "loss",
        description="what candidates are compared by: held-out losses; or error rates of replies in domains "
        "that have a tasks.jsonl, losses in others",
    )
    mode: Literal["sync", "async"] = Field("sync", description="wait for the proposal, or train on meanwhile")
    start_fraction: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the steps before the search; 0, before the first step, needs a start.run",
    )
    new_domains: list[str] = Field(
        default_factory=list,
        description="domains that join, each with a probe, beside one for all others; of one domain the two "
        "probes are on 10% and 90%. After start.run, empty takes those that it has not read",
    )
    method: Literal["law", "gradient"] = Field(
        "law", description="laws fitted to candidates (paper), or descent along exact gradients without laws"
    )
    gradients: bool = Field(False, description="fit the laws to exact gradients of the candidates too")
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="what simulated models and probes compute with; auto: Triton kernels on a GPU that they "
        "are made for, else plain torch",
    )
    calibration: str | None = Field(
        None,
        description="calibration.json of `opmix validate`: corrects simulated losses before laws and "
        "decision see them; null: as simulated",
    )
    probes: ProbeConfig = ProbeConfig()
    candidates: CandidateConfig = CandidateConfig()
    law: LawConfig = LawConfig()
    refinement: RefinementConfig = RefinementConfig()
    gradient: GradientConfig = GradientConfig()
    proposal: ProposalConfig = ProposalConfig()
    tasks: TaskMetricConfig = TaskMetricConfig()

    @model_validator(mode="after")
    def _errors_have_no_slope(self) -> SearchConfig:
        if self.metric == "tasks" and (self.wants_gradients or self.candidates.early_stop is not None):
            raise ValueError(
                "search.metric tasks takes candidates in full and without gradients: set search.method to "
                "law, search.gradients to false and search.candidates.early_stop to null"
            )
        return self

    @model_validator(mode="after")
    def _corrects_what_it_compares(self) -> SearchConfig:
        if self.calibration is not None and self.metric == "tasks":
            raise ValueError("search.calibration corrects losses: set it to null with search.metric tasks")
        if self.calibration is not None and self.candidates.early_stop is not None:
            raise ValueError(
                "search.candidates.early_stop compares losses before search.calibration corrects them: set "
                "one of the two"
            )
        return self

    @property
    def wants_gradients(self) -> bool:
        """Whether candidates are asked for with gradients."""
        return self.gradients or self.method == "gradient"

    def check_domains(self, names: Sequence[str], where: str) -> None:
        """Refuse settings by domain that do not fit the domains of ``where``.

        Raises:
            UserError: naming the setting and the domain.
        """
        proposal = self.proposal
        increase = proposal.max_increase if isinstance(proposal.max_increase, dict) else {}
        by_domain: dict[str, Mapping[str, float]] = {
            "omega": proposal.omega or {},
            "max_increase": increase,
            "floors": proposal.floors,
            "caps": proposal.caps,
        }
        for key, values in by_domain.items():
            for name in values:
                if name not in names:
                    raise UserError(f"search.proposal.{key} names `{name}`, which is no domain of {where}")
        missing = sorted(set(names) - set(proposal.omega or names))
        if missing:
            raise UserError(f"search.proposal.omega has no weight for `{missing[0]}`")
        for name, floor in proposal.floors.items():
            if floor > proposal.caps.get(name, 1.0):
                raise UserError(
                    f"search.proposal.floors.{name} is {floor:g}, above its cap {proposal.caps[name]:g}"
                )
        if sum(proposal.floors.values()) > 1:
            raise UserError(f"search.proposal.floors sum to {sum(proposal.floors.values()):g}: at most 1")
        for name in self.new_domains:
            if name not in names:
                raise UserError(f"search.new_domains names `{name}`, which is no domain of {where}")
            if self.new_domains.count(name) > 1:
                raise UserError(f"search.new_domains names `{name}` twice")
