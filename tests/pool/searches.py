"""Whole searches of a tiny model in this process: small enough for a test each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.pool.requests import search_request
from opmix_dist.pool.run_search import Searcher
from tests.conftest import DOMAINS
from tests.helpers import tiny_llama
from tests.train.jobs import tiny_config

CURRENT = {"json": 0.5, "prose": 0.3, "python": 0.2}


def quick_config(data: Path, run: Path, **search: Any) -> RunConfig:
    """Probes of 3 steps, 7 candidates; ``search`` replaces or adds settings, one level deep."""
    config = tiny_config(data, run, pool={"ranks": 0})
    config["search"] |= {
        "probes": {"steps": 3, "batch_size": 1, "rank": 2, "lr_multiplier": 1.0},
        "candidates": {"count": 7, "samples_per_domain": 2, "joint": 2, "method": "lowrank"},
        "refinement": {"rounds": 0},
        "proposal": {"bootstrap": 5},
    }
    for name, section in search.items():
        kept = config["search"].get(name, {})
        config["search"][name] = {**kept, **section} if isinstance(section, dict) else section
    return check_config(config)


def request(config: RunConfig, current: dict[str, float] = CURRENT, step: int = 4) -> SearchDir:
    """The request of a search from the snapshot of ``step``, which is of an untrained model where there is
    none."""
    run = RunDir(config.run_dir)
    if not files.is_complete(run.snapshot(step)):
        tiny_llama(vocab_size=512).save_pretrained(run.snapshot(step))
        files.mark_complete(run.snapshot(step), {"step": step})
    search = run.search("0001")
    record = search_request(
        config,
        Catalogue.open(config.data.root, DOMAINS),
        search.name,
        step=step,
        snapshot=f"snapshots/step_{step}",
        current=current,
        tokens_read=dict.fromkeys(DOMAINS, 0),
        tokens_to_train=10_000,
    )
    write_record(search.request_file, record)
    return search


@contextmanager
def alone() -> Iterator[World]:
    """A world of this process."""
    world = World.join(Placement(Role.POOL, 0, 1), device="cpu")
    try:
        yield world
    finally:
        world.leave()


def answer(config: RunConfig, search: SearchDir) -> SearchDir:
    with alone() as world:
        Searcher(RunDir(config.run_dir), config, world).answer(search)
    return search
