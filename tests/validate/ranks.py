"""Two validations of one run, on all ranks of a launch: ``python -m tests.validate.ranks RUN FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from opmix_dist.distributed import Placement, World
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.validate.config import ValidateConfig
from opmix_dist.validate.job import validate


def main() -> None:
    run, folder = RunDir(sys.argv[1]), Path(sys.argv[2])
    world = World.join(Placement.from_environment(0), device="cpu", timeout_s=120)
    for name, ranks_per_model in (("dealt", 1), ("together", world.size)):
        settings = ValidateConfig(
            design={"mixtures": 1},
            real={"seeds": [0, 1]},
            folder=str(folder / name),
            evaluation_batch_size=4,
            ranks_per_model=ranks_per_model,
        )
        validate(run, settings, world)
    world.leave()


if __name__ == "__main__":
    main()
