"""Ways to simulate a mixture: probes of the search, other probes, and full-parameter deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from opmix_dist.engines.single import materialise
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.source import Index, ModelSource
from opmix_dist.pool.interpolation import Interpolation
from opmix_dist.pool.loading import load
from opmix_dist.validate.real import put


class Simulator(Protocol):
    """``model`` is W(u) within ``at(u)``."""

    @property
    def model(self) -> PreTrainedModel: ...

    def at(self, u: np.ndarray) -> AbstractContextManager[None]:
        """u [K], on the simplex."""
        ...


@dataclass(frozen=True)
class BySnapshot:
    """No simulation at all: what a real run has moved away from."""

    model: PreTrainedModel

    @contextmanager
    def at(self, u: np.ndarray) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class ByProbes:
    """W + s sum_k c_k(u) B_k A_k, as candidates are simulated."""

    adapters: JointAdapters
    interpolation: Interpolation

    @property
    def model(self) -> PreTrainedModel:
        return self.adapters.model

    def at(self, u: np.ndarray) -> AbstractContextManager[None]:
        return self.adapters.simulating(torch.as_tensor(self.interpolation.coefficients(u[None])))


@dataclass(frozen=True)
class ByFullParameters:
    """W + sum_k u_k (W_k - W) = sum_k u_k W_k, with the models W_k of the components' real runs.

    Args:
        model: whole or sharded, which is filled.
        components: K models, in the order of u.
    """

    model: PreTrainedModel
    components: Sequence[ModelSource]

    @contextmanager
    def at(self, u: np.ndarray) -> Iterator[None]:
        fill_model(self.model, self.components[0].shapes, partial(self._part, u))
        yield

    def _part(self, u: np.ndarray, name: str, index: Index) -> Tensor:
        """In float64: u sums to 1, and the deltas are small beside the parameters."""
        total: Tensor | None = None
        for share, source in zip(u.tolist(), self.components, strict=True):
            if share:
                one = source.part(name, index).double() * share
                total = one if total is None else total.add_(one)
        assert total is not None
        return total.float()


def own_model(source: ModelSource, device: torch.device, mesh: DeviceMesh | None) -> PreTrainedModel:
    """As :func:`~opmix_dist.pool.loading.load`, with parameters of its own: those of a whole model that is
    read from a file are pages of the file on the CPU, which all that read it share."""
    if mesh is not None:
        return load(source, device, mesh)
    model = source.build()
    materialise(model, device)
    fill_model(model, source.shapes, source.part)
    cast(nn.Module, model).requires_grad_(False).eval()
    return model


@torch.no_grad()
def fill_model(
    model: PreTrainedModel, shapes: Mapping[str, torch.Size], part: Callable[[str, Index], Tensor]
) -> None:
    """Replace all parameters of a plain model, whole or sharded; does not communicate."""
    for name in shapes:
        parameter = cast(nn.Module, model).get_parameter(name)
        put(parameter.detach(), partial(part, name))
