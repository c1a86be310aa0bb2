"""What the ranks of test_long_steps.py do: ``python -m tests.engines.long_ranks FILE`` under torchrun."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.long_context import CHUNKED, WHOLE, Case, measure
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.process import end_process

LENGTH, VOCABULARY = 32768, 4096
ALONE = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))


def case(engine: str, head: str) -> Case:
    """Documents of 2,048 tokens, so that attention costs little beside the head."""
    return Case(engine, LENGTH, "varlen", 2048, head, VOCABULARY, hidden_size=16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=300)
    rows = {}
    for head in (CHUNKED, WHOLE):
        rows[f"fsdp, {head}"] = asdict(measure(case("fsdp", head), world))
        if world.is_leader:
            rows[f"single, {head}"] = asdict(measure(case("single", head), ALONE))
        world.barrier()
    if world.is_leader:
        Path(sys.argv[1]).write_text(json.dumps(rows))
    world.leave()
    end_process(0)
