"""What DeepSpeed is told: our settings, and those of a user's ds_config.json that do not contradict them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opmix_dist.bounded import read_json
from opmix_dist.config import DeepSpeedConfig, EngineConfig, OptimizerConfig, RunConfig
from opmix_dist.errors import UserError

Settings = dict[str, Any]

_TAKEN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "optimizer",
    "scheduler",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "comet",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
)
"""Of DeepSpeed's sections; others train something else than the loop does, or in another way."""

_REQUIRED: dict[str, tuple[Any, str]] = {
    "bf16.check_grad_overflow": (True, "a gradient with a NaN must not be applied"),
    "bf16.bf16_master_weights_and_grads": (False, "checkpoints hold float32"),
    "bf16.bf16_optimizer_states": (False, "checkpoints hold float32"),
    "zero_optimization.compute_grad_norm": (True, "the norm is logged and clipped to"),
    "zero_optimization.zenflow": (None, "its selected gradients are not those of AdamW"),
    "zero_optimization.cpu_offload": (False, "it is written offload_optimizer.device now"),
    "zero_optimization.cpu_offload_param": (False, "it is written offload_param.device now"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "checkpoints hold the whole of AdamW's state"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it brings an optimiser of its own"),
}
"""Value of a dotted setting that other ones do not go with, and why."""

MAX_CONFIG_BYTES = 1 << 20
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class _Decided(NamedTuple):
    """A dotted setting of DeepSpeed's whose value ours decide."""

    path: str
    value: Any
    ours: str
    """Our setting and what it is."""


def deepspeed_settings(engine: EngineConfig, optimizer: OptimizerConfig) -> Settings:
    """The whole of DeepSpeed's configuration.

    Batch sizes in it are of a single sample: DeepSpeed only reports them, since the engine scales losses
    itself and says which micro-batch is the last.

    Raises:
        UserError: the file cannot be read, or one of its settings contradicts ours or cannot be had here.
    """
    user = _user_settings(engine.deepspeed)
    for decided in (*_decided(engine, optimizer), *_decided_of_zero(engine.deepspeed)):
        _require_same(user, decided)
    for path, (value, reason) in _REQUIRED.items():
        found = _get(user, path)
        if found not in (None, value):
            raise _error(f"{path} {_shown(found)} cannot be had here, {reason}: remove it")
    _require_adamw(user)
    if (scheduler := _get(user, "scheduler.type")) is not None:
        raise _error(
            f"scheduler.type is {scheduler}, but learning rates follow the section `schedule` up to "
            f"optimizer.lr {optimizer.lr:g}: remove it"
        )
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "communication_data_type": _DTYPES[engine.reduce_dtype],
        "bf16": {**user.get("bf16", {}), "enabled": engine.param_dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32", **user.get("data_types", {})},
        "zero_optimization": _zero_settings(engine.deepspeed, user.get("zero_optimization", {})),
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is fused on the CPU too
    }
    dropped = ("train_batch_size", "optimizer", "scheduler", "fp16")
    return {key: value for key, value in user.items() if key not in dropped} | ours


def require_same_batches(config: RunConfig, ranks: int) -> None:
    """
    Args:
        ranks: of the trainers.

    Raises:
        UserError: batch sizes in the user's file contradict ours.
    """
    train, user = config.train, _user_settings(config.engine.deepspeed)
    whole = _named("train.global_batch_size", train.global_batch_size)
    part = _named("train.micro_batch_size", train.micro_batch_size)
    passes = train.global_batch_size // (train.micro_batch_size * ranks)
    _require_same(user, _Decided("train_batch_size", *whole))
    _require_same(user, _Decided("train_micro_batch_size_per_gpu", *part))
    made = f"{whole[1]} and {part[1]}, which make {passes} on {ranks} rank(s)"
    _require_same(user, _Decided("gradient_accumulation_steps", passes, made))


def require_repeatable(engine: EngineConfig) -> None:
    """
    Raises:
        UserError: reductions overlap the backward pass, which has been seen to give other losses in each run
            (deepspeedai/DeepSpeed, issues 2867 and 5523).
    """
    if _get(_user_settings(engine.deepspeed), "zero_optimization.overlap_comm"):
        raise _error("zero_optimization.overlap_comm does not go with deterministic: set it to false")


def _decided(engine: EngineConfig, optimizer: OptimizerConfig) -> Iterator[_Decided]:
    dtype = f"engine.param_dtype is {engine.param_dtype}"
    yield _Decided("bf16.enabled", engine.param_dtype == "bfloat16", dtype)
    yield _Decided("fp16.enabled", False, dtype)
    yield _Decided("data_types.param_dtype", _DTYPES[engine.param_dtype], dtype)
    reduced = f"engine.reduce_dtype is {engine.reduce_dtype}"
    yield _Decided("communication_data_type", _DTYPES[engine.reduce_dtype], reduced)
    yield _Decided("gradient_clipping", *_named("optimizer.max_grad_norm", optimizer.max_grad_norm))
    yield _Decided("optimizer.params.betas", *_named("optimizer.betas", list(optimizer.betas)))
    for name in ("lr", "eps", "weight_decay"):
        yield _Decided(f"optimizer.params.{name}", *_named(f"optimizer.{name}", getattr(optimizer, name)))


def _decided_of_zero(ours: DeepSpeedConfig) -> Iterator[_Decided]:
    """What is not null in ours."""
    for path, name in (
        ("stage", "stage"),
        ("offload_optimizer.device", "offload_optimizer"),
        ("offload_param.device", "offload_parameters"),
        ("offload_optimizer.nvme_path", "nvme_path"),
        ("offload_param.nvme_path", "nvme_path"),
    ):
        if (value := getattr(ours, name)) is not None:
            yield _Decided(f"zero_optimization.{path}", *_named(f"engine.deepspeed.{name}", value))


def _named(setting: str, value: Any) -> tuple[Any, str]:
    return value, f"{setting} is {_shown(value)}"


def _require_adamw(user: Settings) -> None:
    kind = str(_get(user, "optimizer.type") or "AdamW")
    decoupled = kind.lower() == "adamw" or (
        kind.lower() == "adam" and _get(user, "optimizer.params.adam_w_mode") is not False
    )
    if not decoupled:
        raise _error(
            f"optimizer.type is {_shown(kind)}, but the section `optimizer` is that of AdamW, whose weight "
            "decay is decoupled: remove it"
        )


def _zero_settings(ours: DeepSpeedConfig, user: Settings) -> Settings:
    stage = ours.stage or user.get("stage", 2)
    if stage not in (1, 2, 3):
        raise _error(f"zero_optimization.stage is {_shown(stage)}, not 1, 2 or 3: choose one of them")
    # true would put a function of its own in the place of torch.nn.functional.linear for the whole process
    zero: Settings = {"memory_efficient_linear": False, **user, "stage": stage}
    for key, name in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        section: Settings = dict(zero.pop(key, None) or {})
        device = getattr(ours, name) or section.get("device", "none")
        if device == "none":
            continue
        if key == "offload_param" and stage != 3:
            raise UserError(
                f"engine.deepspeed.{name} {device} needs ZeRO stage 3, not {stage}: set "
                "engine.deepspeed.stage to 3"
            )
        zero[key] = section | {"device": device}
        if device == "nvme":
            zero[key]["nvme_path"] = path = ours.nvme_path or section.get("nvme_path")
            if path is None:
                raise UserError(
                    f"engine.deepspeed.{name} nvme needs a folder: set engine.deepspeed.nvme_path to one"
                )
    return zero


def _user_settings(ours: DeepSpeedConfig) -> Settings:
    """Without what is ``auto``, a word of Hugging Face's trainer for: as set elsewhere."""
    given = ours.config or {}
    if isinstance(given, str):
        try:
            given = read_json(Path(given), MAX_CONFIG_BYTES)
        except OSError as error:
            raise UserError(f"cannot read engine.deepspeed.config {given}: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"engine.deepspeed.config: {error}") from None
        if not isinstance(given, dict):
            raise UserError(f"engine.deepspeed.config {ours.config} must hold an object of settings")
    for key in given:
        if key not in _TAKEN:
            raise _error(f"this engine does not take the section {key}: remove it")
    return _without_auto(given)


def _without_auto(settings: Mapping[str, Any]) -> Settings:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _require_same(user: Settings, decided: _Decided) -> None:
    found = _get(user, decided.path)
    if isinstance(found, str):
        found = _DTYPES.get(found, found)
    if found is not None and found != decided.value:
        raise _error(f"{decided.path} is {_shown(found)}, but {decided.ours}: change one of them")


def _get(settings: Settings, path: str) -> Any:
    """None: not there."""
    value: Any = settings
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _error(text: str) -> UserError:
    return UserError(f"engine.deepspeed.config: {text}")
