"""`opmix search`: from a checkpoint to a mixture, killed and gone on with, asked again, and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import Proposal
from tests.conftest import DOMAINS
from tests.helpers import ROOT, tiny_llama, torchrun


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "hf"
    tiny_llama(vocab_size=512).save_pretrained(folder)
    shutil.copy(tiny_data / "tokenizer" / "tokenizer.json", folder)
    return folder


def written(folder: Path, data: Path, checkpoint: Path, **sections: Any) -> Path:
    """config.yaml of a quick search with its run directory in ``folder``."""
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"checkpoint": str(checkpoint)},
        "data": {"root": str(data), "domains": list(DOMAINS)},
        "engine": {"device": "cpu"},
        "optimizer": {"lr": 5e-3},
        "mixture": {"initial": {"json": 0.5, "prose": 0.3, "python": 0.2}},
        "search": {
            "probes": {"steps": 3, "batch_size": 1, "rank": 2},
            "candidates": {"count": 6, "samples_per_domain": 2, "joint": 2, "method": "lowrank"},
            "refinement": {"rounds": 0},
            "proposal": {"bootstrap": 5},
        },
    }
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config | sections))
    return path


def proposed(folder: Path) -> Proposal:
    return RunDir(folder / "run").search("0001").proposal()


def search(*arguments: object) -> int:
    return main(["search", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tiny_data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert search(written(folder, tiny_data, checkpoint), "--source", "json=/corpora/json") == 0
    return folder


def test_a_finished_search_has_what_its_reader_needs(finished: Path) -> None:
    run, proposal = finished / "run", proposed(finished)
    assert proposal.current == {"json": 0.5, "prose": 0.3, "python": 0.2}
    assert not list(run.rglob("model.safetensors")), "no copy of the checkpoint"
    mixture = json.loads((run / "mixture" / "mixture.json").read_text())
    assert mixture == pytest.approx(proposal.chosen)
    assert "/corpora/json" in (run / "mixture" / "megatron.txt").read_text()
    page = (run / "report.html").read_text()
    assert "without training" in page
    assert "Laws against measurements" in page
    assert "Held-out loss by domain" not in page


def test_a_finished_search_tells_its_result_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished / "config.yaml"
    status = RunDir(finished / "run").search("0001").status_file
    before = status.stat().st_mtime_ns
    assert search(config) == 0
    text = capsys.readouterr().out
    assert status.stat().st_mtime_ns == before, "nothing was done"
    proposal = proposed(finished)
    assert proposal.decision is not None
    verdict = "move to the proposal" if proposal.decision.move else "keep the mixture"
    assert f"{verdict}: {proposal.decision.reason}" in text
    assert "left-out error" in text
    assert f"{100 * proposal.weights['json']:.1f}%" in text


def test_other_bounds_use_the_probes_and_evaluations_that_are_there(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = RunDir(tmp_path / "run").search("0001")
    kept = {p: p.stat().st_mtime_ns for p in [*run.evaluations.iterdir(), *run.path.glob("probes/*/*")]}
    overrides = ["--run_dir", run.path.parent.parent, "--search.proposal.caps", "{json: 0.35}"]
    assert search(tmp_path / "config.yaml", *overrides) == 0
    assert proposed(tmp_path).weights["json"] <= 0.35 + 1e-6
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    evaluated = [path for path in kept if path.parent == run.evaluations]
    assert len(list(run.evaluations.iterdir())) == len(evaluated) + 2, "the proposal, and staying like it"


def test_a_question_without_an_answer_leaves_the_earlier_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = RunDir(tmp_path / "run")
    answered = (run.search("0001").proposal_file, run.search("0001").request_file, run.config_file)
    before = [path.read_bytes() for path in answered]
    overrides = ["--run_dir", run.path, "--search.proposal.floors", "{json: 0.99}"]
    assert search(tmp_path / "config.yaml", *overrides) == 2
    assert "floor of json (0.99)" in capsys.readouterr().err
    assert [path.read_bytes() for path in answered] == before
    assert main(["mixture", str(run.path)]) == 0


@pytest.mark.launch
def test_two_ranks_find_what_one_finds(
    finished: Path, tiny_data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = torchrun(2, "opmix_dist.cli", "search", str(written(tmp_path, tiny_data, checkpoint)))
    ours, theirs = proposed(tmp_path), proposed(finished)
    assert ours.simulated == pytest.approx(theirs.simulated, rel=1e-4)
    assert ours.snapshot == pytest.approx(theirs.snapshot, rel=1e-6)
    assert output.count("report: ") == 1, "one rank tells"
    again = torchrun(2, "opmix_dist.cli", "search", str(tmp_path / "config.yaml"))
    assert "probing" not in again
    assert proposed(tmp_path) == ours


@pytest.mark.launch
def test_kill_9_in_the_evaluation_and_go_on(tiny_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    sections = {"candidates": {"count": 24, "samples_per_domain": 8, "joint": 1, "method": "lowrank"}}
    quick = {
        "probes": {"steps": 3, "batch_size": 1, "rank": 2},
        "proposal": {"bootstrap": 5},
        "refinement": {"rounds": 0},
    }
    path = written(tmp_path, tiny_data, checkpoint, search={**quick, **sections})
    run = RunDir(tmp_path / "run").search("0001")
    command = [sys.executable, "-m", "opmix_dist.cli", "search", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not run.evaluations.is_dir() or len(list(run.evaluations.glob("*.safetensors"))) < 5:
        assert process.poll() is None, "ended before"
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not run.proposal_file.exists(), "the kill came too late"
    kept = {p: p.stat().st_mtime_ns for p in run.evaluations.glob("*.safetensors")}
    assert search(path) == 0
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items()), "evaluated once"
    again = written(tmp_path / "again", tiny_data, checkpoint, search={**quick, **sections})
    assert search(again) == 0
    assert proposed(tmp_path).model_dump(exclude={"costs"}) == proposed(tmp_path / "again").model_dump(
        exclude={"costs"}
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.checkpoint=/nowhere/at/all"], "model.checkpoint /nowhere/at/all is no folder"),
        (["--data.domains=[json, web]"], "web"),
        (["--mixture.initial={json: 0.5}"], "mixture.initial sums to 0.5"),
        (
            ["--search.new_domains=[json]"],
            "search.new_domains: json has a share of 0.5 in",
        ),
        (["--search.new_domains=[web]"], "search.new_domains names `web`"),
        (["--search.proposal.floors={web: 0.1}"], "floors names `web`"),
        (["--source", "web=/corpora/web"], "--source web"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(
    tiny_data: Path, checkpoint: Path, tmp_path: Path, capsys, overrides: list[str], message: str
) -> None:
    assert search(written(tmp_path, tiny_data, checkpoint), *overrides) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_and_another_job_are_refused(
    finished: Path, tiny_data: Path, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"e"', '"\\u0001"', 1))
    assert search(written(tmp_path, tiny_data, other)) == 2
    assert "has another tokenizer than the shards" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert search(finished / "config.yaml", "--search.probes.steps=4") == 2
    assert "was started with other settings (search.probes.steps)" in capsys.readouterr().err
    training = "{steps: 4, global_batch_size: 1, micro_batch_size: 1}"
    assert main(["train", str(finished / "config.yaml"), "--train", training]) == 2
    assert "holds a job of another kind" in capsys.readouterr().err


def test_a_search_that_fails_says_why_and_can_be_asked_again(
    tiny_data: Path, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    config = written(tmp_path, tiny_data, checkpoint)
    assert search(config, "--search.proposal.floors={json: 0.98}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("opmix: the search failed: ")
    assert "floor of json (0.98)" in line
    assert search(config) == 0
    assert proposed(tmp_path).weights
