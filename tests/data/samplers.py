"""Samplers, mixtures and schedules that the tests of the sampler share."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from opmix_dist.data.order import DomainOrders
from opmix_dist.data.sampler import SHUFFLE_BLOCK, MixtureSampler

Batch = tuple[list[int], list[int]]

SIZES = {"a": [5, 3], "b": [7], "c": [2, 2, 9]}
MIXES = [{"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.0, "b": 0.05, "c": 0.95}, {"a": 0.9, "b": 0.1, "c": 0.0}]


def sampler(
    sizes: Mapping[str, Sequence[int]], weights: Mapping[str, float], batch: int = 4, seed: int = 7, **options
) -> MixtureSampler:
    return MixtureSampler(sizes, weights, global_batch_size=batch, seed=seed, **options)


def draw(drawer: MixtureSampler, batches: int) -> list[Batch]:
    return [(domains.tolist(), ids.tolist()) for domains, ids in (drawer.draw() for _ in range(batches))]


def ids_of(batches: list[Batch], domain: int) -> list[int]:
    return [i for domains, ids in batches for d, i in zip(domains, ids, strict=True) if d == domain]


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


def mixtures(domains: int) -> st.SearchStrategy[np.ndarray]:
    """Simplex points whose weights span twelve orders of magnitude, zeros among them."""
    exponents = st.one_of(st.floats(-12, 0), st.just(-math.inf))
    raw = st.lists(exponents, min_size=domains, max_size=domains)
    return raw.map(lambda e: np.power(10.0, e)).filter(lambda w: w.sum() > 0).map(lambda w: w / w.sum())


@dataclass
class Event:
    """What happens before a batch."""

    weights: dict[str, float] | None = None
    joins: dict[str, list[int]] = field(default_factory=dict)
    crash: int | None = None  # batches that are lost: resume from the state that many batches ago


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[Event]]:
    """Domains at the start, and up to 25 events; a weight of 0 is a leave, a later one a return."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    first = {f"d{i}": draw(sizes) for i in range(draw(st.integers(1, 4)))}
    names, events = [*first], [Event()]
    for _ in range(draw(st.integers(1, 25))):
        event = Event()
        if draw(st.integers(0, 5)) == 0:
            event.joins = {f"d{len(names) + i}": draw(sizes) for i in range(draw(st.integers(1, 2)))}
            names += event.joins
        if draw(st.booleans()):
            event.weights = dict(zip(names, draw(mixtures(len(names))).tolist(), strict=True))
        if draw(st.integers(0, 3)) == 0:
            event.crash = draw(st.integers(0, 6))
        events.append(event)
    return first, events


def assert_prefix_of_order(
    found: list[int], name: str, sizes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """``found`` are the first of the domain's order, and within an epoch none is missing or there twice."""
    order = DomainOrders({name: (sizes or SIZES)[name]}, seed=7, shuffle_block=SHUFFLE_BLOCK)
    expected = order.sample_ids(np.zeros(len(found), dtype=np.int64), np.arange(len(found)))
    assert sorted(found) == sorted(expected.tolist())
    often = np.bincount(found, minlength=int(order.totals[0]))
    epochs = len(found) // int(order.totals[0])
    assert often.min() >= epochs
    assert often.max() <= epochs + (len(found) % int(order.totals[0]) > 0)
