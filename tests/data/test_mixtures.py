"""Mixtures of what a model has read and of what is new, by hand."""

from __future__ import annotations

import pytest

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import check_group_names, chosen_mixture, new_domains
from opmix_dist.errors import UserError
from tests.data.shard_files import write_catalogue

HISTORY = {"web": 300, "code": 100, "gone": 5000}


@pytest.fixture(scope="module")
def catalogue(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_catalogue(tmp_path_factory.mktemp("data"), {"web": 40, "books": 30, "code": 25, "maths": 10})


def test_old_is_what_was_read_and_new_goes_by_samples(catalogue: Catalogue) -> None:
    assert new_domains(catalogue.names, HISTORY) == ["books", "maths"]
    old = chosen_mixture("old", catalogue, history=HISTORY)
    assert old == {"web": 0.75, "books": 0.0, "code": 0.25, "maths": 0.0}
    naive = chosen_mixture({"new": 1.0}, catalogue, history=HISTORY)
    assert naive == {"web": 0.0, "books": 0.75, "code": 0.0, "maths": 0.25}
    assert chosen_mixture("new", catalogue, history=HISTORY) == naive


def test_groups_and_domains_add_up(catalogue: Catalogue) -> None:
    found = chosen_mixture({"old": 0.2, "new": 0.4, "maths": 0.3, "web": 0.1}, catalogue, history=HISTORY)
    assert found == pytest.approx({"web": 0.25, "books": 0.3, "code": 0.05, "maths": 0.4})
    assert list(found) == list(catalogue.names)


def test_new_counts_what_a_replay_store_keeps(catalogue: Catalogue) -> None:
    part = catalogue.keeping({"books": 10}, seed=0)
    assert chosen_mixture("new", part, history=HISTORY)["books"] == 0.5


@pytest.mark.parametrize(
    ("chosen", "history", "message"),
    [
        ({"old": 1.0}, {}, "mixture.initial names `old`, which needs start.run"),
        ("new", {}, "mixture.initial names `new`, which needs start.run"),
        ({"old": 1.0}, {"gone": 5}, "names `old`, and data.domains has no old domain"),
        ({"new": 1.0}, dict.fromkeys(("web", "books", "code", "maths"), 1), "has no new domain"),
        ({"old": 0.5, "new": 0.4}, HISTORY, "mixture.initial sums to 0.9"),
        ({"old": 1.5, "new": -0.5}, HISTORY, "mixture.initial.old is 1.5"),
        ({"olds": 1.0}, HISTORY, "names `olds`, which is no domain"),
    ],
)
def test_groups_that_cannot_be(catalogue: Catalogue, chosen: dict, history: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen_mixture(chosen, catalogue, history=history)
    assert message in str(error.value)


def test_a_domain_may_not_bear_a_group_s_name() -> None:
    with pytest.raises(UserError, match="cannot be named `new` in a run with start.run"):
        check_group_names(["web", "new"])
