"""Megatron-core's model, schedules and distributed optimizer behind the Engine interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from opmix_dist.config import EngineConfig, OptimizerConfig, RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine, Kind, Replica, StepResult, loss_checks
from opmix_dist.engines.held import HeldBytes, HeldCounter
from opmix_dist.engines.megatron.cpu import cpu_in_place_of_cuda
from opmix_dist.engines.megatron.loss import document_mask, parallel_sample_losses
from opmix_dist.engines.megatron.model import build_stage, transformer_config
from opmix_dist.engines.megatron.shards import Shards
from opmix_dist.engines.megatron.support import (
    NO_DOCUMENT_MASK,
    require_settings,
    require_supported,
    uses_transformer_engine,
)
from opmix_dist.engines.megatron.weights import Index, Layout, Place, find_places, named_parameters
from opmix_dist.engines.transfer import send
from opmix_dist.errors import UserError
from opmix_dist.models.flops import count_flops
from opmix_dist.models.source import ModelSource


class MegatronEngine(Engine):
    """Tensor-parallel ranks are neighbours, pipeline stages are farthest apart, replicas are in between.

    Megatron's parallel state belongs to the process, so the engine that was built last is the one to use.
    """

    def __init__(
        self,
        source: ModelSource,
        world: World,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        sequence_length: int,
    ) -> None:
        """
        Raises:
            UserError: what Megatron cannot do of the model or on this machine, before anything is built.
        """
        model = source.build()
        require_supported(model, config, world, sequence_length)
        self.world, self.config, self.max_grad_norm = world, config, optimizer.max_grad_norm
        self.hf_config, self.shapes = source.hf_config, source.shapes
        self.flops = count_flops(model, sequence_length)
        self.has_transformer_engine = uses_transformer_engine(config, world)
        self._steps = 0
        with self._megatron(), torch.random.fork_rng(devices=[]):
            _divide_ranks(config)
            self.replica = _find_replica()
            stage = build_stage(
                model,
                transformer_config(source.hf_config, config, on_cpu=world.device.type == "cpu"),
                config,
                transformer_engine=self.has_transformer_engine,
                sequence_length=sequence_length,
            )
            self._find_parameters(stage)
            self.model = _data_parallel(stage, config)
            self.optimizer = _distributed_optimizer(self.model, optimizer)
            self._shards = Shards(self.optimizer)
        for name in self.shapes:
            self._fill("parameter", name, partial(source.part, name))

    @classmethod
    def check(cls, config: RunConfig, ranks: int) -> None:
        require_settings(config, ranks)

    def held_bytes(self) -> HeldBytes:
        """Parameters and gradients lie in Megatron's buffers; float32 parameters that are computed with are
        the optimizer's too, and count once."""
        counter = HeldCounter(self.world.device)
        buffers = self.model.buffers + self.model.expert_parallel_buffers
        return HeldBytes(
            parameters=counter.count(self.model.parameters()),
            gradients=counter.count(buffer.grad_data for buffer in buffers),
            optimizer=counter.count(self._shards.tensors()),
            offloaded=counter.offloaded,
        )

    def recomputed_flops(self, tokens: int) -> float:
        """Megatron's ``selective`` computes attention again, and ``full`` all of a block."""
        kind = self.config.activation_checkpointing
        return {"none": 0.0, "selective": self.flops.attention, "full": self.flops.blocks}[kind]

    @property
    def layout(self) -> str:
        settings = self.config.megatron
        return (
            f"megatron (tensor_parallel {settings.tensor_parallel}, pipeline_parallel "
            f"{settings.pipeline_parallel})"
        )

    def _megatron(self) -> AbstractContextManager[None]:
        """Around every call into Megatron's code."""
        return cpu_in_place_of_cuda() if self.world.device.type == "cpu" else nullcontext()

    def _find_parameters(self, stage: GPTModel) -> None:
        """Which parameters this stage has, and which stage is the first that has one."""
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self._layout = Layout(self.hf_config, parallel_state.get_tensor_model_parallel_rank(), ranks)
        self._parameters = dict(named_parameters(stage, stage.decoder.layers[0].layer_number - 1))
        stages = []
        for name in self.shapes:
            places = self._places(name)
            stages.append(self._stage if places else parallel_state.get_pipeline_model_parallel_world_size())
            for place in places:
                _mark_division(self._parameters[place.name], place)
        first = torch.tensor(stages, device=self.world.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
        self._first_stage = dict(zip(self.shapes, first.tolist(), strict=True))

    def _places(self, name: str) -> list[Place]:
        """Of a Hugging Face parameter on this stage."""
        places = find_places(name, tied=self.hf_config.tie_word_embeddings)
        return [place for place in places if place.name in self._parameters]

    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        with self._megatron():
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = self._run(microbatches, forward_only=False)
            unapplied = StepResult(losses, targets, math.nan)
            self._require_good(unapplied, self.sum(loss_checks(losses)), total)
            if math.isnan(total):  # a fault on purpose; the gradient is scaled within Megatron's schedule
                for buffer in self.model.buffers:
                    buffer.grad_data.fill_(total)
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.clip_grad_norm(self.max_grad_norm))
            if math.isfinite(grad_norm) and grad_norm <= self._norm_limit:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step_with_ready_grads()
                self._steps += 1
        return StepResult(losses, targets, grad_norm)

    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        """The schedules take micro-batches of one size: the last one repeats a sample."""
        rows = torch.arange(math.ceil(len(batch) / batch_size) * batch_size).clamp(max=len(batch) - 1)
        self.model.eval()
        try:
            with self._megatron():
                return self._run(batch[rows].split(batch_size), forward_only=True)[: len(batch)]
        finally:
            self.model.train()

    def _run(self, parts: Sequence[TokenBatch], *, forward_only: bool) -> Tensor:
        """Megatron's schedule: sums of the samples' losses [b] float64 on the CPU, on the last stage; zeros
        on the others. Leaves the gradient of the mean over all targets of the global batch."""
        sizes = {len(part) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"micro-batches of one step must have one size, not {sorted(sizes)}")
        on_device = send(parts, self.world.device)
        found = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(on_device),
            model=[self.model],
            num_microbatches=len(parts),
            seq_length=parts[0].sequence_length,
            micro_batch_size=len(parts[0]),
            forward_only=forward_only,
        )
        if not found:
            return torch.zeros(sum(len(part) for part in parts), dtype=torch.float64)
        return torch.cat(found).double().cpu()

    def _forward(self, batches: Iterator[TokenBatch], model: nn.Module) -> tuple[Tensor, Any]:
        """One micro-batch through this stage: its output, and what turns that of the last stage into a
        loss."""
        batch = next(batches)
        places = torch.arange(batch.sequence_length, device=batch.tokens.device).expand_as(batch.tokens)
        mask = None if batch.position_ids is None else self._document_mask(batch.position_ids)
        return model(batch.tokens, places, mask), partial(self._loss, batch)

    def _document_mask(self, position_ids: Tensor) -> Tensor:
        if self.has_transformer_engine:
            raise UserError(NO_DOCUMENT_MASK)
        return document_mask(position_ids)

    def _loss(self, batch: TokenBatch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses, number of targets, and the sums of single samples [B]."""
        losses = parallel_sample_losses(
            logits,
            batch,
            first=parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1],
            vocab_size=self.hf_config.vocab_size,
        )
        return losses.sum(), batch.loss_mask.sum().int(), losses.detach()

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._steps = steps
        self._shards.set_steps(steps)

    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Put together over replicas, over tensor-parallel ranks, then handed to the other stages."""
        gathered: tuple[str, Tensor] | None = None
        for name, shape in self.shapes.items():
            if self._first_stage[name] == self._stage:
                place = self._places(name)[0]
                # several of Hugging Face's are in one of Megatron's, and follow each other
                if gathered is None or gathered[0] != place.name:
                    gathered = place.name, self._shards.whole(kind, self._parameters[place.name])
                whole = self._join(place, gathered[1], shape)
            else:
                whole = torch.empty(shape, device=self.world.device)
            self._hand_on(whole, self._first_stage[name])
            yield name, whole

    def _join(self, place: Place, local: Tensor, shape: torch.Size) -> Tensor:
        """A whole Hugging Face parameter; collective over the tensor-parallel ranks."""
        part = self._layout.take(place, local).contiguous()
        if place.axis is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self._layout.ranks)]
        dist.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
        # without the padding of a vocabulary
        return torch.cat(parts, dim=place.axis).narrow(place.axis, 0, shape[place.axis]).contiguous()

    def _hand_on(self, whole: Tensor, stage: int) -> None:
        """From a stage to all; collective over the pipeline."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(whole, src=dist.get_global_rank(group, stage), group=group)

    def _set_whole(self, kind: Kind, name: str, tensor: Tensor) -> None:
        self._fill(kind, name, tensor.__getitem__)

    @torch.no_grad()
    def _fill(self, kind: Kind, name: str, part: Callable[[Index], Tensor]) -> None:
        """Take what this rank has of a parameter."""
        for place in self._places(name):
            parameter = self._parameters[place.name]
            index: Index = self._layout.index(place, parameter, self.shapes[name])
            values = part(index)
            write = partial(self._layout.put, place, part=values)
            self._shards.fill(kind, parameter, write)


def _divide_ranks(config: EngineConfig) -> None:
    """Megatron's groups within the trainers' own; collective over all of them."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        config.megatron.tensor_parallel,
        config.megatron.pipeline_parallel,
        distributed_timeout_minutes=config.collective_timeout_s / 60,
        create_gloo_process_groups=False,
    )
    # of dropout, which there is none of; Megatron saves and restores its states nevertheless
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def _find_replica() -> Replica:
    """The losses are on the last stage, on all of its tensor-parallel ranks."""
    return Replica(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        counts=parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0,
    )


def _mark_division(parameter: nn.Parameter, place: Place) -> None:
    """Megatron does so where it initialises parameters; those without the mark are the same on all
    tensor-parallel ranks and enter the gradient's norm once."""
    if place.axis is not None and not getattr(parameter, "tensor_model_parallel", False):
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, place.axis, 1)


def _data_parallel(stage: GPTModel, config: EngineConfig) -> DistributedDataParallel:
    settings = stage.config
    module = Float16Module(settings, stage) if settings.bf16 else stage
    model = DistributedDataParallel(
        settings,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=config.reduce_dtype == "float32",
            overlap_grad_reduce=config.megatron.overlap_grad_reduce,
        ),
        module,
    )
    settings.finalize_model_grads_func = finalize_model_grads
    if config.megatron.overlap_grad_reduce:
        settings.no_sync_func = model.no_sync
    return model


def _distributed_optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> DistributedOptimizer:
    """AdamW; Megatron's own groups keep weight decay to matrices."""
    chained = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            use_distributed_optimizer=True,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    (optimizer,) = chained.chained_optimizers
    for group in optimizer.param_groups:  # which Megatron's scheduler would do
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer
