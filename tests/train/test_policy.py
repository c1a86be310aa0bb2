"""Policies where no whole job is needed: initial mixtures, caps, and the pulse."""

from __future__ import annotations

from pathlib import Path

import pytest

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.exchange.schemas import SearchStage, SearchStatus
from opmix_dist.train import policy
from opmix_dist.train.policy import Pulse, chosen_mixture
from tests.conftest import DOMAINS


@pytest.fixture
def catalogue(tiny_data: Path) -> Catalogue:
    return Catalogue.open(tiny_data, DOMAINS)


def test_named_mixtures(catalogue: Catalogue) -> None:
    assert chosen_mixture("uniform", catalogue) == dict.fromkeys(DOMAINS, pytest.approx(1 / 3))
    samples = [catalogue.domains[name].splits["train"].samples for name in DOMAINS]
    natural = chosen_mixture("natural", catalogue)
    assert list(natural.values()) == pytest.approx([n / sum(samples) for n in samples])
    assert chosen_mixture({"prose": 1.0}, catalogue) == {"json": 0.0, "prose": 1.0, "python": 0.0}


def test_a_pulse_counts_from_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(policy.time, "monotonic", lambda: now[0])
    pulse = Pulse(timeout_s=10.0)
    beats = [SearchStatus(stage=SearchStage.PROBING, beat=beat) for beat in range(2)]
    for seconds, status, silent in [
        (9.0, None, 0.0),  # nothing yet, in time
        (11.0, None, 11.0),  # nothing yet, too late
        (12.0, beats[0], 0.0),  # a first sign
        (22.0, beats[0], 0.0),
        (22.5, beats[0], 10.5),
        (23.0, beats[1], 0.0),  # work went on
    ]:
        now[0] = 100.0 + seconds
        assert pulse.silence(status) == silent
    now[0] += 50.0
    pulse.restart()
    assert pulse.silence(beats[1]) == 0.0
