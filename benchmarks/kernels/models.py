"""Llamas with random weights and adapters for whole sweeps, and the ways to evaluate their candidates."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.baselines import PeftMix, Stacked, chunked_losses, torch_losses
from benchmarks.kernels.measure import Bench, graphed
from opmix_kernels.cost import Decoder

RANK, ALPHA = 16, 32
PASS_TOKENS = 65_536
"""In one forward pass at most, of all candidates in it."""
LOGIT_PASS_TOKENS = 8_192
"""The same where a pass holds the logits of all its tokens, in 16 bits and in float32."""


def causal_attention() -> str:
    """Torch's causal attention without a mask tensor, in all paths alike.

    Transformers' own ``sdpa`` looks for packed documents where it gets neither a mask nor a cache, and then
    always makes a mask [B, 1, T, T], with which torch cannot take flash attention (create_causal_mask in
    masking_utils.py, 4.57). An attention for which no mask function is registered gets none.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


@dataclass(frozen=True)
class Llama:
    """Sizes of a model; embedding and head are tied."""

    name: str
    width: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def decoder(self) -> Decoder:
        """For the cost model."""
        kv_width = self.width // self.heads * self.kv_heads
        return Decoder(self.width, kv_width, self.intermediate, self.layers, self.vocab)

    def build(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """The same weights for each dtype, rounded to it."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            attn_implementation=causal_attention(),
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # and no buffers: rotary frequencies must stay in float32
            parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)

    def adapters(self, bench: Bench, model: nn.Module, count: int) -> dict[str, tuple[Tensor, Tensor]]:
        """A [C, r, d_in] and B [C, d_out, r] in bfloat16 of each linear layer but the head, by name. Deltas
        are some 35% of the weights, so that what they do to losses is far above rounding."""
        found = {}
        for index, (name, linear) in enumerate(linears(model).items()):
            d_out, d_in = linear.weight.shape
            found[name] = (
                bench.randn(count, RANK, d_in, scale=d_in**-0.5, seed=2 * index),
                bench.randn(count, d_out, RANK, scale=0.1, seed=2 * index + 1),
            )
        return found


def linears(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@dataclass(frozen=True)
class Sweep:
    """Candidates of one model on held-out tokens: M, samples of each, tokens of a sample."""

    model: Llama
    candidates: int
    samples: int
    length: int
    adapters: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def flops(self) -> float:
        return self.candidates * self.tokens * self.model.decoder.flops_per_token(self.length)

    def held_out(self, bench: Bench) -> Tensor:
        """[N, T] tokens."""
        generator = torch.Generator(bench.device).manual_seed(11)
        shape = (self.samples, self.length)
        return torch.randint(self.model.vocab, shape, generator=generator, device=bench.device)


Run = Callable[[int], Tensor]
"""Evaluates the first so many candidates: summed losses [M, N]."""


@contextmanager
def adapted(bench: Bench, sweep: Sweep, dtype: torch.dtype, kernels: bool, method: str) -> Iterator[Run]:
    """This project's evaluation: low-rank terms for many candidates at once, or merging one by one."""
    from opmix_dist.data.batch import TokenBatch
    from opmix_dist.models.compute import Compute
    from opmix_dist.models.lora import JointAdapters
    from opmix_dist.models.loss import sample_losses

    model = sweep.model.build(bench.device)
    weights = sweep.model.adapters(bench, model, sweep.adapters)
    names = [f"a{index}" for index in range(sweep.adapters)]
    joint = JointAdapters(model, names, rank=RANK, alpha=ALPHA, seeds=[0] * len(names))
    for name, (A, B) in weights.items():
        joint.layers[name].A.data.copy_(A)
        joint.layers[name].B.data.copy_(B)
    batch = TokenBatch.of_tokens(sweep.held_out(bench))
    U = bench.coefficients(sweep.candidates, sweep.adapters)
    most = PASS_TOKENS if kernels else LOGIT_PASS_TOKENS

    @torch.no_grad()
    def low_rank(count: int) -> Tensor:
        together = min(count, max(1, most // sweep.tokens))
        part = max(1, most // (together * sweep.length))
        rows = []
        for group in U[:count].split(together):
            with joint.simulating(group):
                found = [
                    sample_losses(model, samples.repeat(len(group))).view(len(group), -1)
                    for samples in batch.split(part)
                ]
            rows.append(torch.cat(found, dim=1))
        return torch.cat(rows)

    @torch.no_grad()
    def merge(count: int) -> Tensor:
        rows = []
        for u in U[:count]:
            with joint.merged(u):
                parts = batch.split(max(1, most // sweep.length))
                rows.append(torch.cat([sample_losses(model, samples) for samples in parts]))
        return torch.stack(rows)

    with joint.computing(Compute(dtype, kernels)):
        yield low_rank if method == "lowrank" else merge


class Merged:
    """The baseline in torch: a model in one dtype throughout, one candidate after another merged into it."""

    def __init__(self, bench: Bench, sweep: Sweep, dtype: torch.dtype) -> None:
        self.sweep, self.exact = sweep, dtype == torch.float64
        self.model = sweep.model.build(bench.device, dtype)
        found = sweep.model.adapters(bench, self.model, sweep.adapters)
        self.layers = [
            (linear, linear.weight.data.clone(), Stacked(A.to(dtype), B.to(dtype), ALPHA / RANK))
            for (A, B), linear in zip(found.values(), linears(self.model).values(), strict=True)
        ]
        self.tokens = sweep.held_out(bench)
        self.U = bench.coefficients(sweep.candidates, sweep.adapters)

    def merge(self, u: Tensor) -> None:
        for linear, weight, stacked in self.layers:
            stacked.merge_into(linear.weight.data, weight, u)

    def losses(self) -> Tensor:
        return hidden_losses(self.model.model, self.model.lm_head.weight, self.tokens)

    @torch.no_grad()
    def one_by_one(self, count: int) -> Tensor:
        rows = []
        for u in self.U[:count]:
            self.merge(u)
            rows.append(self.losses())
        return torch.stack(rows)

    def as_graph(self) -> Run:
        u = self.U[0].clone()

        @torch.no_grad()
        def once() -> Tensor:
            self.merge(u)
            return self.losses()

        replay = graphed(once)

        def run(count: int) -> Tensor:
            rows = []
            for row in self.U[:count]:
                u.copy_(row)
                rows.append(replay().clone())
            return torch.stack(rows)

        return run

    @torch.no_grad()
    def through_disk(self, count: int) -> Tensor:
        """Each merged model is written as safetensors, loaded again and evaluated."""
        from transformers import AutoModelForCausalLM

        rows = []
        for u in self.U[:count]:
            self.merge(u)
            folder = Path(tempfile.mkdtemp(prefix="merged-"))
            try:
                self.model.save_pretrained(folder)
                loaded = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, attn_implementation=causal_attention()
                )
                loaded = loaded.to(self.tokens.device).eval()
                rows.append(hidden_losses(loaded.model, loaded.lm_head.weight, self.tokens))
            finally:
                shutil.rmtree(folder)
        return torch.stack(rows)


def peft_sweep(bench: Bench, sweep: Sweep) -> Run:
    model = sweep.model.build(bench.device, torch.bfloat16)
    mix = PeftMix(model, sweep.model.adapters(bench, model, sweep.adapters), ALPHA / RANK)
    rows, tokens = bench.coefficients(sweep.candidates, sweep.adapters).tolist(), sweep.held_out(bench)

    @torch.no_grad()
    def run(count: int) -> Tensor:
        found = []
        for u in rows[:count]:
            mix.mix(u)
            found.append(hidden_losses(model.model, model.lm_head.weight, tokens))
        return torch.stack(found)

    return run


@torch.no_grad()
def hidden_losses(backbone: nn.Module, head: Tensor, tokens: Tensor) -> Tensor:
    """Summed losses of each sample [N]; one pass over chunks of 16-bit logits, exact ones of float64."""
    found = []
    for part in tokens.split(max(1, PASS_TOKENS // tokens.shape[1])):
        hidden = backbone(input_ids=part, use_cache=False).last_hidden_state[:, :-1]
        targets = part[:, 1:]
        losses = chunked_losses if hidden.dtype == torch.bfloat16 else torch_losses
        found.append(losses(hidden.flatten(0, 1), head, targets.flatten()).view(targets.shape).sum(1))
    return torch.cat(found)
