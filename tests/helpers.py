"""Small real things that several tests need."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from opmix_dist.data.batch import TokenBatch, collate
from opmix_dist.data.samples import Sample
from tests.launcher import ROOT, Launch

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: no lock has it")


def tiny_llama_config(*, vocab_size: int = 64, tied: bool = False) -> LlamaConfig:
    """Two blocks of width 32; grouped-query attention."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def tiny_llama(seed: int = 0, *, vocab_size: int = 64, tied: bool = False) -> PreTrainedModel:
    """:func:`tiny_llama_config` in float32, initialised by transformers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_llama_config(vocab_size=vocab_size, tied=tied))


def random_tokens(seed: int, *shape: int, vocab_size: int = 64) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_batch(seed: int, *shape: int) -> TokenBatch:
    """Whole samples [B, T] of random tokens."""
    return TokenBatch.of_tokens(random_tokens(seed, *shape))


def uneven_batch(seed: int, size: int, length: int, *, mask_documents: bool = False) -> TokenBatch:
    """Chat-like samples: two documents and padding in each, a span of targets in each document; every third
    sample has none."""
    rng = np.random.default_rng([seed, size, length])
    samples = []
    for row in range(size):
        first, second = rng.integers(length // 4, length // 2 + 1, size=2)
        spans = [(rng.integers(first), first), (first + rng.integers(second), first + second)]
        samples.append(
            Sample(
                tokens=rng.integers(64, size=first + second).astype(np.uint16),
                ends=np.array([first, first + second], dtype=np.uint32),
                spans=np.array(spans if row % 3 else [], dtype=np.uint32).reshape(-1, 2),
            )
        )
    return collate(samples, length, mask_documents=mask_documents)


def documents(seed: int = 0) -> list[Tensor]:
    """Tokens [n] of four documents, one of them a single token."""
    return [random_tokens(seed + i, n) for i, n in enumerate((5, 9, 1, 11))]


def pack(parts: list[Tensor], length: int, *, mask_documents: bool = True) -> TokenBatch:
    """The documents, one behind the other in a sample of ``length`` tokens and padded: [1, T]."""
    tokens = torch.cat(parts).numpy().astype(np.uint16)
    ends = np.cumsum([len(part) for part in parts]).astype(np.uint32)
    return collate([Sample(tokens, ends)], length, mask_documents=mask_documents)


def alone_in_rows(parts: list[Tensor], length: int) -> TokenBatch:
    """Each document in a sample of its own, padded, without masks or positions: [D, T]."""
    return TokenBatch.cat([pack([part], length, mask_documents=False) for part in parts])


def one_by_one(parts: list[Tensor], length: int, *, mask_documents: bool = True) -> TokenBatch:
    """As :func:`pack`, a row [D, T] for each of D documents, whose tokens alone are its targets. A document's
    first token is none, with or without masks: what stands before it is no part of it."""
    batch = pack(parts, length, mask_documents=mask_documents).repeat(len(parts))
    own = torch.zeros_like(batch.loss_mask)
    start = 0
    for row, part in zip(own, parts, strict=True):
        row[start + 1 : start + len(part)] = True
        start += len(part)
    return dataclasses.replace(batch, loss_mask=own)


def on_ranks(ranks: int, module: str, *arguments: str, timeout_s: float = 300.0) -> None:
    """``python -m MODULE ARGUMENTS`` on ``ranks`` ranks of :class:`Launch`; fails with what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = Launch(ranks, module, arguments, log).wait(timeout_s)
        assert code == 0, log.read_text()[-6000:]


def torchrun(ranks: int, *arguments: str, timeout_s: float = 300.0, **environment: str) -> str:
    """The same by torchrun itself, whose ranks take longer to start; returns the output."""
    # standalone takes a free port, so that launches may run beside each other
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
