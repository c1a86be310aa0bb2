"""Setting a model with joint adapters up to compute in some arithmetic, and giving it back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opmix_dist.models.compute import FLOAT32, Compute, load_kernels
from opmix_dist.models.families import Family, cast_points, family_of, shared_reads
from opmix_dist.models.heads import float32_logits, fusing_head, replaced_forward
from opmix_dist.models.joint_linear import JointLoRALinear
from opmix_dist.models.kernel_products import KernelProducts
from opmix_dist.models.products import CastProducts, Products, Readers, ShardedProducts
from opmix_dist.models.sharding import is_sharded

if TYPE_CHECKING:
    from opmix_dist.models.lora import JointAdapters

log = logging.getLogger(__name__)


@contextmanager
def computed(adapters: JointAdapters, compute: Compute) -> Iterator[Products]:
    """What the adapted layers are to use; norms, rotary embeddings and the head are set up inside.

    Raises:
        UserError: kernels cannot run where the model is.
    """
    with ExitStack() as stack:
        if compute == FLOAT32:
            yield adapters.products
        elif compute.kernels:
            yield _with_kernels(adapters, compute.dtype, stack)
        else:
            yield _in_plain_torch(adapters, compute.dtype, stack)


def _in_plain_torch(adapters: JointAdapters, dtype: torch.dtype, stack: ExitStack) -> Products:
    family = family_of(adapters.model)
    _keep_one_dtype(adapters, family, dtype, stack)
    _widen_logits(adapters, dtype, stack)
    kind = ShardedProducts if is_sharded(adapters.model) else CastProducts
    return kind(adapters.state, dtype, [r for r, _ in _readers(adapters, family)])


def _with_kernels(adapters: JointAdapters, dtype: torch.dtype, stack: ExitStack) -> Products:
    model, family = adapters.model, family_of(adapters.model)
    assert not is_sharded(model), "kernels read whole weights"
    ops = load_kernels(next(model.parameters()).device)
    if family is None:
        tell_unknown(type(model).__name__)
    _keep_one_dtype(adapters, family, dtype, stack)
    readers = _readers(adapters, family)
    products = KernelProducts(
        adapters.state,
        dtype,
        [r for r, _ in readers],
        ops=ops,
        names={layer: name for name, layer in adapters.layers.items()},
        seeds=adapters.seeds,
        dropout=adapters.dropout,
        step=lambda: adapters.dropout_step,
    )
    for group, norm in readers:
        if norm is not None:
            stack.enter_context(replaced_forward(norm, products.norm_forward(group, norm)))
    if family is None:
        _widen_logits(adapters, dtype, stack)
    else:
        backbone, head = model.get_submodule(family.backbone), model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        stack.enter_context(fusing_head(model, backbone, products.hidden_losses(head)))
    return products


@cache
def tell_unknown(architecture: str) -> None:
    """In the log, once."""
    log.warning(
        "%s is no architecture whose norms and LM head are known: its linear layers use kernels, the rest is "
        "plain torch",
        architecture,
    )


def _readers(adapters: JointAdapters, family: Family | None) -> list[tuple[Readers, nn.Module | None]]:
    """All adapted layers by what they read, and the norm that gives it."""
    found: list[tuple[Readers, nn.Module | None]] = []
    for layers, norm in shared_reads(adapters.model, family) if family is not None else ():
        adapted = [layer for layer in layers if isinstance(layer, JointLoRALinear)]
        assert len(adapted) == len(layers), "every linear layer but the head is adapted"
        found.append((Readers(adapted), norm))
    together = {layer for group, _ in found for layer in group.layers}
    return found + [(Readers([x]), None) for x in adapters.layers.values() if x not in together]


def _keep_one_dtype(
    adapters: JointAdapters, family: Family | None, dtype: torch.dtype, stack: ExitStack
) -> None:
    """Attention gets queries, keys and values of one dtype: by casts where they are known to be needed, by
    autocast elsewhere."""
    if dtype == torch.float32:
        return
    if family is None:
        device = next(adapters.model.parameters()).device
        stack.enter_context(torch.autocast(device.type, dtype))
        return
    for module in cast_points(adapters.model, family):
        stack.callback(module.register_forward_hook(partial(_cast_result, dtype)).remove)


def _cast_result(dtype: torch.dtype, module: nn.Module, inputs: Any, result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.to(dtype)
    return tuple(part.to(dtype) for part in result)


def _widen_logits(adapters: JointAdapters, dtype: torch.dtype, stack: ExitStack) -> None:
    head = adapters.model.get_output_embeddings()
    if isinstance(head, nn.Linear) and dtype != torch.float32:
        stack.enter_context(
            replaced_forward(head, float32_logits(head, dtype, keep=not is_sharded(adapters.model)))
        )
