"""FSDP2: parameters, gradients and optimiser state sharded over the trainer ranks (torch fully_shard)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.base import Kind, Replica
from opmix_dist.engines.blocks import prepare_blocks
from opmix_dist.engines.single import DTYPES, SingleEngine, materialise
from opmix_dist.engines.tensor_parallel import parallelize, require_parallelizable
from opmix_dist.errors import UserError
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.chunked_head import ChunkedHead
from opmix_dist.models.sharding import own_part
from opmix_dist.models.source import Index, ModelSource


class FSDPEngine(SingleEngine):
    """Each transformer block is one communication unit; the rest of the model is the root's.

    The ranks are a mesh of replicas x shards x tensor-parallel neighbours. What shares a matrix product sees
    the same samples; everything else is a replica of its own for the data.
    """

    @property
    def layout(self) -> str:
        settings = self.config.fsdp
        return f"fsdp (replicas {settings.replicas}, tensor_parallel {settings.tensor_parallel})"

    def _find_replica(self) -> Replica:
        settings, ranks = self.config.fsdp, self.world.size
        neighbours = settings.tensor_parallel
        if ranks % (neighbours * settings.replicas):
            raise UserError(
                f"engine.fsdp.replicas {settings.replicas} x engine.fsdp.tensor_parallel {neighbours} does "
                f"not divide {ranks} trainer rank(s): change one of them"
            )
        rank = self.world.rank
        return Replica(rank // neighbours, ranks // neighbours, counts=rank % neighbours == 0)

    def _chunked_head(self) -> ChunkedHead | None:
        """Tensor parallelism has a head of its own: each rank multiplies its part of the vocabulary."""
        return None if self.config.fsdp.tensor_parallel > 1 else super()._chunked_head()

    def _place(self, source: ModelSource) -> None:
        """Nothing is ever whole on a rank, except one parameter at a time of a fresh model."""
        device = self.world.device
        self._shard(source)
        materialise(self.model, torch.device("cpu") if self.config.fsdp.cpu_offload else device, device)
        for name in self._all_names:
            fill(cast(DTensor, self._tensor("parameter", name)), partial(self._initial, source, name))

    def _shard(self, source: ModelSource) -> None:
        """Divide the parameters, which are on the meta device."""
        settings, device = self.config.fsdp, self.world.device
        mesh = self._mesh()
        if settings.tensor_parallel > 1:
            require_parallelizable(source.hf_config, settings.tensor_parallel)
            parallelize(self.model, mesh["tensor"], loss_parallel=settings.loss_parallel)
        blocks = transformer_blocks(self.model)
        prepare_blocks(blocks, self.config)
        data = mesh["replicate", "shard"] if settings.replicas > 1 else mesh["shard"]
        policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[self.config.param_dtype], reduce_dtype=DTYPES[self.config.reduce_dtype]
        )
        offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        options: dict[str, Any] = {"mesh": data, "mp_policy": policy}
        if settings.cpu_offload:
            options["offload_policy"] = offload
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward, **options)
        fully_shard(self.model, **options)

    def _mesh(self) -> DeviceMesh:
        settings = self.config.fsdp
        shards = self.world.size // (settings.replicas * settings.tensor_parallel)
        return init_device_mesh(
            self.world.device.type,
            (settings.replicas, shards, settings.tensor_parallel),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )

    def _compute_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # the mixed-precision policy casts

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are reduced once per step, in the last micro-batch."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        with self._loss_context():
            yield

    def _loss_context(self) -> AbstractContextManager[None]:
        """To be entered once, around forward and backward: leaving it takes effect for the outer one too."""
        return loss_parallel() if self.config.fsdp.loss_parallel else nullcontext()

    def _losses(self, batch: TokenBatch) -> Tensor:
        return plain(super()._losses(batch))

    @property
    def _compiles_loss(self) -> bool:
        """Logits that are divided are no plain tensors."""
        return super()._compiles_loss and not self.config.fsdp.loss_parallel

    def _evaluate(self, batch: TokenBatch, batch_size: int) -> Tensor:
        """Without a backward pass, what was gathered last stays so: it is freed here, since only sharded
        parameters are those that the optimiser knows."""
        try:
            with self._loss_context():
                return super()._evaluate(batch, batch_size)
        finally:
            for module in cast(nn.Module, self.model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def parts(self) -> dict[str, Tensor]:
        return {name: cast(DTensor, found).to_local() for name, found in super().parts().items()}

    def place(self, name: str) -> Index:
        return own_part(cast(DTensor, self._tensor("parameter", name)))

    def whole(self, name: str, part: Tensor) -> Tensor:
        like = cast(DTensor, self._tensor("parameter", name))
        return DTensor.from_local(
            part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def sum_parts(self, values: Tensor) -> Tensor:
        """A number may be on several ranks, as in :meth:`_clip`."""
        return self.world.sum(values.double().cpu() @ self._shares.double().cpu())

    def _gradients(self) -> dict[str, Tensor]:
        return {name: cast(DTensor, found).to_local() for name, found in super()._gradients().items()}

    def _clip(self, checks: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters are divided over the whole mesh or over a part of it, so a number of the gradient may be
        on several ranks: each counts it as the share that makes 1 of all of them. One sum over the ranks
        follows, whatever the meshes."""
        local = [cast(DTensor, parameter.grad).to_local() for parameter in self._trained_parameters]
        norms = torch.stack(torch._foreach_norm(local))
        squares = norms.square() @ self._shares
        mine = checks if self.replica.counts else torch.zeros_like(checks)
        found = self.world.sum(torch.cat([mine.to(squares.device), squares.double()[None]]))
        norm = found[-1].sqrt()
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, factor.to(norms))
        return found[:-1].to(checks.device), norm.to(checks.device)

    @cached_property
    def _shares(self) -> Tensor:
        """[parameters] float32, where the gradients are."""
        parameters = [cast(DTensor, parameter) for parameter in self._trained_parameters]
        shares = [_pieces(parameter) / self.world.size for parameter in parameters]
        return torch.tensor(shares, device=parameters[0].to_local().device)

    def _whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors(kind).items():
            yield name, plain(tensor)

    def _whole_parameter(self, name: str) -> Tensor:
        return plain(super()._whole_parameter(name))

    def _set_whole(self, kind: Kind, name: str, tensor: Tensor) -> None:
        fill(cast(DTensor, self._tensor(kind, name)), tensor.__getitem__)

    def _state(self, kind: Kind) -> dict[str, Tensor]:
        return self._tensors(kind)

    def _load(self, kind: Kind, read: Callable[[dict[str, Any]], None]) -> None:
        read({kind: self._tensors(kind)})


def plain(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; collective over its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _pieces(tensor: DTensor) -> int:
    """Into how many parts of their own its mesh divides a tensor."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def fill(tensor: DTensor, part: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Copy into the shard of this rank what ``part`` gives of the whole at the shard's place."""
    tensor.to_local().copy_(part(own_part(tensor)))
