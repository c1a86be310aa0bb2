"""``opmix mixture`` prints what a run, a search, a fit or a file of weights holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import MixtureRecord
from tests.report.runs import RunWriter

WEIGHTS = {"web": 0.25, "code": 0.75}
CURRENT = {"web": 0.5, "code": 0.5}


def printed(capsys: pytest.CaptureFixture[str], place: Path, *options: str) -> str:
    assert main(["mixture", str(place), *options]) == 0
    return capsys.readouterr().out


def test_a_file_of_weights_in_each_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "mixture.yaml"
    place.write_text(yaml.safe_dump(WEIGHTS, sort_keys=False))
    assert json.loads(printed(capsys, place)) == WEIGHTS
    assert yaml.safe_load(printed(capsys, place, "--format", "yaml")) == WEIGHTS
    sources = ["--source", "web=/w", "--source", "code=/c"]
    assert printed(capsys, place, "--format", "megatron", *sources) == "0.25 /w 0.75 /c\n"
    assert json.loads(printed(capsys, place, "--format", "interleave"))["probabilities"] == [0.25, 0.75]
    streams = yaml.safe_load(printed(capsys, place, "--format", "streams", "--source", "web=s3://b/w"))
    assert streams["streams"]["web"] == {"remote": "s3://b/w", "proportion": 0.25}
    (web, _) = yaml.safe_load(printed(capsys, place, "--format", "olmo-core", *sources))["sources"]
    assert web == {"source_name": "web", "target_ratio": 0.25, "paths": ["/w"]}


def test_a_proposal_or_what_it_was_better_to_stay_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "proposal.json"
    for move, expected in ((True, WEIGHTS), (False, CURRENT), (None, WEIGHTS)):
        decision = None if move is None else {"move": move, "reason": ""}
        file.write_text(json.dumps({"weights": WEIGHTS, "current": CURRENT, "decision": decision}))
        assert json.loads(printed(capsys, file)) == json.loads(printed(capsys, tmp_path)) == expected


def test_the_last_mixture_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    for version, weights in enumerate((CURRENT, WEIGHTS)):
        record = MixtureRecord(version=version, step=10 * version, weights=weights, why="test")
        files.append_jsonl(run.mixtures_file, record.model_dump())
    assert json.loads(printed(capsys, tmp_path)) == WEIGHTS


def test_what_a_search_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = RunWriter(tmp_path).search()
    assert json.loads(printed(capsys, tmp_path)) == pytest.approx(search.proposal().chosen)


def test_places_without_a_mixture_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text('{"web": "all"}')
    (tmp_path / "ninety.json").write_text('{"web": 0.9}')
    for name, message in (
        ("", "holds no mixture: it has neither proposal.json nor mixtures.jsonl"),
        ("none.json", "none.json is missing"),
        ("list.json", "list.json holds no weights by domain"),
        ("text.json", "the weight of web is 'all', no number"),
        ("ninety.json", "the weights of a mixture must sum to 1, these sum to 0.9"),
    ):
        assert main(["mixture", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
