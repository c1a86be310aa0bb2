"""The engine for one process: plain torch, no sharding. FSDP2 builds on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine, NonFiniteError, StepResult
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.flops import count_flops, num_parameters
from opmix_dist.models.loss import sample_loss_sums, sample_losses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SingleEngine(Engine):
    """AdamW on a model that fits on one device; bf16 through autocast with float32 master parameters."""

    def __init__(
        self,
        model: PreTrainedModel,
        world: World,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        sequence_length: int,
    ) -> None:
        self.world, self.config, self.max_grad_norm = world, config, optimizer.max_grad_norm
        self.flops = count_flops(model, sequence_length)
        self.num_parameters = num_parameters(model)
        cast(nn.Module, model).to(world.device).train()
        self.model = model
        self._prepare_blocks(transformer_blocks(model))
        self._shard()
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=world.device.type == "cuda",
        )

    def _prepare_blocks(self, blocks: list[nn.Module]) -> None:
        if self.config.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            for block in blocks:
                block.compile()

    def _shard(self) -> None:
        """Nothing to do on one process."""

    def _compute_context(self) -> Any:
        dtype = DTYPES[self.config.param_dtype]
        if dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype)

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch; ``last`` is where gradients are reduced."""
        yield

    def _train_step(
        self, microbatches: Sequence[TokenBatch], targets: Tensor, total: int, lr: float
    ) -> StepResult:
        # all before the first pass: a copy from pageable memory in between would wait until the GPU is idle
        on_device = [batch.to(self.world.device) for batch in microbatches]
        losses = []
        for i, batch in enumerate(on_device):
            with self._accumulating(i == len(on_device) - 1):
                with self._compute_context():
                    sums = sample_losses(self.model, batch)
                # Gradients are averaged over ranks, hence the factor: the mean over all targets remains.
                (sums.sum() * (self.world.size / total)).backward()
            losses.append(sums.detach())
        sample_sums = torch.cat(losses).double().cpu()
        self._require_finite(sample_sums)
        grad_norm = self._clip()
        if grad_norm.isfinite():
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(sample_sums, targets, grad_norm.item())

    def _require_finite(self, losses: Tensor) -> None:
        """Collective, so that no rank goes on alone."""
        bad = self.world.sum((~losses.isfinite()).sum())
        if bad > 0:
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"{int(bad)} training samples of the global batch have a NaN or inf loss")

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        self.model.eval()
        try:
            with self._compute_context():
                return sample_loss_sums(self.model, batch, batch_size)
        finally:
            self.model.train()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def full_parameters(self) -> dict[str, Tensor] | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if not self.world.is_leader:
            return None
        return {name: cast(Tensor, tensor).detach().clone() for name, tensor in state.items()}

    def save_hf(self, parameters: dict[str, Tensor], folder: Path) -> None:
        tied = self.model._tied_weights_keys or ()
        if self.model.config.tie_word_embeddings:  # safetensors refuses two names for one tensor
            parameters = {name: t for name, t in parameters.items() if name not in tied}
        self.model.save_pretrained(folder, state_dict=parameters, safe_serialization=True)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
