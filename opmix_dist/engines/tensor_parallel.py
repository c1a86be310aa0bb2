"""Tensor parallelism: matrix products divided over neighbouring ranks, by DTensor plans.

A plan names, for each linear layer of a block, which side of its matrix is divided: the first layers of
attention and MLP by output, so that each rank has heads and hidden units of its own, the last ones by input,
whose partial sums are added up. Norms and the residual stream are the same on all neighbours.
"""

from __future__ import annotations

import warnings

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PretrainedConfig, PreTrainedModel

from opmix_dist.errors import UserError
from opmix_dist.models.build import transformer_blocks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_HEADS = 2
"""Axis of the heads in the queries and keys [B, T, H, K] that Qwen3 normalises."""


def require_parallelizable(config: PretrainedConfig, ranks: int) -> None:
    """
    Raises:
        UserError: a family without a plan, or heads or hidden units that do not divide.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"engine.fsdp.tensor_parallel knows {', '.join(FAMILIES)}, not {config.model_type}: set it to 1"
        )
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, field) % ranks:
            raise UserError(
                f"engine.fsdp.tensor_parallel {ranks} does not divide the model's {field} "
                f"{getattr(config, field)}: set it to a divisor"
            )


def parallelize(model: PreTrainedModel, mesh: DeviceMesh, *, loss_parallel: bool) -> None:
    """Divide the parameters, which may be on the meta device, over the ranks of ``mesh``.

    Args:
        loss_parallel: leave the logits divided by vocabulary; losses on them need torch's context of this
            name.
    """
    # gathered logits are a view of what the collective has filled; nothing here changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    logits = Shard(-1) if loss_parallel else Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=logits, use_local_output=not loss_parallel),
        },
    )
    model.tie_weights()
    for block in transformer_blocks(model):
        parallelize_module(block, mesh, _block_plan(block))


def _block_plan(block: nn.Module) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    # norms of single heads: each rank sees its own heads, and gradients of the gains are to be summed
    modules = dict(block.named_modules())
    norms = (name for name in ("self_attn.q_norm", "self_attn.k_norm") if name in modules)
    style = SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
    return plan | dict.fromkeys(norms, style)
