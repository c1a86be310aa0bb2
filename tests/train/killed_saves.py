"""``python -m tests.train.killed_saves FOLDER ROUNDS``: children that save checkpoint after checkpoint are
killed at random moments; each child first resumes from what the one before has left.

Children are forked, so that what takes long, to import torch, happens once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import IO

import torch

from opmix_dist.config import CheckpointConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import Engine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.train.checkpoint import Checkpointer
from tests.engines.ranks import build, fresh
from tests.train.checkpoint_ranks import state_of


def fill(engine: Engine, step: int) -> None:
    """Parameters that tell which step they are of."""
    for index, name in enumerate(engine.shapes):
        engine._set_whole("parameter", name, torch.full(engine.shapes[name], step + index / 1000))


def save_until_killed(run: RunDir, say: IO[str]) -> None:
    """Resume, check what was loaded, and save further steps without end; tell each event as [what, step]."""
    world = World.join(Placement(Role.TRAINER, 0, 1), device="cpu")
    engine = build(world, fresh("llama"), {"name": "single"})
    checkpointer = Checkpointer(run, CheckpointConfig(), world)
    step = checkpointer.newest()
    if step is not None:
        state = checkpointer.load(engine, step)
        assert state.step == step
        for index, (name, tensor) in enumerate(engine._whole("parameter")):
            expected = torch.full(engine.shapes[name], step + index / 1000)
            assert torch.equal(tensor, expected), f"step {step}: {name} is not what was saved"
    print(json.dumps(["resumed", step or 0]), file=say, flush=True)
    for next_step in range((step or 0) + 1, 1_000_000):
        fill(engine, next_step)
        print(json.dumps(["begun", next_step]), file=say, flush=True)
        checkpointer.save(engine, state_of(world, next_step))
        checkpointer.wait()
        print(json.dumps(["saved", next_step]), file=say, flush=True)


def one_round(run: RunDir, random_numbers: random.Random, duration_s: float) -> tuple[int, int, int, float]:
    """Let a child save a few times, and kill it in the next save or soon after. The step it resumed from,
    the last step that it said was saved, that of the save that was aimed at, and how long a save took."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            save_until_killed(run, os.fdopen(write_end, "w"))
        finally:
            os._exit(1)  # never the parent's code
    os.close(write_end)
    whole_ones = random_numbers.randrange(3)
    resumed = saved = -1
    began = 0.0
    with os.fdopen(read_end) as events:
        for line in events:
            what, step = json.loads(line)
            if what == "resumed":
                resumed = step
            elif what == "saved":
                saved, duration_s = step, time.monotonic() - began
            else:
                began = time.monotonic()
                if step > resumed + whole_ones:
                    break
        assert resumed >= 0, "the child failed; its traceback is above"
        time.sleep(random_numbers.uniform(0, 2 * duration_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for line in events:  # what it said before it died
            what, step = json.loads(line)
            saved = step if what == "saved" else saved
    return resumed, max(saved, resumed), resumed + whole_ones + 1, duration_s


def main(folder: Path, rounds: int) -> None:
    run = RunDir(folder)
    random_numbers = random.Random(0)
    last_saved, duration_s, cut_off = 0, 0.05, 0
    for _ in range(rounds):
        resumed, saved, aimed_at, duration_s = one_round(run, random_numbers, duration_s)
        assert resumed >= last_saved, f"step {last_saved} was saved, and the next resumed from {resumed}"
        last_saved = saved
        cut_off += saved < aimed_at
    print(json.dumps({"saved": last_saved, "cut off": cut_off, "duration_s": duration_s}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
