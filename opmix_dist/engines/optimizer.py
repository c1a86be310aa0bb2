"""torch's AdamW over the parameters of an engine, and its moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from opmix_dist.config import OptimizerConfig


def adamw(
    model: nn.Module, shapes: Mapping[str, torch.Size], config: OptimizerConfig, *, fused: bool
) -> torch.optim.AdamW:
    """
    Args:
        shapes: of the whole parameters that are trained, which those of a sharded model do not always show.
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
    trained = ((name, p) for name, p in model.named_parameters() if name in shapes)
    for name, parameter in trained:
        mesh = getattr(parameter, "device_mesh", None)
        groups.setdefault((len(shapes[name]) >= 2, mesh), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), parameters in groups.items()
    ]
