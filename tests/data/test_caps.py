import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data.sampler import Position
from opmix_dist.errors import UserError
from tests.data.samplers import (
    MIXES,
    SIZES,
    Event,
    draw,
    ids_of,
    sampler,
    schedules,
    through_json,
)


def test_max_epochs_stops_before_the_batch_that_passes_it() -> None:
    drawer = sampler({"a": [10], "b": [100]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 1.5})
    draw(drawer, 7)
    np.testing.assert_allclose(drawer.epochs(), [1.4, 0.14])
    position = drawer.position
    with pytest.raises(UserError, match="domain a is used up: max_epochs allows 15 samples of its 10"):
        drawer.draw()
    assert drawer.position is position
    drawer.set_weights({"b": 1.0})
    drawer.draw()


def test_one_warning_when_a_domain_repeats(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [8], "b": [100]}, {"a": 0.5, "b": 0.5})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 4)
        assert caplog.messages == []
        draw(drawer, 6)
    assert caplog.messages == ["domain a begins to repeat: all its samples were drawn once"]


def test_a_batch_that_passes_both_marks_tells_the_cap_alone(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [10], "b": [100]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 1})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 4)
        assert caplog.messages == []
        draw(drawer, 1)
        assert caplog.messages == [
            "domain a is used up, at 10 of the 10 samples that its max_epochs allows: the next batch with it "
            "stops the run"
        ]


def test_warned_once_at_nine_tenths_and_once_at_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [40], "b": [400]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 0.5})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 8)
        assert caplog.messages == []
        position = drawer.position
        draw(drawer, 1)  # 18 of 20
        drawer.position = position
        draw(drawer, 1)
        assert caplog.messages == [
            "domain a has drawn 18 of the 20 samples that its max_epochs allows: the run stops when they are "
            "used up"
        ]
        again = sampler({"a": [40], "b": [400]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 0.5})
        again.load_state_dict(through_json(drawer.state_dict()))  # a resume: told before
        draw(drawer, 1)
        assert len(caplog.messages) == 2
        assert "domain a is used up" in caplog.messages[1]
        draw(again, 1)
    assert caplog.messages[2:] == caplog.messages[1:2]


def test_an_exhausted_domain_leaves_the_mixture(caplog: pytest.LogCaptureFixture) -> None:
    """By hand: 2 of a, 1 of b, 1 of c a batch; of a's 5 samples one is left, fewer than a batch takes."""
    sizes, weights = {"a": [10], "b": [100], "c": [100]}, {"a": 0.5, "b": 0.25, "c": 0.25}
    drawer = sampler(sizes, weights, max_epochs={"a": 0.5}, on_exhausted="renormalize")
    with caplog.at_level(logging.WARNING):
        draw(drawer, 2)
        assert drawer.position.drawn.tolist() == [4, 2, 2]
        assert caplog.messages == []
        draw(drawer, 2)
    assert drawer.position.drawn.tolist() == [4, 6, 6]
    assert drawer.effective_weights.tolist() == [0, 0.5, 0.5]
    assert drawer.weights.tolist() == [0.5, 0.25, 0.25]
    assert caplog.messages == [
        "domain a is used up, at 4 of the 5 samples that its max_epochs allows: it leaves the mixture and "
        "the other weights grow"
    ]
    drawer.set_weights({"a": 0.25, "b": 0.5, "c": 0.25})  # one a batch, which it still has
    draw(drawer, 1)
    assert drawer.position.drawn.tolist() == [5, 8, 7]
    assert drawer.effective_weights.tolist() == [0.25, 0.5, 0.25]


def test_an_exhausted_domain_leaves_at_once_even_if_it_is_not_due() -> None:
    sizes, weights = {"a": [1], "b": [100]}, {"a": 0.1, "b": 0.9}
    drawer = sampler(sizes, weights, max_epochs={"a": 1}, on_exhausted="renormalize")
    draw(drawer, 1)  # owed .4 and 3.6: .6 of b is complete in .4/.9, .4 of a in .6/.1
    assert drawer.position.drawn.tolist() == [0, 4]
    draw(drawer, 1)  # owed .8 and 3.2: in .2/.1, in .8/.9
    draw(drawer, 1)  # owed 1.2 and 2.8
    assert drawer.position.drawn.tolist() == [1, 11]
    assert drawer.effective_weights.tolist() == [0.1, 0.9]
    draw(drawer, 1)  # would owe .6
    assert drawer.effective_weights.tolist() == [0, 1]
    assert drawer.position.lag.tolist() == [0, 0]


def test_what_an_exhausted_domain_was_owed_goes_to_the_others() -> None:
    drawer = sampler(
        {"a": [1], "b": [50], "c": [50]},
        {"a": 0.4, "b": 0.3, "c": 0.3},
        batch=2,
        max_epochs={"a": 1},
        on_exhausted="renormalize",
    )
    draw(drawer, 1)
    # owed .8, .6, .6: the first two to be complete are a, and of the equal ones b
    np.testing.assert_allclose(drawer.position.lag, [-0.2, -0.4, 0.6], atol=1e-12)
    draw(drawer, 1)
    # a's -.2 is taken off c's .6; then owed .6 and 1.4: one of c is due, and b's .6 is complete before c's .4
    assert drawer.position.drawn.tolist() == [1, 2, 1]
    np.testing.assert_allclose(drawer.position.settled, [0.2, 0, -0.2], atol=1e-12)


def test_the_last_domain_to_be_used_up_stops_the_run() -> None:
    drawer = sampler(
        {"a": [6], "b": [6], "c": [60]},
        {"a": 0.5, "b": 0.5},
        max_epochs={"a": 1, "b": 1},
        on_exhausted="renormalize",
    )
    draw(drawer, 3)
    position = drawer.position
    with pytest.raises(
        UserError, match="domain a, the last with a weight, is used up: max_epochs allows 6 samples"
    ):
        drawer.draw()
    assert drawer.position is position
    drawer.set_weights({"a": 0.5, "c": 0.5})
    assert ids_of(draw(drawer, 1), 2)


def test_a_domain_that_left_near_its_cap_does_not_stop_the_run() -> None:
    """It weighs 0, and half a sample that it is owed cannot be drawn: the others get it."""
    drawer = sampler({"a": [1], "b": [50]}, {"a": 0.5, "b": 0.5}, batch=1, max_epochs={"a": 1})
    drawer.position = Position(3, np.array([1, 2]), np.array([1.0, -1.0]), np.zeros(2))
    drawer.set_weights({"b": 1.0})
    draw(drawer, 1)
    assert drawer.position.drawn.tolist() == [1, 3]
    assert drawer.position.lag.tolist() == [0, 0]


@given(
    schedules(), st.integers(1, 9), st.lists(st.floats(0.3, 3), min_size=4, max_size=4), st.integers(0, 25)
)
@settings(deadline=None, max_examples=60)
def test_caps_hold_and_resumes_are_exact_when_domains_run_out(
    schedule: tuple[dict[str, list[int]], list[Event]], batch: int, epochs: list[float], crash: int
) -> None:
    sizes, events = schedule
    caps = dict(zip(sizes, epochs, strict=False))
    options = {"batch": batch, "max_epochs": caps, "on_exhausted": "renormalize"}
    whole, parts = sampler(sizes, {"d0": 1.0}, **options), sampler(sizes, {"d0": 1.0}, **options)
    allowed = np.array([math.floor(caps[name] * sum(sizes[name]) + 1e-9) for name in sizes])
    for number, event in enumerate(events):
        weights = {name: (event.weights or {}).get(name, 0) for name in sizes}  # without those that join
        total = sum(weights.values())
        if total > 0:
            for one in (whole, parts):
                one.set_weights({name: weight / total for name, weight in weights.items()})
        if number == crash:
            state, parts = through_json(parts.state_dict()), sampler(sizes, {"d0": 1.0}, **options)
            parts.load_state_dict(state)
            parts.set_weights(dict(zip(sizes, whole.weights.tolist(), strict=True)))
        before = whole.position
        try:
            drawn = draw(whole, 1)
        except UserError:
            with pytest.raises(UserError, match="the last with a weight"):
                parts.draw()
            assert (allowed - before.drawn)[whole.weights > 0].max() < batch
            assert whole.position is before
            return
        assert draw(parts, 1) == drawn
        after, effective = whole.position, whole.effective_weights
        assert np.array_equal(effective, parts.effective_weights)
        assert (after.drawn <= allowed).all()
        assert after.drawn.sum() == batch * after.batches
        assert abs(math.fsum(effective) - 1) < 1e-9
        taken, moved = after.drawn - before.drawn, after.settled - before.settled
        lag = before.lag + batch * effective + moved - taken
        assert np.abs(lag).max() <= 1 + 1e-6
        out = (whole.weights > 0) & (effective == 0)
        assert (taken[out] == 0).all()
        assert (after.lag[out] == 0).all()
        kept = whole.weights * ~out
        np.testing.assert_allclose(effective, kept / kept.sum(), rtol=1e-12)


def test_max_epochs_of_an_unknown_domain_or_no_number() -> None:
    with pytest.raises(UserError, match="max_epochs: 'x' is none"):
        sampler(SIZES, MIXES[0], max_epochs={"x": 1})
    with pytest.raises(UserError, match="max_epochs: a is nan"):
        sampler(SIZES, MIXES[0], max_epochs={"a": math.nan})
