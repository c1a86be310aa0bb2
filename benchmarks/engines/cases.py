"""What is measured: every row of the table, declared before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.kernels.models import Llama
from benchmarks.kernels.sweeps import BASE_1B, BASE_150M, TINY

Loop = Literal["single", "fsdp", "hand", "hf"]
Mode = Literal["inline", "sync", "async"]

HAND = "hand-written loop, plain"
HAND_COMPILED = "hand-written loop, compiled"
"""No row of its own: it is measured in turns with each compiled one."""
SINGLE, SINGLE_COMPILED = "single", "single, compiled"
SINGLE_CHUNKS = "single, compiled, logits in chunks"
SINGLE_SELECTIVE = "single, compiled, selective recomputation"
FSDP, FSDP_COMPILED = "fsdp on one rank", "fsdp on one rank, compiled"
HF, HF_COMPILED = "HF Trainer", "HF Trainer, compiled"

NEEDS = ("transformers", "accelerate", "peft", "safetensors", "pydantic")
JOB_NEEDS = (*NEEDS, "streaming", "cvxpy", "scipy", "pyarrow")
"""Whole jobs read MDS shards and fit laws."""


@dataclass(frozen=True)
class EngineCase:
    """One way to train, beside the loop that is written by hand and compiled where this one is.

    batch: samples of an optimiser step.
    micro: samples of a pass; halved as long as the GPU's memory does not hold it.
    settings: of ``engine``, for those of this project.
    """

    model: Llama
    length: int
    batch: int
    micro: int
    path: str
    loop: Loop
    compiled: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 5
    rounds: int = 5
    lr: float = 3e-4
    timeout_s: float = 240.0

    kind = "engine"
    needs = NEEDS

    @property
    def group(self) -> str:
        return f"{self.model.name}, {self.length} tokens x {self.batch} samples a step"

    @property
    def ours(self) -> bool:
        return self.loop in ("single", "fsdp")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    @property
    def key(self) -> str:
        return f"{self.group} | {self.path}"


@dataclass(frozen=True)
class JobCase:
    """A whole ``opmix train`` with a search, beside the same one without."""

    model: Llama
    length: int
    batch: int
    micro: int
    steps: int
    mode: Mode
    domains: int = 4
    probe_batch: int = 8
    samples_per_domain: int = 16
    compiled: bool = True
    timeout_s: float = 500.0

    kind = "job"
    ours = True
    needs = JOB_NEEDS

    @property
    def group(self) -> str:
        return f"whole jobs: {self.model.name}, {self.steps} steps of {self.batch} x {self.length} tokens"

    @property
    def path(self) -> str:
        return {
            "inline": "the trainer searches",
            "sync": "a second process on the same GPU searches, training waits",
            "async": "a second process on the same GPU searches, training goes on",
        }[self.mode]

    @property
    def key(self) -> str:
        return f"{self.group} | {self.path}"


Case = EngineCase | JobCase

WHOLE = {"logits_memory": None}
"""Logits are not divided: fastest where memory is no concern, and what the other loops do."""
OURS: dict[str, tuple[Loop, bool, dict[str, Any]]] = {
    SINGLE_COMPILED: ("single", True, WHOLE),
    FSDP_COMPILED: ("fsdp", True, WHOLE),
    SINGLE: ("single", False, WHOLE),
    FSDP: ("fsdp", False, WHOLE),
    SINGLE_CHUNKS: ("single", True, {}),
    SINGLE_SELECTIVE: ("single", True, {**WHOLE, "activation_checkpointing": "selective"}),
}
OTHERS: dict[str, tuple[Loop, bool, dict[str, Any]]] = {
    HF_COMPILED: ("hf", True, {}),
    HF: ("hf", False, {}),
    HAND: ("hand", False, {}),
}
LONG = (SINGLE_COMPILED, SINGLE_CHUNKS, SINGLE_SELECTIVE, HF_COMPILED)
"""Rows for long samples."""


def cases() -> list[Case]:
    """In the order in which they are measured: what has a target comes first."""
    short = [*_engines(BASE_1B, 2048, batch=32, micro=8), *_engines(BASE_150M, 2048, batch=64, micro=16)]
    targets = [case for case in short if case.path in (SINGLE_COMPILED, FSDP_COMPILED)]
    rest = [case for case in short if case not in targets]
    jobs = [JobCase(BASE_150M, 2048, batch=64, micro=16, steps=100, mode=mode) for mode in MODES]
    long = [
        case
        for length, batch, micro in ((8192, 16, 4), (32_768, 4, 1))
        for case in _engines(BASE_150M, length, batch=batch, micro=micro)
        if case.path in LONG
    ]
    return [*targets, *rest, *jobs, *long]


MODES: tuple[Mode, ...] = ("inline", "sync", "async")


def dry_cases() -> list[Case]:
    """The same rows, tiny."""
    jobs = [
        JobCase(
            TINY, 64, batch=8, micro=4, steps=8, mode=mode, domains=2, probe_batch=2, samples_per_domain=2,
            compiled=False,
        )
        for mode in MODES
    ]  # fmt: skip
    return [*_engines(TINY, 16, batch=4, micro=2, steps=2, rounds=2, lr=1e-2), *jobs]


def _engines(model: Llama, length: int, **sizes: Any) -> Iterator[EngineCase]:
    for path, (loop, compiled, settings) in {**OURS, **OTHERS}.items():
        yield EngineCase(model, length, path=path, loop=loop, compiled=compiled, settings=settings, **sizes)
