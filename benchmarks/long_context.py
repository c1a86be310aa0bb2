"""Memory of a training step on long samples: head whole or in chunks, attention with and without a mask.

    python -m benchmarks.long_context [--lengths 8192 32768] [--out benchmarks/results/long_context.md]

One sample a rank and step, of a tiny Llama with a vocabulary that makes its logits large, on a CPU; one
process (`single`) and two (`fsdp`). Peaks are of a step's resident memory beyond what the process held before
it, of the rank with the largest; each row comes after a step of its own that warms up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.machine import describe, table
from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process

WHOLE = "whole"
CHUNKED = "chunks"


@dataclass(frozen=True)
class Case:
    """One row: what is trained, and how.

    document: tokens of each document of a sample, to which attention is confined; 0: the sample is one.
    """

    engine: str
    length: int
    attention: str
    document: int
    head: str
    vocab_size: int
    hidden_size: int = 32
    chunk_bytes: int = 16 << 20

    @property
    def logits_bytes(self) -> int:
        """One float32 copy of the logits."""
        return 4 * self.length * self.vocab_size


@dataclass(frozen=True)
class Measured:
    """peak_bytes: of the rank with the largest. sample_loss, grad_norm: of the measured step."""

    peak_bytes: float
    seconds: float
    sample_loss: float
    grad_norm: float


def cases(engine: str, length: int, vocab_size: int) -> list[Case]:
    """Documents of 2,048 tokens and samples that are one document; what needs a mask of T x T only in one
    process, where it has the memory."""
    rows = [("varlen", 2048, CHUNKED), ("varlen", 2048, WHOLE), ("sdpa", 0, CHUNKED)]
    if engine == "single":
        rows.append(("sdpa", 2048, CHUNKED))
    return [Case(engine, length, *row, vocab_size) for row in rows]


def measure(case: Case, world: World) -> Measured:
    """Collective over the ranks of ``world``. Two steps: the first is not measured."""
    engine = _engine(case, world)
    batches = [[_sample(case, world.rank, step)] for step in range(2)]
    engine.train_step(batches[0], lr=1e-3)
    before = _restart_peak()
    start = time.perf_counter()
    result = engine.train_step(batches[1], lr=1e-3)
    seconds = time.perf_counter() - start
    mine = torch.zeros(world.size, dtype=torch.float64)
    mine[world.rank] = _peak() - before
    loss = engine.sum(result.sample_losses.sum()).item()
    return Measured(world.sum(mine).max().item(), seconds, loss, result.grad_norm)


def _engine(case: Case, world: World) -> Engine:
    size = case.hidden_size
    model = LlamaConfig(
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=case.vocab_size,
        max_position_embeddings=case.length,
    )
    kind = SingleEngine if case.engine == "single" else FSDPEngine
    # chunks are an eighth of what may be whole
    memory = None if case.head == WHOLE else 8 * case.chunk_bytes
    return kind(
        ModelSource(model, attention=case.attention, seed=0),
        world,
        config=EngineConfig(name=case.engine, activation_checkpointing="full", logits_memory=memory),
        optimizer=OptimizerConfig(),
        sequence_length=case.length,
    )


def _sample(case: Case, rank: int, step: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tokens = torch.randint(case.vocab_size, (1, case.length), generator=generator)
    batch = TokenBatch.of_tokens(tokens)
    return TokenBatch(tokens, batch.loss_mask, _positions(case))


def _positions(case: Case) -> Tensor | None:
    return (torch.arange(case.length) % case.document)[None] if case.document else None


def _restart_peak() -> int:
    """Resident bytes now, from which on the kernel notes the peak anew (proc(5), clear_refs). What was freed
    and is still held is given back before: a step would take it again unseen."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _child(arguments.child, arguments.lengths, arguments.vocab_size)
    text = _report(
        [
            row
            for engine in ("single", "fsdp")
            for row in _launch(engine, arguments.lengths, arguments.vocab_size)
        ]
    )
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


def _launch(engine: str, lengths: list[int], vocab_size: int) -> list[tuple[Case, Measured]]:
    ranks = 1 if engine == "single" else 2
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        options = ["--child", str(found), "--vocab-size", str(vocab_size), "--lengths", *map(str, lengths)]
        subprocess.run([*launcher, "-m", "benchmarks.long_context", *options], check=True)
        return [(Case(**case), Measured(**row)) for case, row in json.loads(found.read_text())]


def _child(out: Path, lengths: list[int], vocab_size: int) -> None:
    world = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=1800)
    engine = "single" if world.size == 1 else "fsdp"
    rows = []
    for length in lengths:
        for case in cases(engine, length, vocab_size):
            rows.append((asdict(case), asdict(measure(case, world))))
    if world.is_leader:
        out.write_text(json.dumps(rows))
    world.leave()
    end_process(0)


def _report(rows: list[tuple[Case, Measured]]) -> str:
    head = (
        "engine",
        "tokens",
        "documents of",
        "attention",
        "head",
        "one copy of the logits, MiB",
        "peak, MiB",
    )
    cells = [
        (
            case.engine if case.engine == "single" else f"{case.engine}, 2 ranks",
            f"{case.length:,}",
            f"{case.document or case.length:,}",
            case.attention,
            case.head,
            f"{case.logits_bytes / 2**20:,.0f}",
            f"{measured.peak_bytes / 2**20:,.0f}",
        )
        for case, measured in rows
    ]
    return (
        "# Memory of a step on long samples\n\n"
        f"`python -m benchmarks.long_context`: {describe('torch', 'transformers')}.\n\n"
        "A Llama of one block, width 32, activation checkpointing full, float32, one sample a rank; chunks "
        "of 16 MiB. Peak: resident memory beyond what was held before the step, of the rank with the "
        "largest.\n\n" + table(head, cells)
    )


if __name__ == "__main__":
    main()
