"""Tiny jobs of one rank, in this process, whose batches hold chats and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.build import open_data, read_options
from opmix_dist.data.builtin_chat import TEMPLATE
from opmix_dist.data.ingest import PrepareConfig, prepare
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.build import build_engine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.ledger import Ledger
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.build import build_method
from opmix_dist.methods.on_policy import OnPolicy
from opmix_dist.models.source import open_source

DOMAINS = ("chats", "notes")
LENGTH, BATCH = 64, 8


def make_data(folder: Path) -> Path:
    """Chats of a question and a short answer, several in each sample, and notes that are text."""
    words = ["apple", "blue", "cloud", "door", "eagle", "fern", "green", "house", "iron", "lamp"]

    def chat(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([1, number])
        asked = " ".join(rng.choice(words, size=rng.integers(1, 5)))
        messages = [("user", f"Say {number % 7} {asked}"), ("assistant", asked)]
        return {"messages": [{"role": role, "content": content} for role, content in messages]}

    def note(number: int) -> dict[str, Any]:
        return {"text": " ".join(np.random.default_rng([2, number]).choice(words, size=20))}

    for name, make in zip(DOMAINS, (chat, note), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(400)))
    (folder / "template").write_text(TEMPLATE)
    prepare(
        PrepareConfig(
            out=folder / "data", domains={name: [str(folder / f"{name}.jsonl")] for name in DOMAINS},
            chat_domains=["chats"], chat_template=folder / "template", vocab_size=320, sequence_length=LENGTH,
            eval_fraction=0.2, workers=1,
        )
    )  # fmt: skip
    return folder / "data"


def job_config(data: Path, run: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "run_dir": str(run),
        "data": {"root": str(data), "domains": list(DOMAINS), "mask_documents": True},
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
            }
        },
        "optimizer": {"lr": 5e-3},
        "train": {
            "steps": 4, "global_batch_size": BATCH, "micro_batch_size": 4,
            "eval_samples_per_domain": 4, **train,
        },
        "mixture": {"policy": "static", "initial": {"chats": 0.75, "notes": 0.25}},
        "checkpoint": {"interval_steps": 2, "asynchronous": False},
        "search": {"candidates": {"samples_per_domain": 4}},
        "method": method,
    }  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a step is made of."""

    config: RunConfig
    around: MethodAround
    method: OnPolicy
    microbatches: list[TokenBatch]


@contextmanager
def built(config: dict[str, Any]) -> Iterator[Parts]:
    """Engine, method and a first batch, without the rest of a job."""
    checked = check_config(config)
    world = World.join(Placement(Role.TRAINER, 0, 1), device="cpu", timeout_s=60)
    try:
        catalogue = open_data(checked.data)
        source = open_source(checked.model, vocab_size=catalogue.vocab_size, token_ids={}, seed=1)
        engine = build_engine(checked, source, world, catalogue.sequence_length)
        around = MethodAround(
            RunDir(checked.run_dir), checked, world, engine, source, catalogue, Ledger(1), history={}
        )
        method = build_method(around)
        assert isinstance(method, OnPolicy)
        loader = MixtureLoader(
            catalogue, {"chats": 0.75, "notes": 0.25}, global_batch_size=BATCH, rank=0, world_size=1, seed=3,
            reading=read_options(checked.data),
        )  # fmt: skip
        batch = next(loader).batch
        try:
            yield Parts(checked, around, method, batch.split(checked.train.micro_batch_size))
        finally:
            method.close()  # before the groups end that it may be using
    finally:
        world.leave()
