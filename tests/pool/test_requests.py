"""What a search is asked in a run that goes on from another; by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.pool.requests import keeps_old, newcomers, search_request, staying
from opmix_dist.pool.solving import first_candidates
from tests.data.shard_files import write_catalogue
from tests.train.jobs import tiny_config

NAMES = ("a", "b", "m", "n")
HISTORY = {"a": 100, "b": 300, "gone": 900}
HALVES = {"a": 0.25, "b": 0.25, "m": 0.4, "n": 0.1}


@pytest.fixture(scope="module")
def catalogue(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_catalogue(tmp_path_factory.mktemp("data"), dict.fromkeys(NAMES, 20))


def config(**search: Any) -> RunConfig:
    given = tiny_config(Path("data"), Path("run"), start={"run": "before"}, model={"config": None})
    given["search"] |= search
    return check_config(given)


def asked(
    catalogue: Catalogue,
    current: dict[str, float],
    history: dict[str, int] = HISTORY,
    read: dict[str, int] | None = None,
    **search: Any,
) -> SearchRequest:
    return search_request(
        config(**search),
        catalogue,
        "0001",
        step=0,
        snapshot="snapshots/step_0",
        current=current,
        tokens_read=dict.fromkeys(NAMES, 0) | (read or {}),
        tokens_to_train=1000,
        history=history,
    )


def test_old_is_what_was_read_in_all_runs_so_far(catalogue: Catalogue) -> None:
    request = asked(catalogue, HALVES)
    assert request.new_domains == ["m", "n"]
    assert request.components == ["old", "m", "n"]
    expected = [[0.25, 0.75, 0, 0], [0.025, 0.075, 0.9, 0], [0.025, 0.075, 0, 0.9]]
    np.testing.assert_allclose(request.composition, expected, atol=1e-15)
    # 100 + 500 and 300 + 100 tokens after a prefix; what it read of new domains makes them no old ones
    later = asked(catalogue, HALVES, read={"a": 500, "b": 100, "m": 800})
    np.testing.assert_allclose(later.composition[0], [0.6, 0.4, 0, 0], atol=1e-15)
    assert later.new_domains == ["m", "n"]


def test_the_mixture_in_force_is_the_prior_and_what_stays(catalogue: Catalogue) -> None:
    request = asked(catalogue, HALVES)
    assert request.prior == request.current == HALVES
    assert newcomers(request) == []
    assert not keeps_old(request)
    u = staying(request)
    # of all mixtures in reach, the nearest: new shares as they are, old ones by what was read
    reached = u @ np.array(request.composition)
    assert reached[0] / reached[1] == pytest.approx(1 / 3, abs=1e-6)
    steps = [u + 0.01 * (np.eye(3)[i] - np.eye(3)[j]) for i in range(3) for j in range(3) if i != j]
    current = np.array(list(HALVES.values()))

    def miss(u: np.ndarray) -> float:
        return float(np.square(u @ np.array(request.composition) - current).sum())

    assert all(miss(u) < miss(step) for step in steps)
    candidates = first_candidates(request, config().search.candidates)
    assert candidates.shape == (12, 3)
    np.testing.assert_allclose(candidates[0], u)


@pytest.mark.parametrize(
    ("current", "missing"),
    [({"a": 0.5, "b": 0.3, "m": 0.2}, "n"), ({"b": 0.5, "m": 0.3, "n": 0.2}, "a")],
)
def test_a_prior_that_keeps_a_domain_out_is_refused(
    catalogue: Catalogue, current: dict[str, float], missing: str
) -> None:
    current = dict.fromkeys(NAMES, 0.0) | current
    with pytest.raises(UserError, match=f"prior current has no share of {missing}"):
        asked(catalogue, current)
    assert asked(catalogue, current, proposal={"prior": "uniform"}).prior == dict.fromkeys(NAMES, 0.25)
    assert asked(catalogue, current, proposal={"kl": 0.0}).current == current


def test_one_new_domain_stays_as_in_the_paper(catalogue: Catalogue) -> None:
    history = {"a": 100, "b": 300, "m": 600}
    without = {"a": 0.1, "b": 0.3, "m": 0.6, "n": 0.0}
    request = asked(catalogue, without, history)
    np.testing.assert_allclose(request.composition, [[0.09, 0.27, 0.54, 0.1], [0.01, 0.03, 0.06, 0.9]])
    assert list(request.prior.values()) == pytest.approx(request.composition[0])
    assert newcomers(request) == ["n"]
    assert staying(request).tolist() == [1.0, 0.0]
    assert len(first_candidates(request, config().search.candidates)) == 9
    # with a share of its own, that is the prior, and what stays: 50% lie half way between 10% and 90%
    half = {"a": 0.05, "b": 0.15, "m": 0.3, "n": 0.5}
    request = asked(catalogue, half, history)
    assert request.prior == half
    assert newcomers(request) == []
    np.testing.assert_allclose(staying(request), [0.5, 0.5], atol=1e-6)


def test_without_new_domains_the_probes_stand_for_all(catalogue: Catalogue) -> None:
    history = {"a": 100, "b": 300, "m": 200, "n": 400}
    uniform = dict.fromkeys(NAMES, 0.25)
    request = asked(catalogue, uniform, history)
    assert request.components == ["old", *NAMES]
    np.testing.assert_allclose(request.composition[0], [0.1, 0.3, 0.2, 0.4])
    np.testing.assert_allclose(staying(request) @ np.array(request.composition), 0.25, atol=1e-6)
    unchanged = asked(catalogue, {"a": 0.1, "b": 0.3, "m": 0.2, "n": 0.4}, history)
    assert keeps_old(unchanged)
    assert staying(unchanged).tolist() == [1, 0, 0, 0, 0]


def test_nothing_but_new_domains_has_no_old_mixture(catalogue: Catalogue) -> None:
    with pytest.raises(UserError, match="data.domains has new domains only"):
        asked(catalogue, HALVES, {"gone": 5})


def test_a_request_of_an_earlier_version_is_read() -> None:
    request = {
        "search": "0001", "step": 4, "snapshot": "s", "new_domain": "n", "components": ["old", "n"],
        "domains": ["a", "n"], "composition": [[0.9, 0.1], [0.1, 0.9]], "current": {"a": 1.0, "n": 0.0},
        "prior": {"a": 0.9, "n": 0.1}, "base_lr": 1e-3, "seed": 1,
    }  # fmt: skip
    assert SearchRequest.model_validate(request).new_domains == ["n"]
    assert SearchRequest.model_validate(request | {"new_domain": None}).new_domains == []
