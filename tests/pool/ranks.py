"""What the ranks of test_teams.py do: ``python -m tests.pool.ranks DATA FOLDER`` under torchrun on 4 ranks.

Searches follow one another, each by the first ranks of the launch; the others go on to the next one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from opmix_dist.config import RunConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.build import snapshot_source
from opmix_dist.pool import candidates, evaluating, probes
from opmix_dist.pool.loading import load
from opmix_dist.pool.run_search import Searcher
from opmix_dist.pool.team import Crew
from opmix_dist.process import end_process
from tests.pool.searches import quick_config, request

PROBES = {"batch_size": 3, "micro_batch_size": 1, "max_joint": 3, "dropout": 0.05}
EAGER = {"samples_per_domain": 6, "batch_size": 4, "joint": 3}  # 18 samples in 5 passes
SETTINGS: dict[str, dict[str, Any]] = {
    "law": {
        "probes": PROBES,
        "candidates": {**EAGER, "early_stop": 0.51},
        "refinement": {"rounds": 1, "count": 2},
    },
    "smaller": {"probes": PROBES, "candidates": {**EAGER, "batch_size": 2}},
    "merge": {"probes": PROBES, "candidates": {**EAGER, "method": "merge"}},
    "gradient": {
        "probes": PROBES,
        "candidates": EAGER,
        "method": "gradient",
        "gradient": {"max_evaluations": 2},
    },
    "16 bits": {"probes": PROBES, "candidates": {**EAGER, "dtype": "bfloat16"}},
}


@dataclass(frozen=True)
class Case:
    """A search by so many ranks; ``fails``: what happens to the last one of them, in the first of several
    attempts, and ``resumes``: what then goes on with the search."""

    settings: str
    ranks: int
    per_model: int = 1
    fails: str = ""
    resumes: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    **{
        f"{settings} {ranks}/{per_model}": Case(settings, ranks, per_model)
        for settings, layouts in {
            "law": [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)],
            "merge": [(1, 1), (4, 1), (2, 2)],
            "gradient": [(1, 1), (4, 1), (2, 2)],
            "16 bits": [(1, 1), (2, 2), (4, 4)],
            "smaller": [(1, 1)],
        }.items()
        for ranks, per_model in layouts
    },
    "killed 4/2": Case("law", 4, 2, fails="killed", resumes=(2, 1)),
    "memory 2/1": Case("smaller", 2, 1, fails="memory", options={"batch_size": 4}),
    "memory 2/2": Case("smaller", 2, 2, fails="memory", resumes=(2, 1), options={"batch_size": 4}),
    "unreadable 2/2": Case("law", 2, 2, fails="unreadable"),
}


class Killed(BaseException):
    """Nothing catches it: as good as a kill."""


def config_of(data: Path, folder: Path, name: str, ranks_per_model: int) -> RunConfig:
    case = CASES[name]
    search = dict(SETTINGS[case.settings])
    search["candidates"] = {**search["candidates"], **case.options}
    search["proposal"] = {"bootstrap": 2}
    config = quick_config(data, folder / name.replace("/", " of "), **search)
    dtype = "bfloat16" if case.settings.startswith("16 bits") else "float32"
    return config.model_copy(
        update={
            "pool": config.pool.model_copy(update={"ranks_per_model": ranks_per_model}),
            "engine": config.engine.model_copy(update={"param_dtype": dtype}),
        }
    )


@contextmanager
def failing(kind: str) -> Iterator[None]:
    """Inside, this rank dies in the third group of candidates, or memory runs out in passes of more than six
    samples, or samples cannot be read in the second step."""
    patch = pytest.MonkeyPatch()
    simulate, losses, read = evaluating.simulate_sums, candidates.sample_losses, probes._read
    groups: list[int] = []

    def killed(*arguments: Any, **options: Any) -> Any:
        groups.append(1)
        if len(groups) == 3:
            raise Killed
        return simulate(*arguments, **options)

    def short_of_memory(model: Any, batch: Any) -> Any:
        if len(batch) > 3 * 2:  # of three candidates with two samples each
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(model, batch)

    def unreadable(batches: Any, step: int) -> Any:
        if step == 1:
            raise OSError("no such shard")
        return read(batches, step)

    if kind == "killed":
        patch.setattr(evaluating, "simulate_sums", killed)
    elif kind == "memory":
        patch.setattr(candidates, "sample_losses", short_of_memory)
    else:
        patch.setattr(probes, "_read", unreadable)
    try:
        yield
    finally:
        patch.undo()


class Launch:
    """This rank, in one world after the other."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.rank, self.worlds = Placement.from_environment(0).rank, 0

    def join(self, ranks: int) -> World | None:
        """None where this rank is not one of the first so many."""
        self.worlds += 1
        if self.rank >= ranks:
            return None
        return World.join(
            Placement(Role.POOL, self.rank, ranks), device="cpu", timeout_s=60.0, generation=self.worlds
        )

    def run(self, name: str) -> None:
        """What fails runs in a process of its own, as a pool's workers do: the end of it closes its
        connections, which the others see."""
        case = CASES[name]
        if case.fails and (child := os.fork()):
            _, status = os.waitpid(child, 0)
            assert os.WIFEXITED(status), name
            self.worlds += 1
        elif case.fails:
            self.search(name, case.ranks, case.per_model, case.fails)
            end_process(0)
        else:
            self.search(name, case.ranks, case.per_model)
        if case.resumes is not None:
            self.search(name, *case.resumes)

    def search(self, name: str, ranks: int, per_model: int, fails: str = "") -> None:
        world = self.join(ranks)
        if world is None:
            return
        config = config_of(self.data, self.folder, name, per_model)
        if world.is_leader and not RunDir(config.run_dir).search("0001").request_file.exists():
            request(config)
        world.barrier()
        last = bool(fails) and world.rank == world.size - 1
        try:
            with failing(fails) if last else nullcontext():
                searcher = Searcher(RunDir(config.run_dir), config, world)
                searcher.answer(searcher.run.search("0001"))
        except Killed:
            end_process(0)
        except RuntimeError as error:
            if not fails:
                raise
            file = Path(config.run_dir) / f"ended_{world.rank}"
            file.write_text(f"{type(error).__name__}: {error}")
            end_process(0)
        world.leave()

    def count_parameters(self) -> None:
        """What a rank reads and holds of a model that all of them share, before and after a pass."""
        world = self.join(4)
        assert world is not None
        config = config_of(self.data, self.folder, "law 1/1", 4)
        folder = RunDir(config.run_dir).snapshot(4)
        source = snapshot_source(folder, attention="sdpa", trust_remote_code=False)
        read: list[int] = []
        part = source.part

        def counted(name: str, index: Any) -> Any:
            found = part(name, index)
            read.append(found.numel())
            return found

        source.part = counted
        model = load(source, world.device, Crew.of(world, 4).team.mesh(world.device))
        held = [shards(model)]
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None])
        held.append(shards(model))
        whole = sum(shape.numel() for shape in source.shapes.values())
        found = {"read": sum(read), "held": held, "whole": whole}
        (self.folder / f"parameters_{world.rank}.json").write_text(json.dumps(found))
        world.leave()


def shards(model: torch.nn.Module) -> int:
    """Numbers of the parameters that lie on this rank."""
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
    return sum(p.to_local().untyped_storage().nbytes() // p.element_size() for p in model.parameters())


def main() -> None:
    launch = Launch(Path(sys.argv[1]), Path(sys.argv[2]))
    for name in sorted(CASES, key=lambda name: not CASES[name].fails):  # forks before there are threads
        launch.run(name)
    launch.count_parameters()
    end_process(0)


if __name__ == "__main__":
    main()
