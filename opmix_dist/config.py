"""The typed configuration of a training run: YAML in, checked values out.

Every field has a type, a unit where it has one, and a line of documentation; ``opmix train --print-config``
prints them all. An unknown key is an error that names its dotted path and the nearest valid one. The
defaults of ``search`` are the values of the OP-Mix paper (arXiv 2605.15220).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from opmix_dist.data.remote import is_url
from opmix_dist.errors import UserError

DTypeName = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A group of settings; immutable once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    checkpoint: str | None = Field(None, description="HF folder or hub id to start from, with its weights")
    config: dict[str, Any] | None = Field(
        None, description="HF config fields with `model_type`, for fresh weights; vocab_size follows the data"
    )
    attention: str = Field("sdpa", description="HF attention implementation: sdpa, eager, flash_attention_2")
    trust_remote_code: bool = Field(False, description="run model code that comes with a checkpoint")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give exactly one of model.checkpoint and model.config")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs `model_type`, for example llama")
        return self


class DataConfig(Section):
    root: str = Field(
        description="folder or fsspec URL of what `opmix prepare --out` made: a folder per domain"
    )
    domains: list[str] | None = Field(None, description="domains to use, in this order; null takes all")
    num_workers: int = Field(0, ge=0, description="loader processes per trainer rank; 0 reads in-process")
    prefetch_batches: int = Field(2, ge=1, description="batches that each loader process keeps ready")
    shuffle_block: int = Field(
        65_536, ge=1, description="samples of a domain that are shuffled together, at least"
    )
    mask_documents: bool = Field(
        False, description="confine attention and loss to a sample's single documents"
    )
    max_epochs: float | dict[str, float] | None = Field(
        None, description="how often a domain may be read, for all or by name; null: without end"
    )
    on_exhausted: Literal["stop", "renormalize"] = Field(
        "stop", description="at max_epochs: stop the run, or share the weight out among the other domains"
    )
    cache: str | None = Field(
        None, description="local folder for the shards of a remote root; null: root is local"
    )
    cache_limit: Annotated[ByteSize, Field(gt=0)] | None = Field(
        None, description="most that the cache may hold, such as 200GB; null: all shards"
    )
    verify_shards: Literal["never", "fetch", "always"] = Field(
        "fetch",
        description="check shards' hashes never, when they are fetched, or always when they are opened",
    )
    fetch_threads: int = Field(8, ge=1, description="shards of a remote root that are fetched at once")
    fetch_ahead: int = Field(16, ge=0, description="shards that are fetched before they are needed")
    fetch_timeout_s: float = Field(600.0, gt=0, description="seconds after which a shard's fetch is given up")

    @model_validator(mode="after")
    def _positive_epochs(self) -> DataConfig:
        limits = self.max_epochs if isinstance(self.max_epochs, dict) else {"": self.max_epochs}
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                key = f"data.max_epochs.{name}".rstrip(".")
                raise ValueError(f"{key} is {limit:g}: give more than 0 epochs, or leave it out for no limit")
        return self

    @model_validator(mode="after")
    def _cache_fits_root(self) -> DataConfig:
        if is_url(self.root) and self.cache is None:
            raise ValueError(
                f"data.root {self.root} is remote: set data.cache to a local folder for its shards"
            )
        if self.cache_limit is not None and self.cache is None:
            raise ValueError("data.cache_limit bounds data.cache, which is not set: set both or none")
        return self

    def epochs_by_domain(self, names: Sequence[str]) -> dict[str, float]:
        """``max_epochs`` of the domains that have one."""
        if self.max_epochs is None or isinstance(self.max_epochs, dict):
            return self.max_epochs or {}
        return dict.fromkeys(names, self.max_epochs)


class EngineConfig(Section):
    name: Literal["auto", "fsdp", "single"] = Field(
        "auto", description="auto takes fsdp on several trainer ranks and single on one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes cuda where there is one")
    param_dtype: DTypeName = Field("float32", description="dtype of the matrix products; masters are float32")
    reduce_dtype: DTypeName = Field("float32", description="dtype of the gradient reduction (fsdp)")
    reshard_after_forward: bool = Field(True, description="free gathered parameters after forward (fsdp)")
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward pass")
    compile: bool = Field(False, description="torch.compile each transformer block")
    collective_timeout_s: float = Field(1800.0, gt=0, description="seconds before a stuck collective raises")


class OptimizerConfig(Section):
    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW; the probes' base rate too")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm to clip to")


class ScheduleConfig(Section):
    name: Literal["wsd", "cosine", "constant"] = Field("wsd", description="learning-rate schedule")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="wsd: last share of the steps, linear decay")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate over the peak")


class TrainConfig(Section):
    steps: int = Field(ge=1, description="optimiser steps of the run")
    global_batch_size: int = Field(ge=1, description="samples per step over all trainer ranks")
    micro_batch_size: int = Field(ge=1, description="samples per forward pass on one rank")
    log_interval_steps: int = Field(10, ge=1, description="steps between printed lines where there is no bar")
    eval_interval_steps: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_samples_per_domain: int = Field(
        64, ge=1, description="held-out samples per domain in reported losses"
    )

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} must be a multiple of "
                f"train.micro_batch_size {self.micro_batch_size}"
            )
        return self


class CheckpointConfig(Section):
    interval_steps: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest complete checkpoints to keep")
    asynchronous: bool = Field(True, description="write while training goes on")


class MixtureConfig(Section):
    policy: Literal["static", "opmix"] = Field("opmix", description="who decides the mixture during the run")
    initial: Literal["uniform", "natural"] | dict[str, float] = Field(
        "uniform",
        description="mixture at step 0; natural is in proportion to samples; or weights that sum to 1",
    )
    schedule: dict[Annotated[int, Field(ge=1)], Literal["uniform", "natural"] | dict[str, float]] = Field(
        default_factory=dict,
        description="static policy: step to the mixture from it on; a resume may change it for coming steps",
    )

    @model_validator(mode="after")
    def _one_decides(self) -> MixtureConfig:
        if self.schedule and self.policy != "static":
            raise ValueError(f"mixture.schedule needs mixture.policy static, not {self.policy}")
        return self


class ProbeConfig(Section):
    steps: int = Field(5000, ge=1, description="optimiser steps of each probe (paper: 5,000 in pretraining)")
    batch_size: int = Field(32, ge=1, description="samples per probe and step")
    rank: int = Field(16, ge=1, description="LoRA rank")
    alpha: int = Field(32, gt=0, description="LoRA alpha; the delta is alpha / rank * B A")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on each adapter's input")
    lr_multiplier: float = Field(2.0, gt=0, description="probe learning rate over optimizer.lr; no warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay on A and B")
    max_grad_norm: float = Field(1.0, gt=0, description="each adapter's own gradient norm to clip to")
    domain_share: float = Field(0.9, gt=0, le=1, description="share of its domain in a domain's probe")
    max_joint: int = Field(64, ge=1, description="adapters trained in one pass; more take several passes")


class CandidateConfig(Section):
    count: int = Field(20, ge=2, description="candidate mixtures (paper: 12 to 20)")
    include_current: bool = Field(
        True, description="make the current mixture the first candidate; the paper's are Dirichlet draws only"
    )
    dirichlet_alpha: float = Field(1.0, gt=0, description="concentration of the Dirichlet over components")
    samples_per_domain: int = Field(
        64, ge=1, description="held-out samples per domain; never the reported ones"
    )
    batch_size: int = Field(16, ge=1, description="samples per forward pass and candidate")
    joint: int = Field(4, ge=1, description="candidates per forward pass (low-rank path)")
    method: Literal["auto", "lowrank", "merge"] = Field(
        "auto", description="add low-rank terms per candidate, or merge deltas in memory; auto counts FLOPs"
    )


class LawConfig(Section):
    huber_delta: float = Field(0.02, gt=0, description="Huber threshold on residuals of the log-linear law")
    num_starts: int = Field(64, ge=1, description="random starts per domain, all fitted at once")


class ProposalConfig(Section):
    kl: float = Field(0.05, ge=0, description="lambda of KL(x || prior)")
    prior: Literal["current", "uniform", "natural"] = Field(
        "current", description="what the KL pulls towards"
    )
    omega: dict[str, float] | None = Field(None, description="weight of each domain's loss; null: 1/n each")
    expansion: Literal["effective", "paper"] = Field(
        "effective", description="x = C^T u; `paper` takes a domain's probe as the pure domain"
    )
    max_repetitions: float | None = Field(
        None, gt=0, description="cap on the epochs over a domain in the whole run; null: no cap"
    )


class SearchConfig(Section):
    mode: Literal["sync", "async"] = Field("sync", description="wait for the proposal, or train on meanwhile")
    start_fraction: float = Field(0.2, gt=0, lt=1, description="share of the steps before the search")
    probes: ProbeConfig = ProbeConfig()
    candidates: CandidateConfig = CandidateConfig()
    law: LawConfig = LawConfig()
    proposal: ProposalConfig = ProposalConfig()


class PoolConfig(Section):
    ranks: int = Field(0, ge=0, description="last ranks of the launch that search; 0: on the trainer ranks")
    external: bool = Field(False, description="the pool is a launch of its own: `opmix pool --run DIR`")
    max_restarts: int = Field(3, ge=0, description="times that a dead pool worker is started again")
    heartbeat_timeout_s: float = Field(
        300.0, gt=0, description="seconds without a sign of life: search failed"
    )
    poll_interval_s: float = Field(0.5, gt=0, description="seconds between looks into the run directory")
    threads: int = Field(0, ge=0, description="CPU threads of a pool worker; 0 leaves torch's default")

    @model_validator(mode="after")
    def _one_place(self) -> PoolConfig:
        if self.external and self.ranks:
            raise ValueError("pool.external is a launch of its own: set pool.ranks to 0 in this one")
        return self


class LoggingConfig(Section):
    tensorboard: bool = Field(False, description="write TensorBoard events to RUN/metrics/tensorboard")
    wandb_project: str | None = Field(None, description="W&B project; null: no W&B")


class RunConfig(Section):
    run_dir: str = Field(description="folder of this run; trainers and pool share it")
    seed: int = Field(0, ge=0, description="seed of weights, data order, probes and candidates")
    resume: Literal["auto", "never"] = Field("auto", description="auto continues from the newest checkpoint")
    deterministic: bool = Field(False, description="deterministic kernels only (slower on GPUs)")
    model: ModelConfig
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    mixture: MixtureConfig = MixtureConfig()
    search: SearchConfig = SearchConfig()
    pool: PoolConfig = PoolConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _schedule_within_the_run(self) -> RunConfig:
        for step in self.mixture.schedule:
            if step >= self.train.steps:
                raise ValueError(
                    f"mixture.schedule.{step} is never reached: train.steps is {self.train.steps}"
                )
        return self

    @property
    def search_step(self) -> int:
        """The step boundary at which the search starts, at least 1 and before the last step."""
        return min(max(1, round(self.search.start_fraction * self.train.steps)), max(1, self.train.steps - 1))

    @model_validator(mode="after")
    def _flash_attention_dtype(self) -> RunConfig:
        if "flash" in self.model.attention and self.engine.param_dtype == "float32":
            raise ValueError(
                f"model.attention {self.model.attention} computes in 16 bits: set engine.param_dtype to "
                "bfloat16"
            )
        return self


# What a resumed run may change: no setting here alters the order of a domain's samples or, beyond rounding,
# the losses on given samples. How many samples make a step, and when a domain is used up, may change.
RESUME_MAY_CHANGE = (
    "run_dir",
    "resume",
    "engine.name",
    "engine.device",
    "engine.reshard_after_forward",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.collective_timeout_s",
    "checkpoint",
    "pool",
    "logging",
    "data.num_workers",
    "data.prefetch_batches",
    "data.root",
    "data.domains",  # more of them: see Job._restore
    "mixture.schedule",  # of coming steps: see check_schedule
    "data.cache",
    "data.cache_limit",
    "data.verify_shards",
    "data.fetch_threads",
    "data.fetch_ahead",
    "data.fetch_timeout_s",
    "data.max_epochs",
    "data.on_exhausted",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.log_interval_steps",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted overrides (``--train.steps 10`` or ``--train.steps=10``) and check it.

    Raises:
        UserError: one line that names the file or the dotted key, and the nearest valid key.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {type(data).__name__}")
    for key, value in parse_overrides(overrides):
        _set_dotted(data, key, value)
    return check_config(data)


def check_config(data: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values into a :class:`RunConfig`; raises UserError as :func:`load_config` does."""
    leaves = [key for key, _ in _fields(RunConfig)]
    valid = [*leaves, *{key.rpartition(".")[0] for key in leaves if "." in key}]
    for key in _unknown_keys(RunConfig, data):
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown setting `{key}`: the nearest valid one is `{near}`")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        key = next((leaf for leaf in leaves if key.startswith(f"{leaf}.")), key)  # not which type of a union
        shown = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        where = f"setting `{key}`: " if key else ""  # a check of the whole names its settings itself
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}{shown}") from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """``["--a.b", "1", "--c=x"]`` to ``("a.b", 1), ("c", "x")``; values are YAML."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"`{flag}` is not a setting: write --dotted.key value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"setting `{key}` has no value")
            text = rest.pop(0)
        yield key, _yaml_value(text)


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-3 for a string
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _set_dotted(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = data.get(name)
        if not isinstance(child, dict):
            child = data[name] = {}
        data = child
    data[leaf] = value


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and field of every leaf setting, in order."""
    for name, field in section.model_fields.items():
        child = _section(field.annotation)
        if child is None:
            yield prefix + name, field
        else:
            yield from _fields(child, f"{prefix}{name}.")


def _unknown_keys(section: type[Section], data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        field = section.model_fields.get(str(name))
        if field is None:
            yield f"{prefix}{name}"
        elif (child := _section(field.annotation)) is not None and isinstance(value, Mapping):
            yield from _unknown_keys(child, value, f"{prefix}{name}.")


def to_yaml(config: RunConfig, *, documented: bool = False) -> str:
    """The resolved configuration as YAML that loads back to an equal one.

    Args:
        documented: put each field's documentation above it.
    """
    plain = config.model_dump(mode="json")
    if not documented:
        return yaml.safe_dump(plain, sort_keys=False)
    return "\n".join(_documented(RunConfig, plain, "")) + "\n"


def _documented(section: type[Section], data: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        child = _section(field.annotation)
        if child is not None:
            yield f"{indent}{name}:"
            yield from _documented(child, data[name], indent + "  ")
            continue
        yield f"{indent}# {field.description}"
        in_a_list = yaml.safe_dump([data[name]], sort_keys=False, default_flow_style=True, width=math.inf)
        yield f"{indent}{name}: {in_a_list.strip()[1:-1]}"


def changed_settings(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted settings that differ and that a resumed run may not change."""
    allowed = tuple(f"{key}." for key in RESUME_MAY_CHANGE)
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        key
        for key, _ in _fields(RunConfig)
        if not f"{key}.".startswith(allowed) and _get_dotted(before, key) != _get_dotted(after, key)
    ]


def _get_dotted(data: Mapping[str, Any], dotted: str) -> Any:
    value: Any = data
    for name in dotted.split("."):
        value = value[name]
    return value
