import numpy as np
import pytest

from opmix_dist.search.bootstrap import Bootstrap
from opmix_dist.search.decision import decide, predicted_gain
from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.problem import Problem

PROBLEM = Problem(np.eye(2), np.array([0.5, 0.5]))
NONE = np.empty((0, 2))


def test_the_margin_is_one_sided_by_hand():
    # The 90% quantile of the normal distribution is 1.2816, the 97.5% quantile 1.9600.
    assert decide(0.0129, 0.01).move
    stays = decide(0.0128, 0.01)
    assert not stays.move
    assert (
        stays.reason
        == "gain 0.0128 ± 0.01: within its uncertainty, 0.01282 would be needed at 90% confidence"
    )
    assert decide(0.0197, 0.01, confidence=0.975).move
    assert not decide(0.0195, 0.01, confidence=0.975).move
    assert decide(0.0129, 0.01).reason == "gain 0.0129 ± 0.01: above 0 at 90% confidence"


def test_no_gain_is_no_reason_however_certain():
    assert not decide(0.0, 0.0).move
    worse = decide(-0.01, 0.001)
    assert not worse.move
    assert worse.reason == "gain -0.01 ± 0.001: the proposal is no better than staying"
    assert decide(1e-6, 0.0).move
    assert (worse.gain, worse.stderr) == (-0.01, 0.001)


def test_of_equal_mixtures_one_in_ten_is_left_for_nothing():
    errors = np.random.default_rng(0).normal(0, 0.01, 4000)
    moves = np.mean([decide(error, 0.01).move for error in errors])
    assert moves == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gain": np.nan}, "must be finite"),
        ({"stderr": -1.0}, "stderr not negative"),
        ({"stderr": np.inf}, "must be finite"),
        ({"confidence": 1.0}, "confidence must be at least 0.5 and below 1, got 1"),
        ({"confidence": 0.4}, "confidence must be at least 0.5"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        decide(**{"gain": 0.1, "stderr": 0.1} | arguments)


def test_gain_of_the_law_less_its_optimism():
    # Mean losses 1 + (e^{-u_0} + e^{u_0}) / 2 at u_0 = 1 and 0: from 1 + cosh 1 down to 2.
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0], [1.0, 0.0]]))
    keep, u = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    spread = Bootstrap((), NONE, NONE, gains=np.array([0.4, 0.5, 0.6]), optimism=0.04)
    gain = predicted_gain(law, PROBLEM, spread, keep=keep, u=u)
    assert gain.value == pytest.approx(np.cosh(1) - 1 - 0.04)
    assert gain.stderr == pytest.approx(0.1)
    with pytest.raises(ValueError, match="the bootstrap has no gains"):
        predicted_gain(law, PROBLEM, Bootstrap((), NONE, NONE, gains=np.empty(0)), keep=keep, u=u)
