from __future__ import annotations

from opmix_dist.exchange.schemas import PhaseCost
from opmix_dist.report.compute import add_up, amounts, less_compute, mean_amounts


def cost(flops: float, device_seconds: float = 0.0, tokens: int = 0) -> PhaseCost:
    return PhaseCost(flops=flops, device_seconds=device_seconds, tokens=tokens)


def test_phases_add_up_over_stages():
    total = add_up(
        [
            {"train": cost(6e12, 20, 100), "search: probes": cost(5e11, 3, 10)},
            {"train": cost(3e12, 10, 50), "teacher": cost(1e11)},
            {"search: probes": cost(1e11, 1, 5)},
        ]
    )
    assert list(total) == ["train", "search: probes", "teacher"]
    assert total["train"] == cost(9e12, 30, 150)
    assert total["search: probes"] == cost(6e11, 4, 15)


def test_less_compute_by_hand_with_its_parts():
    mine = {"checkpoints": cost(0, 1), "search: probes": cost(6e11, 4), "train": cost(6e12, 20)}
    its = {"train": cost(1e13, 20)}
    # 6.6 / 10, and 25 / 20
    assert less_compute("opmix", amounts(mine, "flops"), "retrain", amounts(its, "flops"), "flops") == (
        "opmix: 34.0% less compute than retrain, in FLOPs: 6.6 T (train 6 T + search: probes 600 G) against "
        "10 T (train 10 T)"
    )
    unit = "device_seconds"
    assert less_compute("opmix", amounts(mine, unit), "retrain", amounts(its, unit), unit) == (
        "opmix: 25.0% more compute than retrain, in device-seconds: 25 (train 20 + search: probes 4 + "
        "checkpoints 1) against 20 (train 20)"
    )
    assert amounts(mine, "flops") == {"search: probes": 6e11, "train": 6e12}, "checkpoints need none"


def test_the_mean_counts_who_lacks_a_phase():
    ledgers = [{"train": cost(10.0), "search: probes": cost(4.0)}, {"train": cost(12.0)}]
    assert mean_amounts(ledgers, "flops") == {"train": 11.0, "search: probes": 2.0}


def test_retraining_costs_all_that_it_trained():
    """From scratch at each stage: 10 + 20 + 30 of training, where going on trains 10 + 10 + 10."""
    retraining = amounts(add_up({"train": cost(flops)} for flops in (10.0, 20.0, 30.0)), "flops")
    going_on = amounts(add_up([{"train": cost(10.0)}] * 3), "flops")
    text = less_compute("going on", going_on, "retraining", retraining, "flops")
    assert text.startswith("going on: 50.0% less compute than retraining, in FLOPs: 30 (train 30)")


def test_a_baseline_without_costs_is_named():
    assert less_compute("a", {}, "b", {}, "flops") == "a: b has no FLOPs to compare with"
