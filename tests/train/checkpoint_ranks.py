"""What the ranks of test_checkpoint.py do: ``python -m tests.train.checkpoint_ranks OUT DISK``.

``DISK`` is the mount point of a small file system, or "" where none can be mounted.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from opmix_dist.config import CheckpointConfig
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.process import end_process
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.state import TrainerState
from tests.engines.ranks import BATCH, build, fresh, train, whole


class Messages(logging.Handler):
    """Warnings of the checkpointer, in order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("opmix_dist.train.checkpoint").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def taken(self) -> list[str]:
        """Those since the last call."""
        found, self.texts = self.texts, []
        return found


class Trainer:
    """An engine that trains a step at a time and saves after it."""

    def __init__(self, world: World, run: Path, **settings: Any) -> None:
        self.world, self.run = world, RunDir(run)
        self.engine: Engine = build(world, fresh("llama"), {})
        self.checkpointer = Checkpointer(self.run, CheckpointConfig(**settings), world)
        self.step = 0

    def save_after_a_step(self) -> None:
        train(self.engine, self.step, self.step + 1)
        self.step += 1
        self.checkpointer.save(self.engine, state_of(self.world, self.step))

    def steps(self) -> list[int]:
        """Of the complete checkpoints, once nothing is being written."""
        self.checkpointer.wait()
        self.world.barrier()
        return self.run.complete_checkpoints()

    def resumed(self) -> tuple[int | None, bool]:
        """Step that a new engine resumes from, and whether it is what an engine that trained to it is."""
        newest = self.checkpointer.newest()
        if newest is None:
            return None, True
        again, expected = (build(self.world, fresh("llama"), {}) for _ in range(2))
        state = self.checkpointer.load(again, newest)
        assert state.step == newest
        train(expected, 0, newest)
        found, wanted = whole(again), whole(expected)
        return newest, all(torch.equal(found[name], wanted[name]) for name in wanted)


def state_of(world: World, step: int) -> TrainerState:
    return TrainerState(
        step=step, weights={"a": 1.0}, domain_tokens={"a": 0}, content={}, world_size=world.size,
        global_batch_size=BATCH,
    )  # fmt: skip


def kept_and_damaged(world: World, out: Path, messages: Messages) -> dict[str, Any]:
    """Seven checkpoints are pruned to three; of these the newest two are damaged, and then the third too."""
    trainer = Trainer(world, out / "kept", keep=2, keep_every_steps=4)
    for _ in range(7):
        trainer.save_after_a_step()
    found: dict[str, Any] = {"kept": trainer.steps()}
    if world.is_leader:
        shutil.copytree(trainer.run.checkpoint(6), out / "whole")  # for the test to look at
        flip_a_byte(trainer.run.checkpoint(7) / "__1_0.distcp")
        os.truncate(trainer.run.checkpoint(6) / ".metadata", 100)
    world.barrier()
    sizes = Checkpointer(trainer.run, CheckpointConfig(verify="sizes"), world)
    found["by sizes"] = sizes.newest()
    found["resumed"] = trainer.resumed()
    found["set aside"] = trainer.run.damaged_checkpoints()
    found["left"] = trainer.steps()
    found["messages"] = messages.taken()
    if world.is_leader:
        (trainer.run.checkpoint(4) / "trainer.json").unlink()
    world.barrier()
    try:
        trainer.checkpointer.newest()
    except UserError as error:
        found["all damaged"] = str(error)
    return found


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def full_disk(world: World, disk: Path, messages: Messages) -> dict[str, Any]:
    """A file system with room for one and a half checkpoints."""
    trainer = Trainer(world, disk / "run")
    trainer.save_after_a_step()
    found: dict[str, Any] = {"first": trainer.steps()}
    filler = disk / "filler"
    if world.is_leader:
        taken = sum(path.stat().st_size for path in trainer.run.checkpoint(1).iterdir())
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - taken // 2))
    world.barrier()
    free = shutil.disk_usage(disk).free
    lines = files.PatientLines(disk / "lines.jsonl")
    trainer.save_after_a_step()  # fails in the background
    trainer.save_after_a_step()  # has waited for it, and fails too
    found["while full"] = trainer.steps()
    found["folders"] = sorted(path.name for path in trainer.run.checkpoints.iterdir())
    found["messages"] = messages.taken()
    found["given back"] = shutil.disk_usage(disk).free >= free
    found["resumed"] = trainer.resumed()
    if world.is_leader:
        (disk / "rest").write_bytes(bytes(shutil.disk_usage(disk).free))
        lines.append({"pad": "x" * 10_000})
        lines.append({"pad": ""})
        found["lines while full"] = len(files.read_jsonl(lines.path))
        filler.unlink()
    world.barrier()
    trainer.save_after_a_step()
    found["with room again"] = trainer.steps()
    if world.is_leader:
        lines.append({"pad": ""})
        found["lines"] = [len(row["pad"]) for row in files.read_jsonl(lines.path)]
    return found


def one_rank_cannot_write(world: World, out: Path, messages: Messages) -> dict[str, Any]:
    """Files of one rank may have a few bytes only."""
    trainer = Trainer(world, out / "limited")
    trainer.save_after_a_step()
    found: dict[str, Any] = {"first": trainer.steps()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    trainer.save_after_a_step()
    found["while limited"] = trainer.steps()
    found["folders"] = sorted(path.name for path in trainer.run.checkpoints.iterdir())
    found["messages"] = messages.taken()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trainer.save_after_a_step()
    found["without limit"] = trainer.steps()
    found["resumed"] = trainer.resumed()
    return found


def main(out: Path, disk: str) -> None:
    world = World.join(Placement.from_environment(0), device="cpu", timeout_s=120.0)
    messages = Messages()
    found = {
        "kept and damaged": kept_and_damaged(world, out, messages),
        "full disk": full_disk(world, Path(disk), messages) if disk else None,
        "one rank": one_rank_cannot_write(world, out, messages),
    }
    (out / f"found_{world.rank}.json").write_text(json.dumps(found))
    world.leave()
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
