"""Policies where no whole job is needed: initial mixtures, caps, and the pulse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opmix_dist.config import check_config
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import chosen_mixture
from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.build import build_engine
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import MixtureRecord, SearchStage, SearchStatus
from opmix_dist.ledger import Ledger
from opmix_dist.models.source import ModelSource
from opmix_dist.pool.requests import share_caps
from opmix_dist.stopping import StopSignals
from opmix_dist.train import policy
from opmix_dist.train.model_writer import ModelWriter
from opmix_dist.train.policy import OpMixPolicy, Pulse, Surroundings
from opmix_dist.train.state import TrainerState
from tests.conftest import DOMAINS
from tests.helpers import tiny_llama_config
from tests.train.jobs import BATCH, LENGTH, tiny_config


@pytest.fixture
def catalogue(tiny_data: Path) -> Catalogue:
    return Catalogue.open(tiny_data, DOMAINS)


def test_named_mixtures(catalogue: Catalogue) -> None:
    assert chosen_mixture("uniform", catalogue) == dict.fromkeys(DOMAINS, pytest.approx(1 / 3))
    samples = [catalogue.domains[name].splits["train"].samples for name in DOMAINS]
    natural = chosen_mixture("natural", catalogue)
    assert list(natural.values()) == pytest.approx([n / sum(samples) for n in samples])
    assert chosen_mixture({"prose": 1.0}, catalogue) == {"json": 0.0, "prose": 1.0, "python": 0.0}


LEFT = 96 * LENGTH
"""16 steps of 8 samples, of which 4 are done."""


def test_caps_on_shares_by_hand(catalogue: Catalogue) -> None:
    """96 samples are left."""
    samples, read = catalogue.samples("train").tolist(), (11, 10, 11)
    tokens = {name: count * LENGTH for name, count in zip(DOMAINS, read, strict=True)}

    def caps(repetitions: float | None = None, given: object = {}, **data: object) -> list[float] | None:
        config = tiny_config(catalogue.root, Path("run"))
        config["data"] |= data
        config["search"]["proposal"] = {"max_repetitions": repetitions, "caps": given}
        return share_caps(check_config(config), catalogue, tokens, LEFT)

    assert caps() is None
    assert caps(0.1) == pytest.approx([(0.1 * n - r) / 96 for n, r in zip(samples, read, strict=True)])
    assert caps(5.0) == [1, 1, 1], "they do not bind"
    limit = {"json": 40.5 / samples[0]}
    assert caps(max_epochs=limit) == pytest.approx([(40 - 2 - 11) / 96, 1, 1])
    assert caps(max_epochs=limit, on_exhausted="renormalize") is None
    assert caps(5 / max(samples), max_epochs=limit) == [0, 0, 0], "read more often than that already"
    assert caps(given={"prose": 0.3}) == [1, 0.3, 1]
    expected = (0.1 * samples[0] - 11) / 96
    assert caps(0.1, given={"json": 0.01, "prose": 1.0})[0] == min(0.01, expected)
    assert caps(0.1, given={"json": 1.0})[0] == pytest.approx(expected), "the tighter of the two counts"
    assert caps(max_epochs=0.1) == pytest.approx(
        [(n // 10 - 2 - r) / 96 for n, r in zip(samples, read, strict=True)]
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_share_at_its_cap_does_not_stop_the_run(catalogue: Catalogue, seed: int) -> None:
    """The sampler draws the rest of the run at the cap, from wherever other weights have led it."""
    rng = np.random.default_rng(seed)
    samples = dict(zip(DOMAINS, catalogue.samples("train").tolist(), strict=True))
    limit = {"json": 60 / samples["json"]}
    sampler = MixtureSampler(
        {name: [count] for name, count in samples.items()}, dict.fromkeys(DOMAINS, 1 / 3),
        global_batch_size=BATCH, seed=seed, max_epochs=limit,
    )  # fmt: skip
    for _ in range(4):
        sampler.set_weights(dict(zip(DOMAINS, rng.dirichlet(np.ones(3)), strict=True)))
        sampler.draw()
    read = dict(zip(DOMAINS, sampler.position.drawn.tolist(), strict=True))
    config = tiny_config(catalogue.root, Path("run"))
    config["data"]["max_epochs"] = limit
    tokens = {name: count * LENGTH for name, count in read.items()}
    caps = share_caps(check_config(config), catalogue, tokens, LEFT)
    assert caps is not None
    assert 0 < caps[0] < 1
    sampler.set_weights({"json": caps[0], "prose": 1 - caps[0]})
    for _ in range(12):
        sampler.draw()
    assert 56 <= sampler.position.drawn[0] <= 60


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


@pytest.mark.parametrize("is_written", [False, True])
def test_a_run_that_ends_first_says_so_and_its_snapshot_is_whole(
    catalogue: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_written: bool
) -> None:
    """``async``, with a pool without an answer; the last step comes while the snapshot is being written, or
    after."""
    config = check_config(tiny_config(catalogue.root, tmp_path / "run", search={"mode": "async"}))
    run, world = RunDir(config.run_dir), World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))
    source = ModelSource(tiny_llama_config(vocab_size=512), seed=0)
    engine = build_engine(config, source, world, LENGTH)
    writer = ModelWriter(world, engine, source)
    ledger = Ledger(1)
    around = Surroundings(
        run, config, world, writer, catalogue, ledger, lambda search, status: None, StopSignals()
    )
    asking = OpMixPolicy(around)
    weights = dict.fromkeys(DOMAINS, 1 / 3)
    state = TrainerState(
        step=4, weights=weights, domain_tokens=dict.fromkeys(DOMAINS, 0), content={}, world_size=1,
        global_batch_size=BATCH,
    )  # fmt: skip
    assert asking.decide(state, {}) is None
    while is_written and not run.search("0001").request_file.exists():
        assert asking.decide(state, {}) is None
    if not is_written:
        asking._asked_at = state  # the writing thread may have been quicker
    asking.end({})
    before = "answer was there" if is_written else "snapshot was written"
    assert f"the run has ended before its {before}; lower search.start_fraction" in caplog.text
    assert writer.write(run.export, dtype=torch.float32, marker={"step": 16}) == ""
    assert files.is_complete(run.snapshot(4))
    decided = MixtureRecord(version=1, step=5, weights=weights, why="", search="0001")
    caplog.clear()
    asking.end({5: decided})
    assert not caplog.text
