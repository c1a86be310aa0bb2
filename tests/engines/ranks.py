"""What the ranks of test_engines.py do: ``python -m tests.engines.ranks NAME ARGUMENTS`` under torchrun."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from opmix_dist.config import CheckpointConfig, EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.process import end_process
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.state import TrainerState
from tests.helpers import alone_in_rows, documents, one_by_one, pack, tiny_llama, uneven_batch

BATCH, MICRO, LENGTH, LR = 12, 2, 16, 1e-2
PACKS = documents(seed=0), documents(seed=10)


def build(world: World, *, attention: str = "sdpa", **config: object) -> Engine:
    kind = SingleEngine if world.size == 1 else FSDPEngine
    model = tiny_llama(tied=True)
    model.set_attn_implementation(attention)
    return kind(
        model,
        world,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


def global_batch(step: int) -> TokenBatch:
    """Samples with different numbers of targets; the first micro-batches, and with them the first rank of
    three, have none."""
    batch = uneven_batch(step, BATCH, LENGTH, mask_documents=True)
    mask = batch.loss_mask.clone()
    mask[: BATCH // 3] = False
    return dataclasses.replace(batch, loss_mask=mask)


def train(engine: Engine, first: int, last: int) -> list[list[float]]:
    """[mean loss over the global batch's targets, gradient norm] of steps ``first`` to ``last``."""
    curve = []
    share = BATCH // engine.world.size
    for step in range(first, last):
        batch = global_batch(step)
        mine = batch[slice(engine.world.rank * share, (engine.world.rank + 1) * share)]
        result = engine.train_step(mine.split(MICRO), lr=LR)
        assert torch.equal(result.targets, mine.targets)
        total = engine.world.sum(result.sample_losses.sum())
        curve.append([total.item() / batch.targets.sum().item(), result.grad_norm])
    return curve


def curve(world: World, out: Path, options: str) -> None:
    """Train eight steps, evaluate, export; the leader writes curve.json."""
    engine = build(world, **json.loads(options))
    steps = train(engine, 0, 8)
    losses = engine.evaluate(uneven_batch(99, 7, LENGTH, mask_documents=True), batch_size=2)
    parameters = engine.full_parameters()
    if parameters is not None:
        engine.save_hf(parameters, out / "hf")
        (out / "curve.json").write_text(json.dumps({"steps": steps, "evaluation": losses.tolist()}))


def save(world: World, out: Path, asynchronous: str) -> None:
    """Four steps, a checkpoint, four more."""
    engine, checkpointer, state = with_checkpoints(world, out, asynchronous == "async")
    train(engine, 0, 4)
    state.step = 4
    checkpointer.save(engine, state)
    state.step = 8  # the trainer's own, which moves on before a save in the background has ended
    rest = train(engine, 4, 8)
    checkpointer.wait()
    report(world, out / f"saved_{world.size}.json", rest)


def resume(world: World, out: Path, _: str) -> None:
    """The same four steps from the checkpoint, on whatever number of ranks."""
    engine, checkpointer, _state = with_checkpoints(world, out, True)
    newest = checkpointer.newest()
    assert newest == 4
    state = checkpointer.load(engine, newest)
    report(world, out / f"resumed_{world.size}.json", train(engine, state.step, 8))


def raised(engine: Engine, batch: TokenBatch) -> str:
    """Class of the error that a step on ``batch`` ends in."""
    try:
        engine.train_step(batch.split(MICRO), lr=LR)
    except Exception as error:
        return type(error).__name__
    return ""


def non_finite(world: World, out: Path, _: str) -> None:
    """A batch without targets, then a NaN on one rank: all ranks raise, and none changes its parameters."""
    engine = build(world)
    before = engine.full_parameters()
    batch = uneven_batch(0, BATCH // world.size, LENGTH)
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    errors = [raised(engine, empty)]
    weights = engine.model.model.norm.weight
    local = getattr(weights, "to_local", lambda: weights)()
    if world.rank == 0:
        local.data.view(-1)[0] = float("nan")
    errors.append(raised(engine, batch))
    after = engine.full_parameters()
    moved = before is not None and any(
        not torch.equal(before[n], after[n]) for n in before if n != "model.norm.weight"
    )
    (out / f"raised_{world.rank}.json").write_text(json.dumps({"errors": errors, "moved": moved}))


def packed(world: World, out: Path, attention: str) -> None:
    """The same documents packed into two samples and padded into eight; the leader writes packed.json."""
    together = TokenBatch.cat([pack(parts, 2 * LENGTH) for parts in PACKS])
    alone = TokenBatch.cat([alone_in_rows(parts, 2 * LENGTH) for parts in PACKS])
    each = TokenBatch.cat([one_by_one(parts, 2 * LENGTH) for parts in PACKS])
    found = {}
    for name, batch, evaluated in (("packed", together, each), ("alone", alone, alone)):
        engine = build(world, attention=attention)
        share = len(batch) // world.size
        mine = batch[slice(world.rank * share, (world.rank + 1) * share)]
        losses = engine.evaluate(evaluated, batch_size=3)
        result = engine.train_step(mine.split(1), lr=LR)
        total = world.sum(result.sample_losses.sum()).item()
        found[name] = [*losses.tolist(), total, result.grad_norm]
    report(world, out / "packed.json", found)


def with_checkpoints(
    world: World, out: Path, asynchronous: bool
) -> tuple[Engine, Checkpointer, TrainerState]:
    config = CheckpointConfig(asynchronous=asynchronous)
    checkpointer = Checkpointer(RunDir(out), config, world)
    state = TrainerState(
        weights={"a": 1.0}, domain_tokens={"a": 0}, content={}, world_size=world.size, global_batch_size=BATCH
    )
    return build(world), checkpointer, state


def report(world: World, path: Path, found: object) -> None:
    if world.is_leader:
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=60)
    commands = (curve, save, resume, non_finite, packed)
    {command.__name__: command for command in commands}[sys.argv[1]](joined, Path(sys.argv[2]), sys.argv[3])
    joined.leave()
    end_process(0)
