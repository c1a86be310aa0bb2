import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data.order import DomainOrders
from opmix_dist.data.sampler import SHUFFLE_BLOCK, Position
from tests.data.samplers import (
    Batch,
    Event,
    draw,
    ids_of,
    sampler,
    schedules,
)


@given(schedules(), st.integers(1, 12), st.booleans(), st.sampled_from([1, 6, SHUFFLE_BLOCK]))
@settings(deadline=None, max_examples=60)
def test_any_schedule_equals_the_uninterrupted_run(
    schedule: tuple[dict[str, list[int]], list[Event]], batch: int, ahead: bool, block: int
) -> None:
    first, events = schedule
    sizes = {name: shards for event in [Event(joins=first), *events] for name, shards in event.joins.items()}
    start = {"d0": 1.0}
    whole = Run(first, start, batch, block)
    for event in events:
        whole.step(event)
    parts = Run(first, start, batch, block)
    number, crashes = 0, [event.crash for event in events]
    while number < len(events):
        lost, crashes[number] = crashes[number], None
        if lost is not None:
            number = max(0, number - lost)
            parts = parts.resumed(number)
        if ahead:
            draw(parts.drawer.copy(), 2)
        parts.step(events[number])
        number += 1
    assert parts.batches == whole.batches
    for domain, name in enumerate(whole.drawer.names):
        found = ids_of(whole.batches, domain)
        order = DomainOrders({name: sizes[name]}, seed=7, shuffle_block=block)
        expected = order.sample_ids(np.zeros(len(found), dtype=np.int64), np.arange(len(found)))
        assert sorted(found) == sorted(expected.tolist())


class Run:
    """A sampler, what it drew, and what a new process would start it from before each batch."""

    def __init__(
        self, sizes: dict[str, list[int]], weights: dict[str, float], batch: int, block: int
    ) -> None:
        self.drawer = sampler(sizes, weights, batch, shuffle_block=block)
        self.sizes, self.batch, self.block = dict(sizes), batch, block
        self.batches: list[Batch] = []
        self.starts = [self.start()]

    def step(self, event: Event) -> None:
        if event.joins:
            self.drawer.add_domains(event.joins)
            self.sizes |= event.joins
        if event.weights:
            self.drawer.set_weights(event.weights)
        before = self.drawer.position
        self.batches += draw(self.drawer, 1)
        self.check_boundary(before)
        self.starts.append(self.start())

    def start(self) -> tuple[str, dict[str, list[int]], dict[str, float]]:
        weights = dict(zip(self.drawer.names, self.drawer.weights.tolist(), strict=True))
        return json.dumps(self.drawer.state_dict()), dict(self.sizes), weights

    def check_boundary(self, before: Position) -> None:
        """Within one sample of the target, plus what was settled; and no repeat or loss within an epoch."""
        after, domains = self.drawer.position, len(self.sizes)
        taken, moved = after.drawn - before.drawn, after.settled - before.settled
        assert taken.tolist() == np.bincount(self.batches[-1][0], minlength=domains).tolist()
        assert taken.sum() == self.batch
        lag = before.lag + self.batch * self.drawer.weights + moved - taken
        np.testing.assert_allclose(after.lag, lag, atol=1e-9)
        assert np.abs(lag).max() <= 1 + 1e-9
        assert abs(math.fsum(moved)) < 1e-9
        for domain, sizes in enumerate(self.sizes.values()):
            often = np.bincount(ids_of(self.batches, domain), minlength=sum(sizes))
            assert len(often) == sum(sizes)
            assert often.max() - often.min() <= 1

    def resumed(self, number: int) -> "Run":
        """What a new process goes on with from before batch ``number``."""
        state, sizes, weights = self.starts[number]
        other = Run(sizes, weights, self.batch, self.block)
        other.drawer.load_state_dict(json.loads(state))
        other.batches, other.starts = self.batches[:number], self.starts[: number + 1]
        return other
