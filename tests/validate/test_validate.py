"""Whole validations of a tiny model in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from opmix_dist.cli import main
from opmix_dist.config import RunConfig, check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.models.build import snapshot_source
from opmix_dist.models.chunked_head import NO_TARGET
from opmix_dist.pool.calibration import Calibration, read_calibration
from opmix_dist.search_config import CandidateConfig, ProbeConfig, SearchConfig
from opmix_dist.settings import fields
from opmix_dist.train.roles import run_job
from opmix_dist.validate.comparing import divergence
from opmix_dist.validate.config import ValidateConfig, load_validate_config
from opmix_dist.validate.job import validate
from opmix_dist.validate.real import RealRuns
from opmix_dist.validate.records import Validation, ValidationDir
from opmix_dist.validate.simulators import ByFullParameters, own_model
from tests.helpers import ROOT, torchrun
from tests.pool.searches import alone
from tests.train.jobs import tiny_config

DOMAINS = ["json", "prose"]
STEPS, SEARCH_STEP = 6, 3
SEEDS = [0, 1]
SWEEP = {"hot": {"lr_multiplier": 8, "rank": 1}, "norm": {"interpolation": "norm"}}


def config(data: Path, run: Path, policy: str) -> RunConfig:
    given = tiny_config(
        data,
        run,
        pool={"ranks": 0},
        mixture={"policy": policy, "initial": {"json": 0.6, "prose": 0.4}},
        train={"steps": STEPS, "eval_interval_steps": 0},
        checkpoint={"interval_steps": SEARCH_STEP, "keep": 9},
        schedule={"warmup_steps": 2, "decay_fraction": 0.5},
    )
    given["data"]["domains"] = DOMAINS
    given["search"] |= {
        "start_fraction": SEARCH_STEP / STEPS,
        "probes": {"steps": 3, "batch_size": 4, "rank": 2},
        "candidates": {"count": 6, "samples_per_domain": 3},
        "proposal": {"bootstrap": 0},
    }
    return check_config(given)


@pytest.fixture(scope="module")
def searched(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that has searched."""
    run = tmp_path_factory.mktemp("validated") / "run"
    run_job(config(tiny_data, run, "opmix"))
    return RunDir(run)


def settings(folder: Path, **given: Any) -> ValidateConfig:
    small = {"design": {"mixtures": 1}, "folder": str(folder), "evaluation_batch_size": 4}
    return ValidateConfig(**{**small, **given})


def validated(run: RunDir, wanted: ValidateConfig) -> Validation:
    with alone() as world:
        found = validate(run, wanted, world)
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def finished(searched: RunDir, tmp_path_factory: pytest.TempPathFactory) -> tuple[Validation, ValidationDir]:
    folder = tmp_path_factory.mktemp("validation")
    wanted = settings(folder, sweep=SWEEP, real={"seeds": SEEDS}, keep_models=True)
    return validated(searched, wanted), ValidationDir(folder)


def test_a_validation_compares_real_runs_with_each_way_to_simulate(
    finished: tuple[Validation, ValidationDir], searched: RunDir
) -> None:
    found, folder = finished
    assert [point.name for point in found.points[:5]] == ["old", *DOMAINS, "proposal", "design-1"]
    assert [one.name for one in found.simulators] == ["probes", "hot", "norm", "full"]
    proposal = searched.search("0001").proposal()
    by_name = {point.name: point for point in found.points}
    # simulated as the search itself has simulated it, on the same samples
    assert by_name["proposal"].simulated["probes"] == pytest.approx(proposal.simulated, abs=1e-5)
    assert found.snapshot == pytest.approx(proposal.snapshot, abs=1e-5)
    # components by themselves are simulated by their own real runs exactly
    for name in ("old", *DOMAINS):
        assert by_name[name].simulated["full"] == pytest.approx(by_name[name].real, abs=1e-5)
        assert max(by_name[name].divergence["full"].values()) < 1e-6
        assert min(by_name[name].divergence["probes"].values()) > 1e-6
        assert by_name[name].simulated["norm"] == pytest.approx(by_name[name].simulated["probes"], abs=1e-6)
    assert by_name["design-1"].simulated["norm"] != pytest.approx(
        by_name["design-1"].simulated["probes"], abs=1e-5
    )
    assert [path.name.split("-")[0] for path in folder.sweep.iterdir()] == ["hot"], (
        "norm has the search's own"
    )
    averages = [point for point in found.points if point.kind == "average"]
    assert averages
    for point in averages:  # one real run, other simulations
        assert point.real == by_name["old"].real
        assert point.x == pytest.approx(by_name["old"].x)
        assert point.simulated["full"] != by_name["old"].simulated["full"]
    parts = found.sources
    assert parts.lora is not None and parts.averaging is not None  # noqa: PT018
    assert parts.gap == pytest.approx(parts.lora + parts.averaging)
    assert len([*(folder.path / "runs").iterdir()]) == 2 * found.mixtures
    assert found.costs["real runs"].tokens == 2 * found.mixtures * found.tokens
    assert found.sources.noise is not None and found.sources.noise > 1e-4  # noqa: PT018
    assert found.tokens == found.probe_tokens


def test_a_real_run_on_old_from_the_checkpoint_is_the_run_going_on(
    searched: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    static = config(tiny_data, tmp_path / "static", "static")
    run_job(static)
    wanted = settings(
        tmp_path / "validation",
        real={"start": "checkpoint", "steps": STEPS - SEARCH_STEP},
        design={"mixtures": 0, "components": False, "averages": False},
        full_parameters=False,
        keep_models=True,
    )
    found = validated(searched, wanted)
    (model,) = [
        one
        for one in (tmp_path / "validation" / "models").iterdir()
        if '"run": "old"' in (one / "COMPLETE.json").read_text()
    ]
    ours, theirs = (load_file(next(p.glob("*.safetensors"))) for p in (model, RunDir(static.run_dir).export))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    expected = RunDir(static.run_dir).summary().final_search_loss
    assert found.points[0].real == pytest.approx(expected, abs=1e-6)


class Killed(BaseException):
    """Nothing catches it: as good as a kill."""


def test_a_validation_that_was_killed_uses_the_runs_that_it_finished(
    searched: RunDir,
    finished: tuple[Validation, ValidationDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = settings(tmp_path, real={"seeds": SEEDS}, full_parameters=False, kl=False, calibration="affine")
    trained: list[tuple[str, int]] = []
    train = RealRuns.train

    def dies_in_the_third(self: RealRuns, task: Any, place: str) -> None:
        if len(trained) == 2:
            raise Killed
        trained.append((task.name, task.seed))
        train(self, task, place)

    monkeypatch.setattr(RealRuns, "train", dies_in_the_third)
    with pytest.raises(Killed), alone() as world:
        validate(searched, wanted, world)
    first, trained[:] = set(trained), []

    def noted(self: RealRuns, task: Any, place: str) -> None:
        trained.append((task.name, task.seed))
        train(self, task, place)

    monkeypatch.setattr(RealRuns, "train", noted)
    found = validated(searched, wanted)
    whole = {point.name: point.real for point in finished[0].points}
    assert {point.name: point.real for point in found.points} == whole
    assert first == {("old", 0), ("old", 1)}
    assert len(trained) == 2 * found.mixtures - 2
    assert not {*trained} & first
    assert found.chosen == "affine"
    assert all(point.divergence == {} for point in found.points)
    assert not (tmp_path / "models").exists()

    trained[:] = []
    again = validated(searched, wanted)  # nothing is left to do, and another conclusion costs nothing
    assert again.points == found.points
    assert validated(searched, wanted.model_copy(update={"calibration": "shift"})).chosen == "shift"
    assert trained == []


def test_full_parameters_are_interpolated_exactly(finished: tuple[Validation, ValidationDir]) -> None:
    _, folder = finished
    sources = [
        snapshot_source(path, attention="sdpa", trust_remote_code=False)
        for path in sorted(folder.models.iterdir())[:2]
    ]
    way = ByFullParameters(own_model(sources[0], torch.device("cpu"), None), sources)
    with way.at(np.array([0.25, 0.75])):
        for name in sources[0].shapes:
            expected = 0.25 * sources[0].tensor(name) + 0.75 * sources[1].tensor(name)
            torch.testing.assert_close(way.model.get_parameter(name).detach(), expected)


def test_divergence_is_that_of_the_distributions_at_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 5, 7, generator=generator).unbind()
    targets = torch.full((3, 5), NO_TARGET)
    targets[0, 1], targets[0, 4], targets[2, 0] = 3, 1, 2
    p, q = F.softmax(first.double(), -1), F.softmax(second.double(), -1)
    by_hand = (p * (p / q).log()).sum(-1)
    expected = torch.stack([by_hand[0, 1] + by_hand[0, 4], torch.zeros(()), by_hand[2, 0]])
    assert torch.allclose(divergence(first, second, targets), expected, atol=1e-6)


@pytest.mark.launch
def test_ranks_find_what_one_finds(
    searched: RunDir, finished: tuple[Validation, ValidationDir], tmp_path: Path
) -> None:
    """Two ranks that share the mixtures out, and two that train each of them together (FSDP)."""
    torchrun(2, "tests.validate.ranks", str(searched.path), str(tmp_path))
    one = finished[0]
    for folder, digits in (("dealt", 1e-9), ("together", 1e-4)):
        found = read_record(ValidationDir(tmp_path / folder).result_file, Validation)
        assert [point.name for point in found.points] == [point.name for point in one.points]
        for ours, theirs in zip(found.points, one.points, strict=True):
            assert ours.real == pytest.approx(theirs.real, abs=digits)
            for way in ("probes", "full"):
                assert ours.simulated[way] == pytest.approx(theirs.simulated[way], abs=digits)
                assert ours.divergence[way] == pytest.approx(theirs.divergence[way], abs=digits)


def test_the_command_writes_a_page_that_loads_nothing(
    searched: RunDir, finished: tuple[Validation, ValidationDir], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[1]
    arguments = ["validate", str(searched.path), "--folder", str(folder.path), "--design.mixtures", "1"]
    arguments += ["--evaluation_batch_size", "4", "--keep_models", "true"]
    assert main([*arguments, "--sweep", str(SWEEP), "--real.seeds", str(SEEDS)]) == 0
    printed = capsys.readouterr().out
    assert "the proposal ranks" in printed
    assert "Where the gap comes from" in printed
    text = folder.page_file.read_text()
    for title in ("Simulated against real", "Corrections", "All mixtures"):
        assert title in text
    assert 'http-equiv="Content-Security-Policy"' in text
    assert read_record(folder.result_file, Validation).points == finished[0].points


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--real.start", "checkpoint", "--real.seeds", "[0, 1]"], "real.seeds: with real.start checkpoint"),
        (["--real.seeds", "[1, 1]"], "real.seeds must differ"),
        (["--sweep", "{full: {rank: 4}}"], "sweep.full: the name is taken"),
        (["--design.components", "false"], "full_parameters needs the components"),
        (["--design.mixture", "3"], "unknown setting `design.mixture`"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_validate_config(None, overrides)


def test_what_a_run_lacks_is_said(searched: RunDir, tmp_path: Path) -> None:
    with alone() as world, pytest.raises(UserError, match="no search 0002 that is finished"):
        validate(searched, settings(tmp_path, search="0002"), world)
    with (
        alone() as world,
        pytest.raises(UserError, match="real.steps 4 from step 3 on is beyond the run's end"),
    ):
        validate(searched, settings(tmp_path, real={"start": "checkpoint", "steps": 4}), world)
    with alone() as world, pytest.raises(UserError, match="ranks_per_model is 2: set it to 1"):
        validate(searched, settings(tmp_path, ranks_per_model=2), world)


def test_a_search_goes_by_corrected_losses(searched: RunDir, tmp_path: Path, tiny_data: Path) -> None:
    """A correction by which json's loss falls steeply, and prose's not at all, draws the proposal to json."""
    zeros = dict.fromkeys(DOMAINS, 0.0)
    rule = Calibration(method="affine", offset=zeros, slope={"json": 40.0, "prose": 0.0}, averaging=zeros)
    write_record(tmp_path / "rule.json", rule)
    settings = config(tiny_data, tmp_path / "run", "opmix").model_dump(
        mode="json", include={"data", "search"}
    )
    settings |= {"run_dir": str(tmp_path / "run"), "model": {"checkpoint": str(searched.export)}}
    proposals = []
    for path in (None, str(tmp_path / "rule.json")):  # the second time all is evaluated already
        settings["search"]["calibration"] = path
        (tmp_path / "search.yaml").write_text(json.dumps(settings))
        assert main(["search", str(tmp_path / "search.yaml")]) == 0
        proposals.append(RunDir(tmp_path / "run").search("0001").proposal())
    assert proposals[1].weights["json"] > proposals[0].weights["json"] + 0.05
    assert proposals[1].snapshot == proposals[0].snapshot
    assert proposals[1].simulated["prose"] == pytest.approx(proposals[1].snapshot["prose"])


def test_a_correction_that_does_not_fit_the_search_is_refused(tmp_path: Path) -> None:
    rule = Calibration(method="none", offset={"cpp": 0}, slope={"cpp": 1}, averaging={"cpp": 0})
    write_record(tmp_path / "rule.json", rule)
    with pytest.raises(UserError, match="search.calibration knows no domain json, only cpp"):
        read_calibration(str(tmp_path / "rule.json"), DOMAINS, "linear")
    with pytest.raises(UserError, match="interpolation linear, and this search has norm: validate"):
        read_calibration(str(tmp_path / "rule.json"), ["cpp"], "norm")
    with pytest.raises(ValueError, match="early_stop compares losses before search.calibration"):
        SearchConfig(calibration="rule.json", candidates=CandidateConfig(early_stop=0.9))
    with pytest.raises(ValueError, match="search.calibration corrects losses"):
        SearchConfig(calibration="rule.json", metric="tasks")


def test_the_shipped_settings_load_and_all_are_documented() -> None:
    found = load_validate_config(ROOT / "configs" / "validate_gpu.yaml")
    assert found.sweep["rank-64"].probes(ProbeConfig()).alpha == 128  # alpha / rank stays
    assert found.sweep["lr-half"].probes(ProbeConfig()) == ProbeConfig(lr_multiplier=1.0)
    assert [key for key, field in fields(ValidateConfig) if not field.description] == []
