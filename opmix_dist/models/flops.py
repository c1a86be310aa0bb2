"""Parameter and FLOP counts. A multiply-add is two FLOPs, as torch's FlopCounterMode counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs per token of one model at one sequence length T.

    forward = 2 * (weights of all linear layers) + L * 4 * T * H * K, where L blocks of H heads of size K
    compute scores and weighted values over all T positions (the causal half is not subtracted, the usual
    convention since PaLM, arXiv 2204.02311, appendix B).
    """

    forward: float
    lora_per_adapter: float
    """Shrink and expand of one adapter on every adapted layer: 2 * r * (d_in + d_out)."""
    merge_per_adapter: float
    """Adding u * s * B A into every adapted weight once: 2 * r * d_in * d_out (not per token)."""

    def train(self, *, recompute: bool) -> float:
        """Forward, twice that for the backward pass, and once more where activations are recomputed."""
        return self.forward * (4.0 if recompute else 3.0)

    def probe(self) -> float:
        """A frozen base needs gradients to activations only; the adapter needs both kinds."""
        return 2.0 * self.forward + 3.0 * self.lora_per_adapter

    def lowrank_candidate(self, num_adapters: int) -> float:
        return self.forward + num_adapters * self.lora_per_adapter

    def candidate_gradients(self, num_adapters: int) -> float:
        """A candidate's loss with its gradient to the coefficients: a backward pass to activations costs a
        forward pass, and the adapters' three of theirs."""
        return 2.0 * self.forward + 3.0 * num_adapters * self.lora_per_adapter


def count_flops(model: PreTrainedModel, sequence_length: int, lora_rank: int = 0) -> FlopCounts:
    """Counts for a plain model (no adapters injected)."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    adapted = [m for m in linears if m is not head]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4.0 * sequence_length * heads * head_dim * config.num_hidden_layers
    return FlopCounts(
        forward=2.0 * sum(m.weight.numel() for m in linears) + attention,
        lora_per_adapter=2.0 * lora_rank * sum(m.in_features + m.out_features for m in adapted),
        merge_per_adapter=2.0 * lora_rank * sum(m.in_features * m.out_features for m in adapted),
    )


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters (tied weights count once)."""
    return sum(p.numel() for p in model.parameters())
