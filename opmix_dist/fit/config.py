"""The settings of ``opmix fit``: those of allenai/olmix's fit files under their names, and ours beside them.

What olmix has and this does not (``regression.type`` search and autoscale, ``proposer.type`` search) is
refused with a line that says what to take instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from opmix_dist.errors import UserError
from opmix_dist.fit.tables import PRESETS, Columns
from opmix_dist.search.problem import Objective
from opmix_dist.settings import Section, check_settings, read_settings

FAMILY_OF = {
    "log_linear": "log_linear",
    "lightgbm": "trees",
    "gp": "gaussian_process",
    "bimix": "power",
}
"""olmix's types of regression and the families of laws that they are here."""
OURS = ("log_linear", "power", "quadratic", "trees", "gaussian_process", "auto")
DEFAULT_KL = 0.05

Share = Annotated[float, Field(ge=0, le=1)]
Rise = Annotated[float, Field(ge=0)]


def _fraction(value: Any) -> Any:
    """``"7/52.0"`` as 7 / 52; anything else as it is."""
    if isinstance(value, str) and value.count("/") == 1:
        above, below = value.split("/")
        try:
            return float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"`{value}` is no fraction of two numbers") from None
    return value


Weight = Annotated[float, BeforeValidator(_fraction), Field(ge=0, allow_inf_nan=False)]


class SwarmConfig(Section):
    ratios: str = Field(description="table of the mixture of each run, CSV or Parquet")
    metrics: str = Field(description="table of the losses of each run, CSV or Parquet")


class ColumnsConfig(Section):
    preset: Literal["olmix", "regmix"] = Field("olmix", description="how the tables name their columns")
    run: str | None = Field(
        None, description="column that names the runs; null: as the preset, or run, run_id, name, index"
    )
    ratio_prefix: str | None = Field(None, description="begins the domains' columns; null: as the preset")
    metric_prefix: str | None = Field(None, description="begins the metrics' columns; null: as the preset")
    metric_suffix: str | None = Field(None, description="ends the metrics' columns; null: as the preset")

    def resolved(self) -> Columns:
        """What is set here, else the preset's."""
        preset = PRESETS[self.preset]
        given = self.model_dump(exclude={"preset"}, exclude_none=True)
        return Columns(**{**vars(preset), **given})


class PriorsConfig(Section):
    relative_sizes: dict[str, Weight] | None = Field(
        None, description="prior share of each domain; null: the uniform mixture"
    )
    token_counts: dict[str, Annotated[int, Field(ge=0)]] | None = Field(
        None, description="tokens that each domain has; needed by constraints"
    )


class EvalConfig(Section):
    type: Literal["offline", "inloop"] = Field(
        "offline", description="tasks as lists of columns, or as maps from a task to its column"
    )
    tasks: dict[str, list[str] | dict[str, str]] = Field(
        default_factory=dict, description="metrics to fit, by family; empty: every column of the metrics"
    )

    @model_validator(mode="after")
    def _form(self) -> EvalConfig:
        form: type = list if self.type == "offline" else dict
        for family, tasks in self.tasks.items():
            if not isinstance(tasks, form):
                wanted = "a list of metrics" if form is list else "a map from tasks to metrics"
                raise ValueError(f"eval.tasks.{family} must be {wanted}, as eval.type is {self.type}")
            if not tasks:
                raise ValueError(f"eval.tasks.{family} has no task")
        return self

    def families(self) -> dict[str, list[str]]:
        """Columns by family."""
        return {
            family: list(tasks.values() if isinstance(tasks, dict) else tasks)
            for family, tasks in self.tasks.items()
        }


class RegressionConfig(Section):
    type: str = Field(
        "log_linear",
        description="log_linear, power (bimix), quadratic, trees (lightgbm), gaussian_process (gp), or auto",
    )
    seed: int = Field(0, ge=0, description="of the fit, the split, and the resampling")
    n_test: int = Field(0, ge=0, description="runs that are held out of the fit to test it")
    train_split: float = Field(
        1.0, gt=0, description="share of the other runs to fit, or their number above 1"
    )
    aggregate_task_families: bool = Field(
        False, description="fit the mean of each family in eval.tasks, not each metric"
    )

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("search", "autoscale"):
            raise ValueError(
                f"olmix's {value} is no law of mixtures that is fitted here: take log_linear, bimix or auto"
            )
        if value not in FAMILY_OF and value not in OURS:
            known = ", ".join(dict.fromkeys([*FAMILY_OF, *OURS]))
            raise ValueError(f"`{value}` is no type of regression: take one of {known}")
        return value

    @property
    def family(self) -> str:
        return FAMILY_OF.get(self.type, self.type)


class ProposerConfig(Section):
    type: Literal["exact", "simulation", "search"] = Field(
        "exact", description="exact has a KL term; simulation has none unless kl_reg is set"
    )
    temperature: float | None = Field(
        None, gt=0, description="with simulation: exponent on the prior, whose shares are scaled again"
    )
    kl_reg: float | None = Field(
        None, ge=0, description="lambda of KL(x || prior); null: 0.05 with exact, 0 with simulation"
    )
    fit_only: bool = Field(False, description="fit the laws and propose nothing")
    make_worst_mix: bool = Field(False, description="propose what the laws expect to be worst")

    @field_validator("type")
    @classmethod
    def _has_a_law(cls, value: str) -> str:
        if value == "search":
            raise ValueError("olmix's search takes the best of the runs without a law: take exact")
        return value

    @property
    def kl(self) -> float:
        if self.kl_reg is not None:
            return self.kl_reg
        return DEFAULT_KL if self.type == "exact" else 0.0


class ConstraintsConfig(Section):
    enabled: bool = Field(False, description="cap each domain's share by its tokens")
    target_tokens: int | None = Field(None, ge=1, description="tokens to train on the mixture")
    repetition_factor: float = Field(4.0, gt=0, description="epochs over a domain that are allowed")


class FilteringConfig(Section):
    drop_metrics: list[str] = Field(default_factory=list, description="metrics that do not count")
    obj_weights: dict[str, Weight] = Field(
        default_factory=dict,
        description="weight of each metric or family, also as a fraction such as 7/52; 1 where it has none. "
        "Empty: 1/n each",
    )


class LawConfig(Section):
    averaging: bool = Field(False, description="log_linear: a term for what averaging runs gains by itself")
    huber_delta: float = Field(0.02, gt=0, description="log_linear: residual from which it counts less")
    num_starts: int = Field(
        64, ge=1, le=10_000, description="log_linear: starts for each metric, all fitted at once"
    )


class ObjectiveConfig(Section):
    type: Objective = Field(
        "mean",
        description="mean or worst loss; relative and worst_change compare with the reference losses",
    )
    reference: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="losses of the current model; null: what the laws expect of the current mixture"
    )
    max_increase: Rise | dict[str, Rise] | None = Field(
        None, description="most that a loss may rise above its reference, for all or by metric"
    )


class BoundsConfig(Section):
    floors: dict[str, Share] = Field(default_factory=dict, description="least share of a domain")
    caps: dict[str, Share] = Field(default_factory=dict, description="largest share of a domain")


class BootstrapConfig(Section):
    count: int = Field(
        100, ge=0, le=10_000, description="refits to resampled losses, for the intervals; 0: no intervals"
    )
    confidence: float = Field(0.9, gt=0.5, lt=1, description="of the intervals and of the decision to move")


class FitConfig(Section):
    """A fit file of olmix is one, as it is; the sections from ``columns`` on are ours."""

    swarm: SwarmConfig
    priors: PriorsConfig = PriorsConfig()
    eval: EvalConfig = EvalConfig()
    regression: RegressionConfig = RegressionConfig()
    proposer: ProposerConfig = ProposerConfig()
    constraints: ConstraintsConfig = ConstraintsConfig()
    filtering: FilteringConfig = FilteringConfig()
    columns: ColumnsConfig = ColumnsConfig()
    law: LawConfig = LawConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    bounds: BoundsConfig = BoundsConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    current: dict[str, Weight] | None = Field(
        None, description="mixture in use; the proposal is compared with it"
    )

    @model_validator(mode="after")
    def _complete(self) -> FitConfig:
        if self.constraints.enabled and self.constraints.target_tokens is None:
            raise ValueError("constraints.enabled needs constraints.target_tokens")
        if self.constraints.enabled and self.priors.token_counts is None:
            raise ValueError("constraints.enabled needs priors.token_counts")
        objective = self.objective
        needs = objective.type in ("relative", "worst_change") or objective.max_increase is not None
        if needs and objective.reference is None and self.current is None:
            raise ValueError(
                f"objective.{'max_increase' if objective.max_increase is not None else 'type'} compares with "
                "the current model: give its mixture (current, or --current) or its losses "
                "(objective.reference)"
            )
        if self.bootstrap.count == 1:
            raise ValueError("bootstrap.count must be 0, for no intervals, or at least 2")
        plain = objective.type == "mean" and objective.max_increase is None
        if self.proposer.make_worst_mix and not plain:
            raise ValueError("proposer.make_worst_mix goes with objective.type mean and no max_increase only")
        return self


def load_fit_config(path: Path | None, overrides: Sequence[str] = ()) -> FitConfig:
    """A fit file, dotted overrides on top; without a file, the overrides and the defaults.

    The tables' paths count from the working folder, as olmix has them, else from the file's folder.

    Raises:
        UserError: one line that names the file or the key, and the nearest valid one; or a missing table.
    """
    config = check_settings(FitConfig, read_settings(path, overrides))
    folder = path.parent if path else Path()
    swarm = {name: str(_existing(text, folder)) for name, text in config.swarm.model_dump().items()}
    return config.model_copy(update={"swarm": SwarmConfig(**swarm)})


def _existing(text: str, folder: Path) -> Path:
    path = Path(text)
    places = dict.fromkeys([path, folder / path])
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"there is no table {' or '.join(map(str, places))}")
