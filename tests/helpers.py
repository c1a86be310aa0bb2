"""Small real things that several tests need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent


def tiny_llama(seed: int = 0, *, vocab_size: int = 64, tied: bool = False) -> PreTrainedModel:
    """Two blocks of width 32; grouped-query attention; float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def random_tokens(seed: int, *shape: int, vocab_size: int = 64) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def torchrun(ranks: int, *arguments: str, timeout_s: float = 300.0, **environment: str) -> str:
    """Run ``python -m ARGUMENTS`` on ``ranks`` ranks and return its output; fails with it otherwise."""
    done = subprocess.run(
        torchrun_command(ranks, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def torchrun_command(ranks: int, *arguments: str) -> list[str]:
    """``--standalone`` takes a free port, so that launches may run beside each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", "-m", *arguments]
