"""What may be done to the blocks of a model before it is sharded: recomputing, compiling, float8."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # has an operation of its own
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opmix_dist.config import EngineConfig
from opmix_dist.errors import UserError

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.all_reduce.default,
}
"""What is dear to compute again; all the rest is pointwise or a reduction."""


def prepare_blocks(blocks: Sequence[nn.Module], config: EngineConfig) -> None:
    """Recomputation first, so that a compiled block has it inside."""
    if config.activation_checkpointing != "none":
        options: dict[str, Any] = {"use_reentrant": False}
        if config.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
        for block in blocks:
            block.forward = _recomputed(block.forward, options)
    if config.compile:
        for block in blocks:
            block.compile()


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def recomputed(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, **options, **named)

    return recomputed  # a functools.partial would not be compiled, without a word


def _keep(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def use_float8(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Linear layers of ``blocks`` multiply in float8, scaled by tensor (torchao's recipe); the parameters
    stay as they are. Layers whose sizes the hardware cannot do stay too.

    Raises:
        UserError: no such GPU, or no torchao.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("engine.float8 needs a GPU of compute capability 8.9 or more: set it to false")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("engine.float8 needs the package torchao: install it or set engine.float8 to false")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # tokens are an inner dimension too, in the weight's gradient, and any number of them may come
    config = Float8LinearConfig(pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(
            block,
            config=config,
            module_filter_fn=lambda module, _: module.in_features % 16 == 0 and module.out_features % 16 == 0,
        )
