"""The engine for one process: plain torch, no sharding. FSDP2 builds on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.base import BatchLoss, Engine, Kind, Replica, StepResult, loss_checks
from opmix_dist.engines.blocks import prepare_blocks, use_float8
from opmix_dist.engines.held import HeldBytes, HeldCounter
from opmix_dist.engines.optimizer import adamw, moments, start_moments
from opmix_dist.engines.transfer import read_later, send
from opmix_dist.method_config import LoRAConfig
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.chunked_head import ChunkedHead, chunked_head
from opmix_dist.models.flops import count_flops
from opmix_dist.models.loss import losses_of_logits, sample_losses
from opmix_dist.models.source import Index, ModelSource
from opmix_dist.models.trained_lora import adapt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SingleEngine(Engine):
    """AdamW on a model that fits on one device; bf16 through autocast with float32 master parameters."""

    takes_methods = True

    def __init__(
        self,
        source: ModelSource,
        world: World,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        sequence_length: int,
        lora: LoRAConfig | None = None,
        adapter_seed: int = 0,
    ) -> None:
        self.world, self.config, self.max_grad_norm = world, config, optimizer.max_grad_norm
        self.replica = self._find_replica()
        self.hf_config, self.shapes = source.hf_config, source.shapes
        model = source.build()
        self.flops = count_flops(model, sequence_length, 0 if lora is None else lora.rank)
        cast(nn.Module, model).train()
        if config.float8:
            use_float8(transformer_blocks(model), world.device)
        self.model = model
        self.adapters = None if lora is None else adapt(model, lora, seed=adapter_seed)
        self.head = self._chunked_head()
        self._place(source)
        self._trained_parameters = [self._parameter(name) for name in self.trained]
        self.optimizer = self._start_optimizer(optimizer)

    @property
    def layout(self) -> str:
        return "single"

    @cached_property
    def trained(self) -> dict[str, torch.Size]:
        if self.adapters is None:
            return self.shapes
        return {name: self.adapters.shape(name) for name in self.adapters.names}

    @property
    def train_flops(self) -> float:
        return super().train_flops if self.adapters is None else self.flops.probe()

    def _find_replica(self) -> Replica:
        return Replica(0, 1)

    def _chunked_head(self) -> ChunkedHead | None:
        return chunked_head(self.model, self.config.logits_memory, compiled=self._compiles_loss)

    def _place(self, source: ModelSource) -> None:
        """Bring the model, whose parameters are on the meta device, to the trainers' devices."""
        materialise(self.model, self.world.device)
        for name in self._all_names:
            self._set_whole("parameter", name, self._initial(source, name, ()))
        prepare_blocks(transformer_blocks(self.model), self.config)

    @property
    def _all_names(self) -> list[str]:
        """Of the parameters, adapters included."""
        return [*self.shapes, *(() if self.adapters is None else self.adapters.names)]

    def _initial(self, source: ModelSource, name: str, index: Index) -> Tensor:
        if name in self.shapes:
            return source.part(name, index)
        assert self.adapters is not None
        return self.adapters.initial(name)[index]

    def _start_optimizer(self, config: OptimizerConfig) -> torch.optim.AdamW:
        optimizer = adamw(self.model, self.trained, config, fused=self.world.device.type == "cuda")
        start_moments(optimizer, self._trained_parameters)
        return optimizer

    def held_bytes(self) -> HeldBytes:
        counter, parameters = HeldCounter(self.world.device), list(self.model.parameters())
        return HeldBytes(
            parameters=counter.count(parameters),
            gradients=counter.count_like(self._trained_parameters),
            optimizer=counter.count(moments(self.optimizer)),
            offloaded=counter.offloaded,
        )

    def recomputed_flops(self, tokens: int) -> float:
        chunked = self.head is not None and self.head.needed(tokens)
        return super().recomputed_flops(tokens) + (self.flops.head if chunked else 0.0)

    def _compute_context(self) -> AbstractContextManager[None]:
        """Around every forward pass and its backward pass."""
        dtype = DTYPES[self.config.param_dtype]
        if dtype is torch.float32:
            return nullcontext()
        return cast(AbstractContextManager[None], torch.autocast(self.world.device.type, dtype))

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Around the passes of a micro-batch; ``last`` is where gradients are reduced."""
        yield

    def _losses(self, batch: TokenBatch) -> Tensor:
        """Sums [B] of a batch on the device."""
        if self._batch_loss is not None:
            return self._batch_loss(cast(nn.Module, self.model), batch)
        return sample_losses(self.model, batch, self.head, self._losses_of_logits)

    @cached_property
    def _losses_of_logits(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Compiled, the loss reads logits twice and keeps no float32 copy of them, which are the most that a
        step holds."""
        return torch.compile(losses_of_logits) if self._compiles_loss else losses_of_logits

    @property
    def _compiles_loss(self) -> bool:
        return self.config.compile

    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        # one look at the results in the whole step: the host runs ahead of a GPU, which goes on with AdamW
        # while the step is booked and the next batch comes
        sample_sums = self._passes(microbatches, total)
        if self._adjust is not None:
            self._adjust(self._gradients())
        checks, norm = self._clip(loss_checks(sample_sums))
        results = read_later(torch.cat([sample_sums, checks, norm[None]]))
        bad, nats = checks
        refused = (bad > 0) | (nats / total > self._loss_limit) | ~norm.isfinite() | (norm > self._norm_limit)
        self._apply(lr, refused=refused)
        self._drop_gradients()
        found = results()
        result = StepResult(found[:-3], targets, found[-1].item())
        self._require_good(result, found[-3:-1], total)
        return result

    def _passes(self, microbatches: Sequence[TokenBatch], total: float) -> Tensor:
        """Forward and backward passes; leaves the gradient of the sum of all replicas' losses over ``total``.

        Returns:
            Sums of this replica's samples, [b] float64 on the device.
        """
        on_device = send(microbatches, self.world.device)  # all before the first pass
        losses = []
        for i, batch in enumerate(on_device):
            with self._accumulating(i == len(on_device) - 1):
                with self._compute_context():
                    sums = self._losses(batch)
                # gradients are averaged over replicas, hence the factor
                (sums.sum() * (self.replica.size / total)).backward()
            losses.append(sums.detach())
        self._complete_gradients()
        return torch.cat(losses).double()

    def gradient(
        self, microbatches: Sequence[TokenBatch], *, total: float, loss: BatchLoss | None = None
    ) -> dict[str, Tensor]:
        """Of the sum of all replicas' losses over ``total``, without dropout: this rank's part for each
        trained parameter, by name. Changes nothing.

        Args:
            microbatches: the same number of them on every rank, and the same samples on all ranks of a
                replica.
            loss: in place of the cross-entropy.
        """
        self.model.eval()
        self._batch_loss = loss
        try:
            self._passes(microbatches, total)
            return self._gradients()
        finally:
            self._batch_loss = None
            self.model.train()
            self._drop_gradients()

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of each trained parameter, by name, in the memory that is trained."""
        return self._tensors("parameter")

    def place(self, name: str) -> Index:
        """Where this rank's part lies in the whole; () is all of it."""
        return ()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """What the ranks' parts make together: of a tensor that is divided as the parameter ``name`` is.
        On every rank."""
        return part

    def sum_parts(self, values: Tensor) -> Tensor:
        """Numbers that were summed over this rank's parts, [..., P] in the order of ``trained``, to what they
        are over whole parameters, summed over these: [...] float64 on the CPU, on every rank."""
        return values.double().sum(dim=-1).cpu()

    def _apply(self, lr: float, *, refused: Tensor) -> None:
        """AdamW's step, unless it is ``refused`` (0-dimensional, on the device). The fused AdamW looks at
        that on the device itself, as it does for a GradScaler; elsewhere the host looks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = refused.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not refused:
            self.optimizer.step()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _complete_gradients(self) -> None:
        """A parameter that no sample has used (an expert) has a gradient of 0, so that all have made the same
        number of AdamW's steps, in this engine as in others."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's part of each, by name; what is changed in place is changed in the step."""
        return {name: cast(Tensor, self._parameter(name).grad) for name in self.trained}

    def _clip(self, checks: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient.

        Args:
            checks: :func:`loss_checks` of this replica's samples.

        Returns:
            Their sum over the replicas, and the gradient's norm before, float64 on the device and on every
            rank.
        """
        return checks, nn.utils.clip_grad_norm_(self._trained_parameters, self.max_grad_norm).double()

    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        self.model.eval()
        try:
            with self._compute_context():
                parts = [self._losses(part.to(self.world.device)) for part in batch.split(batch_size)]
        finally:
            self.model.train()
        return torch.cat(parts).double().cpu()

    @property
    def optimizer_steps(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    def _tensors(self, kind: Kind) -> dict[str, Tensor]:
        """The tensors that this engine works with, by name."""
        return {name: self._tensor(kind, name) for name in self.trained}

    def _tensor(self, kind: Kind, name: str) -> Tensor:
        parameter = self._parameter(name)
        return parameter.detach() if kind == "parameter" else self.optimizer.state[parameter][kind]

    def _parameter(self, name: str) -> nn.Parameter:
        return cast(nn.Module, self.model).get_parameter(name)

    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors(kind).items()

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        if self.adapters is None:
            yield from super()._merged()
            return
        for name in self.shapes:
            yield name, self.adapters.merged(name, self._whole_parameter)

    def _whole_parameter(self, name: str) -> Tensor:
        """Adapters and frozen ones too; collective."""
        return self._tensor("parameter", name)

    def _set_whole(self, kind: Kind, name: str, tensor: Tensor) -> None:
        self._tensor(kind, name).copy_(tensor)


def materialise(model: PreTrainedModel, device: torch.device, buffers: torch.device | None = None) -> None:
    """Give parameters that are on the meta device uninitialised memory; buffers, which have their values,
    move.

    Args:
        device: of the parameters.
        buffers: device of the buffers; None: the same.
    """
    module = cast(nn.Module, model)
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(buffers or device))
    model.tie_weights()
