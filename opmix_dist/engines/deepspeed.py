"""DeepSpeed: ZeRO stages 1 to 3 over the trainer ranks, with torch's AdamW."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from opmix_dist.config import EngineConfig, OptimizerConfig, RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.base import Kind, NonFiniteError, Replica, StepResult, loss_checks
from opmix_dist.engines.blocks import prepare_blocks
from opmix_dist.engines.deepspeed_config import (
    Settings,
    deepspeed_settings,
    require_repeatable,
    require_same_batches,
)
from opmix_dist.engines.deepspeed_files import require_nvme, save_native
from opmix_dist.engines.held import HeldBytes, HeldCounter
from opmix_dist.engines.optimizer import adamw, moments, start_moments
from opmix_dist.engines.single import DTYPES, SingleEngine, materialise
from opmix_dist.engines.transfer import send
from opmix_dist.errors import UserError
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.loss import sample_losses
from opmix_dist.models.source import ModelSource


class DeepSpeedEngine(SingleEngine):
    """AdamW's state (stage 1), gradients too (2), or parameters too (3) are divided over the ranks.

    The float32 masters and moments are flat pieces, which DeepSpeed's accessors put together by parameter.
    Forward and backward passes go through its engine: hooks there gather, reduce and count. Stage 3 computes
    with a copy of its masters' parts, stages 1 and 2 with whole parameters.
    """

    takes_methods = False

    def __init__(
        self,
        source: ModelSource,
        world: World,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        sequence_length: int,
    ) -> None:
        self.settings = deepspeed_settings(config, optimizer)
        self.stage: int = self.settings["zero_optimization"]["stage"]
        if torch.are_deterministic_algorithms_enabled():  # which stage 3 does if it is told nothing
            self.settings["zero_optimization"].setdefault("overlap_comm", False)
        _require_supported(source.hf_config, config, self.stage)
        _load_deepspeed(world.device, quiet="log_level" not in self.settings)
        _require_accepted(self.settings)
        require_nvme(self.settings)
        super().__init__(source, world, config=config, optimizer=optimizer, sequence_length=sequence_length)
        # only now, since DeepSpeed would make float32 masters of bfloat16 parameters
        for name in self.shapes:
            self._set_whole("parameter", name, source.tensor(name))
        self._after_loading()

    @classmethod
    def check(cls, config: RunConfig, ranks: int) -> None:
        if config.train.grad_norm_deviations is not None:
            raise UserError(
                "train.grad_norm_deviations needs another engine, since DeepSpeed applies a step before it "
                "tells the gradient's norm: unset it, or set engine.name to fsdp"
            )
        require_same_batches(config, ranks)
        if config.deterministic:
            require_repeatable(config.engine)

    @property
    def layout(self) -> str:
        return f"deepspeed (stage {self.stage})"

    def _find_replica(self) -> Replica:
        return Replica(self.world.rank, self.world.size)

    def _place(self, source: ModelSource) -> None:
        model, device = cast(nn.Module, self.model), self.world.device
        prepare_blocks(transformer_blocks(self.model), self.config)
        for parameter in model.parameters():  # on the meta device still
            parameter.data = parameter.data.to(DTYPES[self.config.param_dtype])
        if self.stage == 3:
            _partition(model, self.shapes, device, self.settings)
            self.model.tie_weights()
        else:
            materialise(self.model, device)
        self._parameters = dict(model.named_parameters())

    def _start_optimizer(self, config: OptimizerConfig) -> torch.optim.AdamW:
        import deepspeed

        offloaded = "offload_optimizer" in self.settings["zero_optimization"]
        fused = offloaded or self.world.device.type == "cuda"
        with redirect_stdout(io.StringIO()):  # where stage 1 prints memory that is in use
            self.engine, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=adamw(self.model, self.shapes, config, fused=fused),
                config=self.settings,
            )
        optimizer = cast(torch.optim.AdamW, self.engine.basic_optimizer)
        if self.stage == 3:
            self._start_moments_of_parts(optimizer)
        else:
            start_moments(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._forward = _Forward(self.engine, self.hf_config)
        return optimizer

    def _start_moments_of_parts(self, optimizer: torch.optim.AdamW) -> None:
        """Of stage 3, whose parts may be on NVMe meanwhile."""
        zero = self.engine.optimizer
        for i, part in enumerate(zero.fp32_partitioned_groups_flat):
            swapped = zero._swappable_optimizer_subgroup(i)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(i)
            start_moments(optimizer, [part])
            if swapped:
                zero._optimizer_states_and_gradient_swap_out(i)

    def held_bytes(self) -> HeldBytes:
        """Of stage 3, parameters are the parts, and those that stay gathered (DeepSpeed's threshold), and
        gradients a buffer that is always there. Of stage 2, gradients are this rank's part of each group; of
        stage 1 whole. All gradients are float32."""
        zero, counter = self.engine.optimizer, HeldCounter(self.world.device)
        if self.stage == 3:
            parts = [cast(Any, parameter).ds_tensor for parameter in self._parameters.values()]
            parameters = counter.count([*parts, *self._parameters.values()])
            gradients = counter.count([zero.grad_partitions_flat_buffer])
            masters = zero.fp32_partitioned_groups_flat
        else:
            parameters = counter.count(self._parameters.values())
            masters = zero.single_partition_of_fp32_groups
            source = masters if self.stage == 2 else list(self._parameters.values())
            gradients = counter.count_like(source, torch.float32)
        return HeldBytes(
            parameters=parameters,
            gradients=gradients,
            optimizer=counter.count([*masters, *moments(self.optimizer)]),
            offloaded=counter.offloaded,
        )

    def _compute_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # the parameters that it computes with have the dtype

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def _losses(self, batch: TokenBatch) -> Tensor:
        return sample_losses(cast(nn.Module, self._forward), batch, self.head, self._losses_of_logits)

    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        on_device = send(microbatches, self.world.device)
        losses: list[Tensor] = []
        for i, batch in enumerate(on_device):
            last = i == len(on_device) - 1
            with self._accumulating(last):
                sums = self._losses(batch)
                good = sums.detach().isfinite().all()
                if last:
                    good &= self._within_limit(torch.cat([*losses, sums.detach()]), total)
                # Gradients are averaged over ranks, hence the factor. One of NaN makes the gradient's norm
                # NaN on all ranks, and DeepSpeed drop the step.
                factor = torch.where(good, self.replica.size / total, torch.nan)
                self.engine.backward(sums.sum() * factor, scale_wrt_gas=False)
            losses.append(sums.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        sample_sums = torch.cat(losses).double().cpu()
        if not self.engine.was_step_applied():
            refused = StepResult(sample_sums, targets, math.nan)
            self._require_good(refused, self.sum(loss_checks(sample_sums)), total)
            raise NonFiniteError("DeepSpeed met a NaN or inf in the gradient", sample_sums, targets)
        return StepResult(sample_sums, targets, float(self.engine.get_global_grad_norm()))

    def _within_limit(self, losses: Tensor, total: int) -> bool:
        """Collective. Whether the mean loss is; asked before the last backward pass, because DeepSpeed
        itself decides then whether it applies a step.

        Args:
            losses: [b], this rank's.
        """
        if math.isinf(self._loss_limit):
            return True
        nats = self.sum(loss_checks(losses.cpu()))[1]
        return float(nats) / total <= self._loss_limit

    def _drop_gradients(self) -> None:
        """DeepSpeed has done so, and keeps the memory."""

    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._parameters.items():
            if kind == "parameter":
                yield name, safe_get_full_fp32_param(parameter)
            else:
                yield name, safe_get_full_optimizer_state(parameter, kind)

    def _set_whole(self, kind: Kind, name: str, tensor: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._parameters[name]
        if self.stage == 3 and tensor.numel() % self.world.size:
            self._set_padded(kind, parameter, tensor)
        elif kind == "parameter":
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, kind)
        if self.stage == 3 and kind == "parameter":
            self._set_computed(parameter, tensor)

    def _set_padded(self, kind: Kind, parameter: nn.Parameter, tensor: Tensor) -> None:
        """The ranks' parts are of one size, the last one padded, which the setters of whole tensors do not
        know."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = -(-tensor.numel() // self.world.size)
        padded = F.pad(tensor.flatten(), (0, size * self.world.size - tensor.numel()))
        part = padded[self.world.rank * size :][:size]
        if kind == "parameter":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _set_computed(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """The copy that stage 3 computes with."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if self.world.rank == 0:
                parameter.data.copy_(tensor)

    def _after_loading(self) -> None:
        if self.stage < 3:
            self.engine.optimizer.update_lp_params()

    def save_beside(self, folder: Path) -> None:
        if self.config.deepspeed.native_checkpoints:
            save_native(self.engine, folder / "deepspeed", f"step_{self.optimizer_steps}", self.world)


class _Forward:
    """The model as the loss calls it, through DeepSpeed."""

    def __init__(self, engine: Any, config: PretrainedConfig) -> None:
        self.engine, self.config = engine, config

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)


def _require_supported(hf_config: PretrainedConfig, config: EngineConfig, stage: int) -> None:
    if config.float8:
        raise UserError("engine.float8 is for the engines single and fsdp: set it to false, or engine.name")
    text = hf_config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        # ranks whose samples use different experts would reduce different buckets
        raise UserError(
            f"engine.name deepspeed does not train experts, which {text.model_type} has: take fsdp"
        )
    if stage == 3 and config.compile:
        # it works, but every module's hooks end a graph, and are compiled themselves
        raise UserError(
            "engine.compile has no use with ZeRO stage 3: set it to false, or engine.deepspeed.stage to 2"
        )


def _load_deepspeed(device: torch.device, *, quiet: bool) -> None:
    """Import it for the trainers' group, which exists already: without one, it would make one of the whole
    launch.

    Collective over the trainer ranks.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process without a launcher
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine.name deepspeed needs the package {error.name}: install it or choose another engine"
        ) from None
    if device.type == "cpu":
        # else it compiles, for a minute, a reduction through shared memory
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if quiet:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # of names of collectives that torch is about to change, at every call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _require_accepted(settings: Settings) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"engine.deepspeed.config: DeepSpeed does not accept it: {reason}") from None


def _partition(
    model: nn.Module, shapes: dict[str, torch.Size], device: torch.device, settings: Settings
) -> None:
    """Give each rank its part of the parameters, uninitialised: one parameter is whole at a time."""
    import deepspeed

    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    partition = None
    for name in shapes:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        meta = cast(nn.Parameter, module._parameters[key])
        module._parameters[key] = parameter = nn.Parameter(torch.empty_like(meta, device=device))
        if partition is None:
            # the group is named, since DeepSpeed does not believe in one trainer in a launch of several ranks
            alone = nn.ParameterList([parameter])
            deepspeed.zero.Init(
                module=alone, data_parallel_group=dist.group.WORLD, config_dict_or_path=settings
            )
            partition = cast(Any, parameter).convert_to_zero_parameters
        else:
            partition(param_list=[parameter])
