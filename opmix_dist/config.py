"""The typed configuration of a training run, and of a search alone.

Every field has a type, a unit where it has one, and a line of documentation; ``--print-config`` prints them
all. The settings of the search itself are in ``search_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from opmix_dist.data.remote import is_url
from opmix_dist.errors import UserError
from opmix_dist.method_config import LoRAConfig, MethodConfig
from opmix_dist.search_config import SearchConfig
from opmix_dist.settings import Section, check_settings, read_settings

DTypeName = Literal["float32", "bfloat16"]
PLAIN_ENGINES = ("deepspeed", "megatron")
"""Those without training methods and adapters."""
ONE_SOURCE = "give exactly one of model.checkpoint and model.config"


class ModelConfig(Section):
    checkpoint: str | None = Field(None, description="HF folder or hub id to start from, with its weights")
    config: dict[str, Any] | None = Field(
        None, description="HF config fields with `model_type`, for fresh weights; vocab_size follows the data"
    )
    attention: str = Field(
        "sdpa",
        description="HF attention implementation: sdpa, eager, flash_attention_2, flex_attention, or varlen, "
        "which needs no mask for data.mask_documents",
    )
    context: dict[str, Any] | None = Field(
        None,
        description="fields of a checkpoint's config to replace for another length of samples: "
        "max_position_embeddings, rope_theta, rope_scaling, rope_parameters, sliding_window",
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with a checkpoint")
    lora: LoRAConfig | None = Field(
        None,
        description="train adapters only: rank, alpha, dropout; snapshots and the export are merged; null: "
        "all parameters",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.checkpoint is not None and self.config is not None:
            raise ValueError(f"{ONE_SOURCE}, not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs `model_type`, for example llama")
        if self.config is not None and self.context is not None:
            raise ValueError("model.context is for a model.checkpoint: put its fields into model.config")
        return self


ReplaySamples = Annotated[int, Field(ge=1)]


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
    replay_samples: ReplaySamples | dict[str, ReplaySamples] | None = Field(
        None,
        description="train on so many samples only, chosen by seed, of each domain that start.run's history "
        "has, or by name; epochs are counted over them; null: all samples",
    )
    watch: list[str] = Field(
        default_factory=list, description="domains that are evaluated with the others, and not trained on"
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


class FSDPConfig(Section):
    replicas: int = Field(
        1, ge=1, description="copies of the sharded model, each on an equal part of the ranks (HSDP)"
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="neighbouring ranks that share each matrix product (Llama, Mistral, Qwen2, Qwen3)",
    )
    loss_parallel: bool = Field(
        False, description="leave the logits divided by vocabulary over the tensor_parallel ranks"
    )
    cpu_offload: bool = Field(
        False, description="keep parameters, gradients and AdamW's moments in the CPU's memory"
    )

    @model_validator(mode="after")
    def _logits_are_divided(self) -> FSDPConfig:
        if self.loss_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "engine.fsdp.loss_parallel needs engine.fsdp.tensor_parallel of 2 or more, not 1: set both"
            )
        return self


class MegatronConfig(Section):
    tensor_parallel: int = Field(1, ge=1, description="neighbouring ranks that share each matrix product")
    pipeline_parallel: int = Field(1, ge=1, description="stages that the blocks are divided into (1F1B)")
    sequence_parallel: bool = Field(
        False, description="divide norms and the residual stream by token over the tensor_parallel ranks"
    )
    overlap_grad_reduce: bool = Field(
        False, description="sum gradients over replicas while the backward pass goes on"
    )
    vocab_multiple: int = Field(
        128, ge=1, description="tokens to pad the vocabulary on each tensor_parallel rank to a multiple of"
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="auto takes transformer_engine where it is installed; local is plain torch"
    )

    @model_validator(mode="after")
    def _tokens_are_divided(self) -> MegatronConfig:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "engine.megatron.sequence_parallel needs engine.megatron.tensor_parallel of 2 or more, not "
                "1: set both"
            )
        return self


Offload = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(Section):
    """What is null here is as in ``config``; of what both give, the values must be the same."""

    stage: Literal[1, 2, 3] | None = Field(
        None,
        description="ZeRO: divide AdamW's state over the ranks (1), gradients too (2), parameters too (3); "
        "null: that of engine.deepspeed.config, else 2",
    )
    offload_optimizer: Offload | None = Field(None, description="where AdamW's state is kept and updated")
    offload_parameters: Offload | None = Field(None, description="where parameters are kept (stage 3)")
    nvme_path: str | None = Field(None, description="folder on each node for what is offloaded to nvme")
    config: str | dict[str, Any] | None = Field(
        None,
        description="a ds_config.json of yours, its path or its content; `auto` in it is what is set here",
    )
    native_checkpoints: bool = Field(
        False,
        description="write DeepSpeed's own checkpoint beside each of ours, for ds_to_universal and "
        "zero_to_fp32; a resume never reads it",
    )


class EngineConfig(Section):
    name: Literal["auto", "single", "fsdp", "deepspeed", "megatron"] = Field(
        "auto", description="auto takes fsdp on several trainer ranks or where engine.fsdp is set; or single"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes cuda where there is one")
    param_dtype: DTypeName = Field("float32", description="dtype of the matrix products; masters are float32")
    reduce_dtype: DTypeName = Field("float32", description="dtype of the gradient reduction (fsdp)")
    reshard_after_forward: bool = Field(True, description="free gathered parameters after forward (fsdp)")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass recomputes of each block: selective keeps the results of matrix "
        "products and attention",
    )
    compile: bool = Field(False, description="torch.compile each transformer block")
    float8: bool = Field(
        False, description="matrix products of the blocks in float8 (torchao; GPUs from Ada and Hopper on)"
    )
    logits_memory: Annotated[ByteSize, Field(gt=0)] | None = Field(
        ByteSize(4 << 30),
        description="most that the float32 logits of a micro-batch may take whole; more are computed in "
        "chunks of an eighth of this, once more in the backward pass; null: always whole",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="dense TFLOP/s of one device, for MFU; null: by the name of a known GPU"
    )
    snapshot_dtype: DTypeName = Field("float32", description="dtype of the files that a search starts from")
    collective_timeout_s: float = Field(1800.0, gt=0, description="seconds before a stuck collective raises")
    fsdp: FSDPConfig = FSDPConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    megatron: MegatronConfig = MegatronConfig()

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """Runs that were started when there was one kind hold a boolean; YAML's ``off`` is one too."""
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def ranks_per_replica(self) -> int:
        """Trainer ranks that hold one copy of the model between them and compute on the same samples."""
        if self.name == "megatron":
            return self.megatron.tensor_parallel * self.megatron.pipeline_parallel
        return self.fsdp.tensor_parallel if self.name in ("auto", "fsdp") else 1


class OptimizerConfig(Section):
    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW; the probes' base rate too")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm to clip to")


class ScheduleConfig(Section):
    name: Literal["wsd", "cosine", "constant"] = Field("wsd", description="learning-rate schedule")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    warmup_from: float = Field(
        0.0, ge=0, le=1, description="learning rate that warm-up begins at, over the peak"
    )
    decay_fraction: float = Field(0.2, ge=0, le=1, description="wsd: last share of the steps, linear decay")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate over the peak")


class TrainConfig(Section):
    steps: int = Field(ge=1, description="optimiser steps of the run")
    global_batch_size: int = Field(ge=1, description="samples per step over all trainer ranks")
    micro_batch_size: int = Field(ge=1, description="samples per forward pass on one rank")
    log_interval_steps: int = Field(10, ge=1, description="steps between printed lines where there is no bar")
    eval_interval_steps: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_at_start: bool = Field(False, description="evaluate before the first step too")
    eval_samples_per_domain: int = Field(
        64, ge=1, description="held-out samples per domain in reported losses"
    )
    on_bad_step: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a NaN, inf or spike: stop; leave its batch out; or go back to the newest checkpoint and "
        "on with the data behind its batch",
    )
    max_bad_steps: int = Field(
        3, ge=1, description="batches in a row that are left out, and times to go back to one checkpoint"
    )
    hang_timeout_s: float | None = Field(
        3600.0,
        gt=0,
        description="seconds without progress in a step after which a rank ends itself, to be started again; "
        "four times as many where long is usual (start, first step, evaluations, checkpoints); null: never",
    )
    spike_deviations: float | None = Field(
        None, gt=0, description="a loss is a spike so many standard deviations above the mean; null: none is"
    )
    grad_norm_deviations: float | None = Field(
        None, gt=0, description="the same for the gradient's norm before it is clipped; null: none is"
    )
    spike_window: int = Field(128, ge=2, description="steps before it that mean and deviation are taken of")

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
    keep_every_steps: int = Field(
        0, ge=0, description="keep checkpoints of steps that are multiples of it for good; 0: none"
    )
    verify: Literal["sizes", "checksums"] = Field(
        "checksums", description="what a resume compares with what was written, before it takes a checkpoint"
    )
    asynchronous: bool = Field(True, description="write while training goes on")


MixtureName = Literal["uniform", "natural", "old", "new"]


class MixtureConfig(Section):
    policy: Literal["static", "opmix"] = Field("opmix", description="who decides the mixture during the run")
    initial: MixtureName | dict[str, float] = Field(
        "uniform",
        description="mixture at step 0; natural is in proportion to samples; after start.run, `old` is what "
        "the model has read and `new` the other domains; or weights that sum to 1, of domains, old and new",
    )
    schedule: dict[Annotated[int, Field(ge=1)], MixtureName | dict[str, float]] = Field(
        default_factory=dict,
        description="static policy: step to the mixture from it on; a resume may change it for coming steps",
    )

    @model_validator(mode="after")
    def _one_decides(self) -> MixtureConfig:
        if self.schedule and self.policy != "static":
            raise ValueError(f"mixture.schedule needs mixture.policy static, not {self.policy}")
        return self


class TeamConfig(Section):
    ranks_per_model: int = Field(
        1,
        ge=1,
        description="ranks that a model is sharded over in a search, where one rank cannot hold it; divides "
        "the ranks that search",
    )


class PoolConfig(TeamConfig):
    ranks: int = Field(0, ge=0, description="last ranks of the launch that search; 0: on the trainer ranks")
    external: bool = Field(False, description="the pool is a launch of its own: `opmix pool --run DIR`")
    max_restarts: int = Field(3, ge=0, description="times that a dead pool worker is started again")
    heartbeat_timeout_s: float = Field(
        300.0,
        gt=0,
        description="seconds without a sign of life: search failed; after half of them, hung workers are "
        "started again",
    )
    poll_interval_s: float = Field(0.5, gt=0, description="seconds between looks into the run directory")
    threads: int = Field(0, ge=0, description="CPU threads of a pool worker; 0 leaves torch's default")

    @model_validator(mode="after")
    def _one_place(self) -> PoolConfig:
        if self.external and self.ranks:
            raise ValueError("pool.external is a launch of its own: set pool.ranks to 0 in this one")
        return self

    @model_validator(mode="after")
    def _whole_teams(self) -> PoolConfig:
        if self.ranks % self.ranks_per_model:
            raise ValueError(
                f"pool.ranks {self.ranks} must be a multiple of pool.ranks_per_model {self.ranks_per_model}"
            )
        return self


class LoggingConfig(Section):
    tensorboard: bool = Field(False, description="write TensorBoard events to RUN/metrics/tensorboard")
    wandb_project: str | None = Field(None, description="W&B project; null: no W&B")
    prometheus_port: int | None = Field(
        None, ge=0, le=65535, description="port on the leader's node that serves metrics; 0: any; null: none"
    )
    prometheus_host: str = Field(
        "127.0.0.1", description="address to serve them on; they are open to whoever reaches it"
    )


class SharedConfig(Section):
    """What a training run and a search alone have in common: all that a search needs."""

    run_dir: str = Field(description="folder of this run; trainers and pool share it")
    seed: int = Field(0, ge=0, description="seed of weights, data order, probes and candidates")
    resume: Literal["auto", "never"] = Field("auto", description="auto continues what is in run_dir")
    deterministic: bool = Field(False, description="deterministic kernels only (slower on GPUs)")
    model: ModelConfig = ModelConfig()
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mixture: MixtureConfig = MixtureConfig()
    search: SearchConfig = SearchConfig()
    pool: TeamConfig = TeamConfig()

    @model_validator(mode="after")
    def _kernels_read_whole_weights(self) -> SharedConfig:
        if self.search.kernels == "triton" and self.pool.ranks_per_model > 1:
            raise ValueError(
                f"search.kernels triton reads whole weights, and pool.ranks_per_model "
                f"{self.pool.ranks_per_model} shards them: set it to auto or torch"
            )
        return self

    @model_validator(mode="after")
    def _flash_attention_dtype(self) -> SharedConfig:
        if "flash" in self.model.attention and self.engine.param_dtype == "float32":
            raise ValueError(
                f"model.attention {self.model.attention} computes in 16 bits: set engine.param_dtype to "
                "bfloat16"
            )
        if "flash" in self.model.attention and self.search.candidates.dtype == "float32":
            raise ValueError(
                f"model.attention {self.model.attention} computes in 16 bits: set search.candidates.dtype to "
                "auto or bfloat16"
            )
        return self


class StartConfig(Section):
    """What an earlier run hands on to this one."""

    run: str | None = Field(
        None,
        description="folder of an ended run to go on from: its weights and what it has read, in place of "
        "model.checkpoint and model.config",
    )
    optimizer: Literal["fresh", "keep"] = Field(
        "fresh", description="AdamW's moments: none, or those of that run's last checkpoint"
    )

    @model_validator(mode="after")
    def _whose_moments(self) -> StartConfig:
        if self.run is None and self.optimizer == "keep":
            raise ValueError("start.optimizer keep needs a start.run, whose moments they are")
        return self


class RunConfig(SharedConfig):
    """``opmix train``."""

    start: StartConfig = StartConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    pool: PoolConfig = PoolConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _one_start(self) -> RunConfig:
        given = [self.model.checkpoint, self.model.config, self.start.run]
        if sum(one is not None for one in given) == 1:
            return self
        if self.start.run is None:
            raise ValueError(f"{ONE_SOURCE}, or start.run")
        raise ValueError("start.run gives the weights: leave out model.checkpoint and model.config")

    @model_validator(mode="after")
    def _search_before_the_first_step(self) -> RunConfig:
        if self.search.start_fraction == 0 and self.start.run is None:
            raise ValueError("search.start_fraction 0 needs a start.run: a fresh model has learnt nothing")
        return self

    @model_validator(mode="after")
    def _replay_of_what(self) -> RunConfig:
        if isinstance(self.data.replay_samples, int) and self.start.run is None:
            raise ValueError("data.replay_samples needs a start.run, or samples by domain")
        return self

    @model_validator(mode="after")
    def _adapters_beside_whole_weights(self) -> RunConfig:
        if self.model.lora is not None and self.engine.float8:
            raise ValueError("model.lora leaves no layer to engine.float8: set that to false")
        if self.model.lora is not None and self.engine.fsdp.tensor_parallel > 1:
            raise ValueError(
                f"model.lora trains beside whole weights, and engine.fsdp.tensor_parallel is "
                f"{self.engine.fsdp.tensor_parallel}: set it to 1"
            )
        if self.model.lora is not None and self.start.optimizer == "keep":
            raise ValueError(
                "model.lora trains fresh adapters, of which no earlier run has moments: set start.optimizer "
                "to fresh"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_the_method(self) -> RunConfig:
        """Refused here and not where engines are built, which a later stage of a lifecycle comes to only when
        the others have been trained."""
        engine, method = self.engine.name, self.method.name
        if engine not in PLAIN_ENGINES:
            return self
        if self.model.lora is not None:
            raise ValueError(
                f"model.lora does not train on engine.name {engine}: set it to single or fsdp, or leave out "
                "model.lora"
            )
        if method != "plain":
            raise ValueError(
                f"method.name {method} does not run on engine.name {engine}: set it to single or fsdp, or "
                "method.name to plain"
            )
        return self

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
        """The step boundary at which the search starts: before the last step, and at least 1 where the search
        is not to come before the first."""
        if self.search.start_fraction == 0:
            return 0
        return min(max(1, round(self.search.start_fraction * self.train.steps)), max(1, self.train.steps - 1))


class SearchRunConfig(SharedConfig):
    """``opmix search``: a search alone, from ``model.checkpoint``.

    ``mixture.initial`` is the mixture that the checkpoint was trained on, ``optimizer`` the base of the
    probes'.
    """

    tokens_to_train: int | None = Field(
        None, ge=1, description="tokens that the proposal is for; needed by search.proposal.max_repetitions"
    )

    @model_validator(mode="after")
    def _search_alone(self) -> SearchRunConfig:
        if self.model.checkpoint is None:
            raise ValueError("a search starts from a trained model: set model.checkpoint, not model.config")
        if self.search.proposal.max_repetitions is not None and self.tokens_to_train is None:
            raise ValueError("search.proposal.max_repetitions needs tokens_to_train: set both or none")
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
    "engine.fsdp",
    "engine.deepspeed",
    "engine.megatron",
    "engine.compile",
    "engine.peak_tflops",
    "engine.logits_memory",
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
    "train.hang_timeout_s",
    "train.on_bad_step",
    "train.max_bad_steps",
    "train.spike_deviations",
    "train.grad_norm_deviations",
    "train.spike_window",
    "search.kernels",  # what was evaluated otherwise is not used; probes that are trained stay
)


# What may change between two calls of one search: probes and evaluations that stay valid are used again.
SEARCH_MAY_CHANGE = (
    *(key for key in RESUME_MAY_CHANGE if key.partition(".")[0] in SearchRunConfig.model_fields),
    "tokens_to_train",
    "mixture.policy",
    "search.mode",
    "search.start_fraction",
    "search.method",
    "search.gradients",
    "search.calibration",
    "search.candidates",
    "search.law",
    "search.refinement",
    "search.gradient",
    "search.proposal",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted overrides and check it; raises UserError as ``read_settings`` and
    ``check_settings`` do."""
    data = read_settings(path, overrides)
    if "stages" in data:
        raise UserError(
            f"{path} is a lifecycle: `opmix lifecycle` and `opmix launch` go through its stages; `opmix "
            f"lifecycle {path} --print-config` prints each one's settings as a run"
        )
    return check_config(data)


def check_config(data: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values into a :class:`RunConfig`; raises UserError as ``check_settings`` does."""
    return check_settings(RunConfig, data)


def load_search_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SearchRunConfig, list[str]]:
    """As ``load_config``, for a search alone. The configuration of a training run will do: its sections that
    a search has no use for are left out, and returned by name."""
    data = read_settings(path, overrides)
    of_training = set(RunConfig.model_fields) - set(SearchRunConfig.model_fields)
    unused = [name for name in data if name in of_training]
    used = {name: value for name, value in data.items() if name not in of_training}
    if isinstance(pool := used.get("pool"), dict):
        of_pool = set(PoolConfig.model_fields) - set(TeamConfig.model_fields)
        unused += [f"pool.{name}" for name in pool if name in of_pool]
        used["pool"] = {name: value for name, value in pool.items() if name not in of_pool}
    return check_settings(SearchRunConfig, used), unused
