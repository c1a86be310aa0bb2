from __future__ import annotations

import math

import pytest

from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import EvalLine, PhaseCost
from opmix_dist.report import tables, words


def final(losses: dict[str, float], stderr: float = 0.03) -> EvalLine:
    return EvalLine(step=1, tokens=10, loss=losses, stderr=dict.fromkeys(losses, stderr))


def test_loss_rows_by_hand():
    rows = tables.loss_rows([final({"a": math.log(2), "b": math.log(8)}), final({"b": 1.0, "a": 0.0}, 0.04)])
    assert [row.label for row in rows] == ["a", "b", "average"]
    assert rows[0].losses == pytest.approx((math.log(2), 0.0))
    assert rows[1].differences == pytest.approx((0.0, 1 - math.log(8)))
    # mean of exp(loss): (2 + 8) / 2 = 5, while exp of the mean loss would be 4
    assert rows[2].perplexities == pytest.approx((5.0, (1 + math.e) / 2))
    assert rows[2].losses == pytest.approx((math.log(4), 0.5))
    # sqrt(0.03^2 + 0.03^2) / 2
    assert rows[2].stderrs == pytest.approx((0.03 / math.sqrt(2), 0.04 / math.sqrt(2)))
    assert rows[2].best == 0.5


def test_other_domains_are_refused_by_name():
    with pytest.raises(UserError, match="a, b against a, c"):
        tables.loss_rows([final({"a": 1, "b": 1}), final({"a": 1, "c": 1})])


def test_a_diverged_loss_has_infinite_perplexity():
    assert tables.perplexity(1e4) == math.inf


def test_costs_add_up_in_the_order_of_the_ledger():
    train = PhaseCost(seconds=1, device_seconds=2, flops=3, tokens=4)
    probes = PhaseCost(seconds=10, device_seconds=20, flops=30, tokens=40)
    rows = tables.cost_rows({"train": train, "search 0001: probes": probes})
    assert [phase for phase, _ in rows] == ["train", "search 0001: probes", "total"]
    assert rows[-1][1] == PhaseCost(seconds=11, device_seconds=22, flops=33, tokens=44)


def test_mfu_is_known_of_what_every_part_of_it_is_known_of():
    known = PhaseCost(flops=3, possible_flops=4)
    assert tables.total_cost([known, PhaseCost(flops=1, possible_flops=4)]).mfu == 0.5
    assert tables.total_cost([known, PhaseCost(flops=1)]).mfu is None
    assert PhaseCost(flops=0, possible_flops=4).mfu is None, "waiting has none"


def test_mixture_rows_give_absent_domains_no_weight():
    assert tables.mixture_rows([{"a": 1.0}, {"b": 0.4, "a": 0.6}]) == [("a", (1.0, 0.6)), ("b", (0.0, 0.4))]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1_234_567, "1.23 M"), (999_999, "1 M"), (3.3e18, "3.3 E"), (math.inf, "inf")],
)
def test_si(value: float, text: str):
    assert words.si(value) == text


def test_comparisons_in_words():
    assert words.comparison(96.9, 100) == "3.1% below"
    assert words.comparison(102, 100) == "2.0% above"
    assert words.signed(-0.12344) == "−0.1234"
    assert words.loss(None) == "–"
