"""Whatever happens to a run, its samples come as if nothing had happened.

Random schedules of weights, with domains that join and leave; crashes at any batch; resumes from any earlier
checkpoint, on other numbers of ranks and with the domains in another order.
"""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader
from tests.data.shard_files import write_catalogue

pytestmark = pytest.mark.usefixtures("streaming")

SIZES = {"web": 37, "code": 21, "maths": 9, "chat": 14, "law": 5}
NAMES = list(SIZES)
BATCH = 12
BATCHES = 12
WORLDS = [1, 2, 3, 4, 6, 12]

Global = list[tuple[str, int]]
"""A global batch: domain and sample of each row."""


@dataclass
class Attempt:
    """One launch of the job."""

    world: int
    order: list[str]  # of the domains, when it starts
    workers: int
    batches: int  # until it is killed
    checkpoint_every: int


@st.composite
def schedules(draw: st.DrawFn) -> dict[int, dict[str, float]]:
    """Batch to the weights from it on; of two domains or more first, of any later."""
    schedule = {}
    for batch in sorted({0, *draw(st.sets(st.integers(1, BATCHES - 1), max_size=5))}):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
        shares = draw(st.lists(st.integers(1, 20), min_size=len(names), max_size=len(names)))
        schedule[batch] = {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}
    return schedule


attempts = st.lists(
    st.builds(
        Attempt,
        world=st.sampled_from(WORLDS),
        order=st.permutations(NAMES),
        workers=st.just(0),
        batches=st.integers(1, BATCHES),
        checkpoint_every=st.integers(1, 4),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_catalogue(folder, SIZES)
    return folder


def open_ranks(
    root: Path, attempt: Attempt, weights: dict[str, float], known: set[str]
) -> list[MixtureLoader]:
    """Every rank's loader, with the domains that had joined before only."""
    catalogue = Catalogue.open(root, [name for name in attempt.order if name in known])
    return [
        MixtureLoader(
            catalogue,
            weights,
            global_batch_size=BATCH,
            rank=rank,
            world_size=attempt.world,
            seed=3,
            num_workers=attempt.workers,
        )
        for rank in range(attempt.world)
    ]


def next_batch(ranks: list[MixtureLoader]) -> Global:
    rows: Global = []
    for loader in ranks:
        loaded = next(loader)
        for domain, tokens in zip(loaded.domain_ids.tolist(), loaded.batch.tokens.tolist(), strict=True):
            assert NAMES[tokens[0]] == loader.names[domain]
            rows.append((loader.names[domain], tokens[1]))
    return rows


def run(root: Path, schedule: dict[int, dict[str, float]], attempts: list[Attempt]) -> list[Global]:
    """The batches that count: those before the checkpoint that the next attempt resumes from, or the end."""
    saved: tuple[int, list[Any] | None] = (0, None)
    history: list[Global] = []
    for attempt in attempts:
        begin, states = saved
        history = history[:begin]
        current = max(batch for batch in schedule if batch <= max(0, begin - 1))
        known = {name for batch, weights in schedule.items() if batch <= current for name in weights}
        ranks = open_ranks(root, attempt, schedule[current], known)
        if states is not None:
            for loader in ranks:
                loader.load_state_dict(json.loads(states[0]))
        for batch in range(begin, min(BATCHES, begin + attempt.batches)):
            if batch in schedule and batch != current:
                for loader in ranks:
                    loader.set_weights(schedule[batch])
            history.append(next_batch(ranks))
            if (batch + 1) % attempt.checkpoint_every == 0:
                states = [json.dumps(loader.state_dict()) for loader in ranks]
                assert len(set(states)) == 1, "ranks disagree about the state"
                saved = (batch + 1, states)
        for loader in ranks:
            loader.close()
    return history


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules(), attempts=attempts)
def test_interruptions_change_nothing(
    root: Path, schedule: dict[int, dict[str, float]], attempts: list[Attempt]
) -> None:
    whole = Attempt(1, NAMES, 0, BATCHES, BATCHES + 1)
    expected = run(root, schedule, [whole])
    last = Attempt(attempts[0].world, attempts[0].order, 0, BATCHES, BATCHES + 1)
    assert run(root, schedule, [*attempts, last]) == expected
    require_each_sample_once_per_epoch(expected)
    require_counts_on_target(root, schedule)


def require_each_sample_once_per_epoch(batches: list[Global]) -> None:
    """Within a batch rows are shuffled: at its end, epochs may overlap by no more than the batch has."""
    drawn: dict[str, list[int]] = defaultdict(list)
    for name, sample in itertools.chain(*batches):
        drawn[name].append(sample)
    for name, samples in drawn.items():
        times = np.bincount(samples, minlength=SIZES[name])
        assert times.max() - times.min() <= 1, name
        assert len(times) == SIZES[name]


def require_counts_on_target(root: Path, schedule: dict[int, dict[str, float]]) -> None:
    """At every boundary each domain's count is within one sample of its cumulative target, with what was
    settled where weights jumped."""
    [loader] = open_ranks(root, Attempt(1, NAMES, 0, 0, 1), schedule[0], set(NAMES))
    target = np.zeros(len(NAMES))
    for batch in range(BATCHES):
        weights = schedule.get(batch)
        if weights:
            loader.set_weights(weights)
            share = np.array([weights.get(name, 0.0) for name in NAMES])
        next(loader)
        target += BATCH * share
        settled = loader._position.settled
        assert abs(settled.sum()) < 1e-6
        assert np.abs(target + settled - loader.counts()).max() <= 1 + 1e-6


def test_interruptions_change_nothing_with_workers(root: Path) -> None:
    schedule = {0: {"web": 0.5, "code": 0.5}, 4: {"code": 0.2, "maths": 0.8}, 7: {"law": 0.3, "web": 0.7}}
    attempts = [
        Attempt(2, NAMES, 2, 5, 3),
        Attempt(3, NAMES[::-1], 1, 4, 2),
        Attempt(1, NAMES, 2, BATCHES, 5),
    ]
    assert run(root, schedule, attempts) == run(root, schedule, [Attempt(1, NAMES, 0, BATCHES, 99)])
