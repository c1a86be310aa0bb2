from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from opmix_dist.exchange.units import Units
from opmix_dist.report.frontier_page import frontier_chart, frontier_page
from opmix_dist.report.what_if import (
    ASKED,
    CURRENT,
    PROPOSAL,
    Answer,
    Searched,
    Trade,
    answer_tables,
    answer_values,
    trade_table,
    trade_values,
)
from opmix_dist.search.frontier import pareto_front
from opmix_dist.search.laws import LogLinearLaw, Observations, fit_law
from opmix_dist.search.problem import Problem

# L_a = 1 + exp(-u_a), L_b = 1 + exp(-u_b); components are domains.
LAW = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))
DOMAINS = ("a", "b", "c")
CURRENT_U, PROPOSAL_U = np.array([0.2, 0.2, 0.6]), np.array([0.4, 0.4, 0.2])
ASKED_U = np.array([0.9, 0.05, 0.05])


def shifted(law: LogLinearLaw, shift: float) -> LogLinearLaw:
    """Both losses higher by ``shift``."""
    return LogLinearLaw(np.log(np.exp(law.log_c) + shift), law.t)


@pytest.fixture(scope="module")
def searched() -> Searched:
    """Without noise, so that the fitted law is LAW; its resampled laws are shifted by -0.1, 0 and 0.1."""
    U = np.random.default_rng(5).dirichlet(np.full(3, 3.0), 20)
    observations = Observations(U, LAW.predict(U), names=("loss a", "loss b"), components=DOMAINS)
    problem = Problem(
        np.eye(3),
        np.full(3, 1 / 3),
        caps=np.array([0.8, 1.0, 1.0]),
        domains=DOMAINS,
        losses=("loss a", "loss b"),
    )
    fit = fit_law(observations, seed=0)
    resampled = [shifted(LAW, shift) for shift in (-0.1, 0.0, 0.1)]
    return Searched("search 0001", fit, problem, resampled, CURRENT_U, PROPOSAL_U, 0.8)


def printed(*tables: object) -> list[list[str]]:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return [line.replace("│", " ").split() for line in console.export_text().splitlines()]


def test_levels_are_the_laws_by_hand(searched: Searched):
    lines = printed(*answer_tables(Answer(searched, None)))
    assert ["domain", "current", "proposal"] in [[w for w in line if w != "┃"] for line in lines]
    assert ["c", "60.0%", "20.0%"] in lines
    # 1 + exp(-0.2) = 1.8187 and 1 + exp(-0.4) = 1.6703; 80% of three laws that are 0.1 apart: +-0.08
    levels = ["1.8187", "[1.7387,", "1.8987]", "1.6703", "[1.5903,", "1.7503]"]
    assert ["loss", "a", *levels] in lines
    assert ["objective", "(mean)", *levels] in lines
    # a shift moves both: their difference is certain
    assert ["loss", "a", "−0.1484", "[−0.1484,", "−0.1484]"] in lines


def test_the_asked_mixture_is_compared_with_both(searched: Searched):
    answer = Answer(searched, ASKED_U)
    assert answer.comparisons == [(PROPOSAL, CURRENT), (ASKED, CURRENT), (ASKED, PROPOSAL)]
    value, low, high = answer.changes(ASKED, PROPOSAL)
    expected = np.array([np.exp(-0.9) - np.exp(-0.4), np.exp(-0.05) - np.exp(-0.4)])
    assert value == pytest.approx([*expected, expected.mean()], abs=1e-5)
    assert low == pytest.approx(value, abs=1e-5)
    assert high == pytest.approx(value, abs=1e-5)


def test_extrapolation_and_bounds_are_said(searched: Searched):
    first, second = Answer(searched, ASKED_U).warnings()[:2]
    assert first.startswith("what if: ")
    assert "extrapolates" in first
    assert second == ("what if: cap of a (0.8) is exceeded by 0.1, so that the search would not propose it")
    assert Answer(searched, np.array([0.3, 0.3, 0.4])).warnings() == []


def test_without_a_current_mixture_there_are_fewer_columns(searched: Searched):
    alone = Searched(**{**vars_of(searched), "current": None})
    assert Answer(alone, None).names == [PROPOSAL]
    assert len(answer_tables(Answer(alone, None))) == 2  # nothing to compare with
    assert Answer(alone, ASKED_U).comparisons == [(ASKED, PROPOSAL)]


def vars_of(searched: Searched) -> dict:
    return {name: getattr(searched, name) for name in Searched.__dataclass_fields__}


def test_losses_and_error_rates_are_told_apart(searched: Searched, trade: Trade):
    mixed = replace(searched, units=Units(frozenset({"loss b"}), mixed=True))
    text = "\n".join(" ".join(line) for line in printed(*answer_tables(Answer(mixed, None))))
    assert "Predicted loss or error rate (in its own unit, 80% intervals)" in text
    assert "loss a (nats per token)" in text
    assert "loss b (error rate)" in text
    assert "objective (mean) (" not in text
    header = printed(trade_table(mixed, trade))[2]
    assert " ".join(header).count("(error rate)") == 1
    assert answer_values(Answer(mixed, None))["error_rates"] == ["loss b"]
    rates = replace(searched, units=Units(frozenset({"loss a", "loss b"})))
    text = "\n".join(" ".join(line) for line in printed(*answer_tables(Answer(rates, None))))
    assert "nats" not in text
    assert "Difference (error rate, paired 80% intervals)" in text


def test_values_for_scripts(searched: Searched):
    values = json.loads(json.dumps(answer_values(Answer(searched, ASKED_U)), allow_nan=False))
    asked = values["mixtures"]["what_if"]
    assert asked["weights"] == pytest.approx({"a": 0.9, "b": 0.05, "c": 0.05})
    assert asked["predicted"]["loss a"] == pytest.approx(
        {"value": 1 + np.exp(-0.9), "low": 1 + np.exp(-0.9) - 0.08, "high": 1 + np.exp(-0.9) + 0.08}, abs=1e-5
    )
    assert asked["extrapolated"]
    assert not values["mixtures"][PROPOSAL]["extrapolated"]
    pairs = {(row["of"], row["minus"]): row for row in values["differences"]}
    assert list(pairs) == [("proposal", "current"), ("what_if", "current"), ("what_if", "proposal")]
    change = (np.exp(-0.9) - np.exp(-0.2) + np.exp(-0.05) - np.exp(-0.2)) / 2
    assert pairs["what_if", "current"]["objective"] == pytest.approx(
        {"value": change, "low": change, "high": change}, abs=1e-5
    )


@pytest.fixture(scope="module")
def trade(searched: Searched) -> Trade:
    weights = np.eye(2)
    return Trade(("loss a", "loss b"), weights, pareto_front(LAW, searched.problem, *weights, points=9))


def test_the_fronts_table_and_values(searched: Searched, trade: Trade):
    points = trade_values(searched, trade)["points"]
    assert len(points) == 9
    for point in points:
        a, b = (point["predicted"][label]["value"] for label in trade.labels)
        assert (a - 1) * (b - 1) == pytest.approx(np.exp(-1), rel=1e-4)
    rows = [
        line for line in printed(trade_table(searched, trade, points=3)) if line[:1] in (["1"], ["5"], ["9"])
    ]
    assert len(rows) == 3
    # the cap ends it at a = 0.8
    assert rows[0][-3:] == ["80.0%", "20.0%", "0.0%"]
    assert rows[2][-3:] == ["0.0%", "100.0%", "0.0%"]


def test_the_chart_shows_front_mixtures_and_candidates(searched: Searched, trade: Trade):
    figure = frontier_chart(Answer(searched, ASKED_U), trade)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces) == ["candidates, measured", "front", CURRENT, PROPOSAL, ASKED]
    assert traces["candidates, measured"].x == pytest.approx(searched.fit.measured[:, 0])
    assert traces["front"].y == pytest.approx(trade.front.losses[:, 1], abs=1e-5)
    assert traces["front"].error_x.array == pytest.approx(np.full(9, 0.08), abs=1e-5)
    assert traces["front"].error_y.arrayminus == pytest.approx(np.full(9, 0.08), abs=1e-5)
    assert traces[PROPOSAL].x == pytest.approx([1 + np.exp(-0.4)], abs=1e-5)
    assert "b 40.0%" in traces[PROPOSAL].customdata[0]


def test_points_that_candidates_do_not_vouch_for_are_marked(searched: Searched, trade: Trade):
    """Dirichlet(3) draws reach neither end of the front, where one domain has nearly everything."""
    points = trade_values(searched, trade)["points"]
    assert [point["extrapolated"] for point in points] == [not known for known in trade.covered(searched)]
    assert points[0]["extrapolated"]
    assert points[-1]["extrapolated"]
    front = frontier_chart(Answer(searched, None), trade).data[1]
    assert front.marker.symbol[0] == "circle-open"
    assert ["9", "*"] in [line[:2] for line in printed(trade_table(searched, trade))]


def test_long_bars_do_not_hide_the_front(searched: Searched, trade: Trade):
    wild = Searched(**{**vars_of(searched), "resampled": [shifted(LAW, 0.0), shifted(LAW, 100.0)]})
    figure = frontier_chart(Answer(wild, None), trade)
    assert max(figure.data[1].error_x.array) > 50
    low, high = figure.layout.xaxis.range
    assert high - low < 2


def test_the_page_holds_all_it_needs(searched: Searched, trade: Trade):
    page = frontier_page(Answer(searched, None), trade).decode()
    assert page.count("<h2>Pareto front</h2>") == 1
    assert "default-src 'none'" in page
    assert page.count("<tr>") == 1 + 9
