"""FSDP2: parameters, gradients and optimiser state sharded over the trainer ranks (torch fully_shard)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from opmix_dist.engines.single import DTYPES, SingleEngine
from opmix_dist.models.build import transformer_blocks


class FSDPEngine(SingleEngine):
    """Each transformer block is one communication unit; the rest of the model is the root's."""

    def _shard(self) -> None:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[self.config.param_dtype], reduce_dtype=DTYPES[self.config.reduce_dtype]
        )
        for block in transformer_blocks(self.model):
            fully_shard(
                block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.config.reshard_after_forward
            )
        fully_shard(self.model, mesh=mesh, mp_policy=policy)

    def _compute_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # the mixed-precision policy casts

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are reduced once per step, in the last micro-batch."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def _clip(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
