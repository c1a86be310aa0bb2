"""Reading and writing what Megatron's distributed optimizer has divided over the data-parallel ranks.

It lays the parameters of a stage one behind the other and cuts that row of numbers into equal pieces, one for
each data-parallel rank, wherever parameters begin or end. A rank has the float32 parameters and AdamW's
moments of its piece only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from opmix_dist.engines.base import Kind


class Shards:
    """The float32 parameters and moments of this rank's pipeline stage and tensor-parallel part."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        """Moments are made, which AdamW itself would make at its first step: so they can always be loaded."""
        self._optimizer = optimizer
        self._inner: torch.optim.Optimizer = optimizer.optimizer
        self._is_torch = isinstance(self._inner, torch.optim.AdamW)
        optimizer.init_state_fn(self._inner)
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """That AdamW has made: torch's counts them for each parameter, Transformer Engine's for groups."""
        if not self._is_torch:
            for group in self._inner.param_groups:
                group["step"] = steps
            return
        for state in self._inner.state.values():
            state["step"] = torch.tensor(float(steps))

    def tensors(self) -> Iterator[Tensor]:
        """All that this rank has of them."""
        for group in self._inner.param_groups:
            for main in group["params"]:
                yield main
                yield from (self._inner.state[main][kind] for kind in ("exp_avg", "exp_avg_sq"))

    def whole(self, kind: Kind, parameter: nn.Parameter) -> Tensor:
        """All of a parameter's numbers, float32, in its shape. Collective over the data-parallel ranks."""
        found = self._scratch(kind, parameter)
        dist.all_reduce(found, group=self._optimizer.data_parallel_group)
        return found

    def fill(self, kind: Kind, parameter: nn.Parameter, write: Callable[[Tensor], None]) -> None:
        """Let ``write`` change a tensor of the parameter's shape, in place, some of it or all, and keep what
        this rank has of it. Every rank writes the same."""
        if kind == "parameter":
            write(parameter.data)
        found = self._piece(kind, parameter)
        if found is not None:
            piece, place = found
            whole = self._scratch(kind, parameter)
            write(whole)
            piece.copy_(whole.view(-1)[place])

    def _scratch(self, kind: Kind, parameter: nn.Parameter) -> Tensor:
        """Zeros but for this rank's piece."""
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        found = self._piece(kind, parameter)
        if found is not None:
            piece, place = found
            whole.view(-1)[place] = piece
        return whole

    def _piece(self, kind: Kind, parameter: nn.Parameter) -> tuple[Tensor, slice] | None:
        """This rank's numbers of a parameter and where they are in it; None: it has none."""
        optimizer = self._optimizer
        if parameter not in optimizer.model_param_group_index_map:
            return None
        group, position = optimizer.model_param_group_index_map[parameter]
        main = self._inner.param_groups[group]["params"][position]
        tensor = main if kind == "parameter" else self._inner.state[main][kind]
        place = optimizer._get_model_param_range_map(parameter)["param"]
        return tensor.detach(), slice(place.start, place.end)
