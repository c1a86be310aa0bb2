from __future__ import annotations

import pytest

from opmix_dist.exchange.units import LOSSES, Units

RATES = Units(frozenset({"a", "b"}))
BOTH = Units(frozenset({"a"}), mixed=True)


def test_headings_and_labels() -> None:
    assert [one.described for one in (LOSSES, RATES, BOTH)] == [
        "loss (nats per token)",
        "error rate",
        "loss (nats per token) or error rate",
    ]
    assert [one.unit for one in (LOSSES, RATES, BOTH)] == ["nats per token", "error rate", "in its own unit"]
    assert [BOTH.label(name) for name in ("a", "b")] == ["a (error rate)", "b (nats per token)"]
    assert BOTH.label_of("a+b", ["a", "b"]) == "a+b (error rate and nats per token)"
    assert LOSSES.label("a") == RATES.label("a") == "a"


@pytest.mark.parametrize(
    ("units", "mean", "relative"),
    [
        (LOSSES, "mean loss, nats per token", "losses"),
        (RATES, "mean error rate", "error rates"),
        (BOTH, "mean of losses, nats per token, and error rates", "losses and error rates"),
    ],
)
def test_objectives(units: Units, mean: str, relative: str) -> None:
    assert units.objective("mean") == mean
    assert units.objective("relative") == f"mean of {relative} over the snapshot's"
    assert units.objective("worst_change") == mean.replace("mean", "worst change")
