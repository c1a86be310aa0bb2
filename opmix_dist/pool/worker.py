"""The pool's worker: waits for requests in the run directory and answers them, one after the other."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING

import yaml

from opmix_dist.config import RunConfig, check_config
from opmix_dist.exchange.rundir import RunDir, SearchDir
from opmix_dist.pool.heart import Heart

if TYPE_CHECKING:
    from opmix_dist.distributed import World
    from opmix_dist.pool.run_search import Searcher

log = logging.getLogger(__name__)


def oldest_open_search(run: RunDir) -> SearchDir | None:
    """The first search that is requested, not answered, and not given up by the trainers; or None."""
    decided = {record.search for record in run.mixtures()}
    for search in run.search_dirs():
        status = search.status()
        if search.name not in decided and (status is None or not status.stage.final):
            return search
    return None


def work(run: RunDir, config: RunConfig, rank: int, size: int, heart: Heart) -> None:
    """Answer requests until the run has ended (summary.json). All pool ranks run this.

    Raises:
        BrokenTeamError: the process is to end, so that the supervisors start all workers again.
    """
    from opmix_dist.determinism import use_deterministic_kernels
    from opmix_dist.distributed import Placement, Role, World
    from opmix_dist.pool.run_search import Searcher

    heart.beat()
    if config.deterministic:
        use_deterministic_kernels()
    generation = int(os.environ.get("OPMIX_POOL_GENERATION", "0"))
    world = World.join(
        Placement(Role.POOL, rank, size),
        device=config.engine.device,
        timeout_s=config.engine.collective_timeout_s,
        generation=generation,
    )
    try:
        _answer_all(run, config, world, Searcher(run, config, world, on_beat=heart.beat), heart)
    except BaseException as error:
        world.explain(error)
        raise
    world.leave()


def _answer_all(run: RunDir, config: RunConfig, world: World, searcher: Searcher, heart: Heart) -> None:
    world.enter("waiting for a request")
    while (name := world.share_text(_next(run) if world.is_leader else None)) != "end":
        if name:
            world.enter(f"search {name}")
            searcher.answer(run.search(name))
            world.enter("waiting for a request")
        else:
            time.sleep(config.pool.poll_interval_s)
        heart.beat()


def _next(run: RunDir) -> str:
    """A search to answer, "end", or "" for nothing yet. A run that has ended needs no more answers."""
    if run.summary_file.exists():
        return "end"
    search = oldest_open_search(run)
    return search.name if search else ""


def main() -> None:
    """``python -m opmix_dist.pool.worker RANK SIZE SUPERVISOR``, the last its process number, the
    configuration on standard input: started by the supervisor."""
    from opmix_dist.faults import points
    from opmix_dist.logs import set_up_logging
    from opmix_dist.pool.errors import BrokenTeamError
    from opmix_dist.process import die_with_parent, end_process, leave_stopping_to_parent

    rank, size, supervisor = map(int, sys.argv[1:])
    die_with_parent(supervisor)
    leave_stopping_to_parent()
    set_up_logging(f"pool {rank}")
    points.install("pool", rank)
    config = check_config(yaml.safe_load(sys.stdin.read()))
    try:
        work(RunDir(config.run_dir), config, rank, size, Heart.of_environment())
    except BrokenTeamError as error:  # without finalisation, which might wait for the others of the team
        log.error("pool worker %d ends: %s", rank, error)
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    main()
