"""What the ranks of test_engines.py do: ``python -m tests.engines.ranks FOLDER`` under torchrun.

One launch does as much as it can: to import everything takes longer than any of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from opmix_dist.config import CheckpointConfig, EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import KINDS, Engine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.source import ModelSource, checkpoint_source
from opmix_dist.process import end_process
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.model_writer import ModelWriter
from opmix_dist.train.state import TrainerState
from tests.helpers import alone_in_rows, documents, one_by_one, pack, tiny_llama_config, uneven_batch

BATCH, MICRO, LENGTH, LR = 12, 3, 16, 3e-3
STEPS = 30 if "RESUME_MATRIX" in os.environ else 12
SAVED = 4
HEAD_CHUNK = 8 * 4 * 64 * 5
"""Bytes of the logits of 40 tokens of the 48 in a micro-batch; 5 make a chunk."""
PACKS = documents(seed=0), documents(seed=10)

SHARED = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(tied=True),  # 32 and 64 rows: uneven on three ranks
    "even": LlamaConfig(hidden_size=24, intermediate_size=48, vocab_size=72, **SHARED),
    "qwen3": Qwen3Config(hidden_size=32, intermediate_size=48, head_dim=8, vocab_size=64, **SHARED),
}
# By number of ranks: model and settings of the engine, besides its name, which is single on one rank. Layouts
# without further settings are in test_resume_matrix.py.
CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {
        **{f"single, {name}": (name, {"name": "single"}) for name in MODELS},
        "fsdp": ("llama", {}),
        "full": ("llama", {"name": "single", "activation_checkpointing": "full"}),
    },
    2: {
        "offload, full": ("llama", {"fsdp": {"cpu_offload": True}, "activation_checkpointing": "full"}),
        "head in chunks": ("llama", {"logits_memory": HEAD_CHUNK}),
        "selective": ("even", {"reshard_after_forward": False, "activation_checkpointing": "selective"}),
        "tensor": ("qwen3", {"fsdp": {"tensor_parallel": 2}}),
        "tensor, loss": ("llama", {"fsdp": {"tensor_parallel": 2, "loss_parallel": True}}),
        "bfloat16": ("llama", {"param_dtype": "bfloat16"}),
    },
    3: {"even": ("even", {})},
    4: {
        "tensor x shard": ("qwen3", {"fsdp": {"tensor_parallel": 2}}),
        "tensor x replicas": ("llama", {"fsdp": {"tensor_parallel": 2, "replicas": 2}}),
    },
}
RESUMED: dict[int, dict[str, Any]] = {1: {"name": "single"}, 2: {}}
"""Settings of the engine, by number of ranks."""


def build(world: World, source: ModelSource, config: dict[str, Any]) -> Engine:
    kind = SingleEngine if config.get("name") == "single" else FSDPEngine
    return kind(
        source,
        world,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


def fresh(model: str, attention: str = "sdpa") -> ModelSource:
    return ModelSource(MODELS[model], attention=attention, seed=3)


def global_batch(step: int) -> TokenBatch:
    """Samples with different numbers of targets; the first micro-batches, and with them the first rank of
    three, have none."""
    batch = uneven_batch(step, BATCH, LENGTH, mask_documents=True)
    mask = batch.loss_mask.clone()
    mask[: BATCH // 3] = False
    return dataclasses.replace(batch, loss_mask=mask)


def heldout() -> TokenBatch:
    return uneven_batch(99, 7, LENGTH, mask_documents=True)


def share_of(engine: Engine, batch: TokenBatch) -> TokenBatch:
    """The samples of this rank's replica."""
    share = len(batch) // engine.replica.size
    return batch[slice(engine.replica.rank * share, (engine.replica.rank + 1) * share)]


def train(engine: Engine, first: int, last: int) -> list[list[float]]:
    """[mean loss over the global batch's targets, gradient norm] of steps ``first`` to ``last``."""
    curve = []
    for step in range(first, last):
        batch = global_batch(step)
        mine = share_of(engine, batch)
        result = engine.train_step(mine.split(MICRO), lr=LR)
        assert torch.equal(result.targets, mine.targets)
        total = engine.sum(result.sample_losses.sum())
        curve.append([total.item() / batch.targets.sum().item(), result.grad_norm])
    return curve


def everything(world: World, out: Path) -> None:
    """Curves of all cases of this number of ranks, and what else one launch can show."""
    found = {name: curve(world, *case) for name, case in CASES[world.size].items()}
    report(world, out / f"curves_{world.size}.json", found)
    if world.size <= 2:
        report(world, out / f"exact_{world.size}.json", exact(world, out))
        packs = [packed(world, attention) for attention in ("sdpa", "eager")[: world.size]]
        report(world, out / f"packed_{world.size}.json", packs)
        report(world, out / f"exported_{world.size}.json", exported(world, out / f"hf_{world.size}"))
    if world.size == 2:  # last: it leaves a model of NaN
        (out / f"raised_{world.rank}.json").write_text(json.dumps(non_finite(world)))


def curve(world: World, model: str, config: dict[str, Any]) -> dict[str, Any]:
    engine = build(world, fresh(model), config)
    steps = train(engine, 0, STEPS)
    return {"model": model, "steps": steps, "evaluation": engine.evaluate(heldout(), batch_size=2).tolist()}


def exact(world: World, out: Path) -> dict[str, Any]:
    """Four steps, a checkpoint, four more; the same four from the checkpoint; written in both modes."""
    found = {}
    for mode in ("asynchronous", "synchronous"):
        engine = build(world, fresh("llama"), RESUMED[world.size])
        checkpointer, _ = saved(world, engine, out / f"{mode}_{world.size}", mode == "asynchronous")
        rest = train(engine, SAVED, 2 * SAVED)
        checkpointer.wait()
        again = resumed(world, out / f"{mode}_{world.size}", RESUMED[world.size])
        found[mode] = [rest, again]
    return found


def saved(
    world: World, engine: Engine, run: Path, asynchronous: bool = True
) -> tuple[Checkpointer, list[list[float]]]:
    """Begin to save after four steps, whose curve is returned; an evaluation before it leaves its marks on
    sharded models."""
    checkpointer = Checkpointer(RunDir(run), CheckpointConfig(asynchronous=asynchronous), world)
    steps = train(engine, 0, SAVED)
    engine.evaluate(heldout(), batch_size=2)
    state = TrainerState(
        step=SAVED, weights={"a": 1.0}, domain_tokens={"a": 0}, content={}, world_size=world.size,
        global_batch_size=BATCH,
    )  # fmt: skip
    checkpointer.save(engine, state)
    state.step = 2 * SAVED  # the trainer's own, which moves on before a save in the background has ended
    return checkpointer, steps


def resumed(world: World, run: Path, config: dict[str, Any]) -> list[list[float]]:
    engine = build(world, ModelSource(MODELS["llama"], seed=4), config)
    checkpointer = Checkpointer(RunDir(run), CheckpointConfig(), world)
    newest = checkpointer.newest()
    assert newest == SAVED
    state = checkpointer.load(engine, newest)
    assert engine.optimizer_steps == SAVED
    return train(engine, state.step, 2 * SAVED)


SPIKE = 1.0
"""A limit that is below every loss of an untrained model, in nats per token."""


def raised(engine: Engine, batch: TokenBatch, **options: float) -> str:
    """Class of the error that a step on ``batch`` ends in."""
    try:
        engine.train_step(batch.split(MICRO), lr=LR, **options)
    except Exception as error:
        return type(error).__name__
    return ""


def non_finite(world: World) -> dict[str, Any]:
    """A batch without targets, a loss and a gradient above the limit, a NaN on one rank: all ranks raise, and
    none changes its parameters."""
    engine = build(world, fresh("llama"), {})
    before = whole(engine)
    batch = uneven_batch(0, BATCH // world.size, LENGTH)
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    errors = [raised(engine, empty)]
    errors += [raised(engine, batch, **limit) for limit in ({"loss_limit": SPIKE}, {"norm_limit": 1e-6})]
    if world.rank == 0:
        engine.model.model.norm.weight.to_local().data.view(-1)[0] = float("nan")
    errors.append(raised(engine, batch))
    after = whole(engine)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return {"errors": errors, "moved": moved, "steps": engine.optimizer_steps}


def whole(engine: Engine) -> dict[str, Tensor]:
    """All tensors of all kinds, on every rank."""
    return {f"{kind} {name}": t.clone() for kind in KINDS for name, t in engine._whole(kind)}


def packed(world: World, attention: str) -> dict[str, list[float]]:
    """The same documents packed into two samples and padded into eight."""
    together = TokenBatch.cat([pack(parts, 2 * LENGTH) for parts in PACKS])
    alone = TokenBatch.cat([alone_in_rows(parts, 2 * LENGTH) for parts in PACKS])
    each = TokenBatch.cat([one_by_one(parts, 2 * LENGTH) for parts in PACKS])
    found = {}
    for name, batch, evaluated in (("packed", together, each), ("alone", alone, alone)):
        engine = build(world, fresh("llama", attention), {})
        losses = engine.evaluate(evaluated, batch_size=3)
        result = engine.train_step(share_of(engine, batch).split(1), lr=LR)
        total = engine.sum(result.sample_losses.sum()).item()
        found[name] = [*losses.tolist(), total, result.grad_norm]
    return found


def exported(world: World, folder: Path) -> dict[str, Any]:
    """A trained model written in both dtypes while it trains on, and read again by the engine."""
    source = fresh("llama")
    engine = build(world, source, {})
    train(engine, 0, 2)
    losses = engine.evaluate(heldout(), batch_size=2).tolist()
    writer = ModelWriter(world, engine, source)
    assert writer.begin(folder / "exact", dtype=torch.float32, marker={"step": 2}) == ""
    train(engine, 2, 4)
    assert writer.write(folder / "half", dtype=torch.bfloat16, marker={"step": 4}) == ""
    (folder / "file").write_text("where a folder should be")
    again = build(world, checkpoint_source(str(folder / "exact")), {})
    return {
        "losses": losses,
        "read": again.evaluate(heldout(), batch_size=2).tolist(),
        "failure": writer.write(folder / "file" / "below", dtype=torch.float32, marker={}),
    }


def report(world: World, path: Path, found: object) -> None:
    if world.is_leader:
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=120)
    everything(joined, Path(sys.argv[1]))
    joined.leave()
    end_process(0)
