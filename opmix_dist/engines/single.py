"""The engine for one process: plain torch, no sharding. FSDP2 builds on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine, Kind, Replica, StepResult, loss_checks
from opmix_dist.engines.blocks import prepare_blocks, use_float8
from opmix_dist.engines.held import HeldBytes, HeldCounter
from opmix_dist.engines.transfer import read_later, send
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.chunked_head import ChunkedHead, chunked_head
from opmix_dist.models.flops import count_flops
from opmix_dist.models.loss import losses_of_logits, sample_losses
from opmix_dist.models.source import ModelSource

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
    ) -> None:
        self.world, self.config, self.max_grad_norm = world, config, optimizer.max_grad_norm
        self.replica = self._find_replica()
        self.hf_config, self.shapes = source.hf_config, source.shapes
        model = source.build()
        self.flops = count_flops(model, sequence_length)
        cast(nn.Module, model).train()
        if config.float8:
            use_float8(transformer_blocks(model), world.device)
        self.model = model
        self.head = self._chunked_head()
        self._place(source)
        self.optimizer = self._start_optimizer(optimizer)

    @property
    def layout(self) -> str:
        return "single"

    def _find_replica(self) -> Replica:
        return Replica(0, 1)

    def _chunked_head(self) -> ChunkedHead | None:
        return chunked_head(self.model, self.config.logits_memory, compiled=self._compiles_loss)

    def _place(self, source: ModelSource) -> None:
        """Bring the model, whose parameters are on the meta device, to the trainers' devices."""
        materialise(self.model, self.world.device)
        for name in self.shapes:
            self._set_whole("parameter", name, source.tensor(name))
        prepare_blocks(transformer_blocks(self.model), self.config)

    def _start_optimizer(self, config: OptimizerConfig) -> torch.optim.AdamW:
        optimizer = adamw(self.model, self.shapes, config, fused=self.world.device.type == "cuda")
        start_moments(optimizer, self.model.parameters())
        return optimizer

    def held_bytes(self) -> HeldBytes:
        counter, parameters = HeldCounter(self.world.device), list(self.model.parameters())
        return HeldBytes(
            parameters=counter.count(parameters),
            gradients=counter.count_like(parameters),
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
        # all before the first pass, and one look at the results in the whole step: the host runs ahead of a
        # GPU, which goes on with AdamW while the step is booked and the next batch comes
        on_device = send(microbatches, self.world.device)
        losses = []
        for i, batch in enumerate(on_device):
            with self._accumulating(i == len(on_device) - 1):
                with self._compute_context():
                    sums = self._losses(batch)
                # Gradients are averaged over replicas, hence the factor: the mean over all targets remains.
                (sums.sum() * (self.replica.size / total)).backward()
            losses.append(sums.detach())
        sample_sums = torch.cat(losses).double()
        self._complete_gradients()
        if self._adjust is not None:
            self._adjust(self._gradients())
        checks, norm = self._clip(loss_checks(sample_sums))
        results = read_later(torch.cat([sample_sums, checks, norm[None]]))
        bad, nats = checks
        self._apply(lr, refused=(bad > 0) | (nats / total > self._loss_limit) | ~norm.isfinite())
        self._drop_gradients()
        found = results()
        result = StepResult(found[:-3], targets, found[-1].item())
        self._require_good(result, found[-3:-1], total)
        return result

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
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's part of each, by name; what is changed in place is changed in the step."""
        return {name: cast(Tensor, self._parameter(name).grad) for name in self.shapes}

    def _clip(self, checks: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient.

        Args:
            checks: :func:`loss_checks` of this replica's samples.

        Returns:
            Their sum over the replicas, and the gradient's norm before, float64 on the device and on every
            rank.
        """
        return checks, nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).double()

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
        return {name: self._tensor(kind, name) for name in self.shapes}

    def _tensor(self, kind: Kind, name: str) -> Tensor:
        parameter = self._parameter(name)
        return parameter.detach() if kind == "parameter" else self.optimizer.state[parameter][kind]

    def _parameter(self, name: str) -> nn.Parameter:
        return cast(nn.Module, self.model).get_parameter(name)

    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors(kind).items()

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


def adamw(
    model: nn.Module, shapes: Mapping[str, torch.Size], config: OptimizerConfig, *, fused: bool
) -> torch.optim.AdamW:
    """
    Args:
        shapes: of the whole parameters, which those of a sharded model do not always show.
    """
    return torch.optim.AdamW(
        _decay_groups(model, shapes, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def start_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make the moments of ``parameters``, as AdamW itself would at its first step: so they can always be
    loaded."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """AdamW's two of each parameter."""
    for state in optimizer.state.values():
        yield from (state["exp_avg"], state["exp_avg_sq"])


def _decay_groups(
    model: nn.Module, shapes: Mapping[str, torch.Size], weight_decay: float
) -> list[dict[str, object]]:
    """Matrices decay; biases and norm gains do not. Parameters of one group are on one mesh, if any, because
    AdamW's operations on lists take no mixture."""
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        groups.setdefault((len(shapes[name]) >= 2, mesh), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), parameters in groups.items()
    ]
