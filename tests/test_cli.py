"""Bad input: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.config import load_config
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import SearchRequest
from tests.helpers import ROOT, tiny_llama
from tests.train.jobs import tiny_config


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("opmix: ")
    return lines[0]


def written(tmp_path: Path, config: dict) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"root": "nowhere"}}, "nowhere is no folder"),
        ({"data": {"domains": ["json", "pyhton"]}}, "pyhton.*python"),
        ({"mixture": {"initial": {"json": 0.5, "prose": 0.6}}}, "mixture.initial sums to 1.1: weights must"),
        ({"mixture": {"initial": {"json": 0.5, "web": 0.5}}}, "mixture.initial names `web`"),
        ({"mixture": {"initial": {"json": 1.5, "prose": -0.5}}}, "mixture.initial.json is 1.5"),
        ({"pool": {"ranks": 1}}, "pool.ranks 1 leaves no trainer in a launch of 1 .* start at least 2"),
        ({"train": {"step": 3}}, "`train.step`: the nearest valid one is `train.steps`"),
        ({"search": {"proposal": {"omega": {"web": 1.0}}}}, "search.proposal.omega names `web`"),
        ({"search": {"proposal": {"omega": {"json": 1.0}}}}, "no weight for `prose`"),
        ({"model": {"config": {"model_type": "lama"}}}, "lama"),
        ({"model": {"config": {"model_type": "llama", "hidden_sise": 32}}}, "hidden_sise is no field"),
    ],
)  # fmt: skip
def test_train_refuses(tiny_data: Path, tmp_path: Path, capsys, sections: dict, message: str) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0})
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    line = refused(capsys, "train", written(tmp_path, config))
    assert re.search(message, line), line
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left <= {".lock"}, "something half-written"


def test_an_empty_domain_is_named(tiny_data: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    info = json.loads((tmp_path / "data" / "json" / "domain.json").read_text())
    info["splits"]["eval"] = {"samples": 0, "tokens": 0, "documents": 0}
    (tmp_path / "data" / "json" / "domain.json").write_text(json.dumps(info))
    config = tiny_config(tmp_path / "data", tmp_path / "run", pool={"ranks": 0})
    line = refused(capsys, "train", written(tmp_path, config))
    assert "json" in line
    assert "eval" in line
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_noticed(tiny_data: Path, tmp_path: Path, capsys) -> None:
    """Beside the shards, and beside the checkpoint that training starts from."""
    shutil.copytree(tiny_data, tmp_path / "data")
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    changed = file.read_text().replace('"e"', '"\\u0001"', 1)
    assert changed != file.read_text()
    file.write_text(changed)
    config = tiny_config(tmp_path / "data", tmp_path / "run", pool={"ranks": 0})
    assert "tokenizer" in refused(capsys, "train", written(tmp_path, config))
    tiny_llama(vocab_size=512).save_pretrained(tmp_path / "checkpoint")
    shutil.copy(file, tmp_path / "checkpoint" / "tokenizer.json")
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0})
    config["model"] = {"checkpoint": str(tmp_path / "checkpoint")}
    assert "has another tokenizer than the shards" in refused(capsys, "train", written(tmp_path, config))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(tiny_data: Path, tmp_path: Path) -> None:
    from opmix_dist.errors import UserError
    from opmix_dist.exchange.opening import check_earlier_attempt

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    config = load_config(written(tmp_path, tiny_config(tiny_data, tmp_path / "run")))
    with pytest.raises(UserError, match="holds thesis.tex but is no run"):
        check_earlier_attempt(RunDir(tmp_path / "run"), config, ())


def test_a_snapshot_without_its_marker_fails_the_search_by_name(tiny_data: Path, tmp_path: Path) -> None:
    """In a process of its own, where the pool's group is a world of one."""
    from opmix_dist.distributed import Placement, Role, World
    from opmix_dist.pool.run_search import Searcher

    config = load_config(written(tmp_path, tiny_config(tiny_data, tmp_path / "run")))
    run = RunDir(tmp_path / "run")
    tiny_llama(vocab_size=512).save_pretrained(run.snapshot(4))
    search = run.search("0001")
    request = SearchRequest(
        search="0001", step=4, snapshot="snapshots/step_4", components=["old", "json"],
        domains=["json", "prose"], composition=[[0.5, 0.5], [0.95, 0.05]],
        current={"json": 0.5, "prose": 0.5}, prior={"json": 0.5, "prose": 0.5}, base_lr=1e-3, seed=0,
    )  # fmt: skip
    write_record(search.request_file, request)
    world = World.join(Placement(Role.POOL, 0, 1), device="cpu")
    try:
        Searcher(run, config, world).answer(search)
    finally:
        world.leave()
    status = search.status()
    assert status is not None
    assert status.stage == "failed"
    assert "snapshots/step_4 has no COMPLETE.json" in status.reason
    assert not search.proposal_file.exists()
    assert not files.is_complete(search.probe("old"))


def test_prepare_refuses_a_domain_without_a_path(tmp_path: Path, capsys) -> None:
    assert "--domain web" in refused(capsys, "prepare", "--out", str(tmp_path / "d"), "--domain", "web")
    line = refused(capsys, "prepare", "--out", str(tmp_path / "d"), "--domain", f"web={tmp_path}/none")
    assert "none" in line
    assert not (tmp_path / "d" / "web").exists()


def test_a_size_that_is_none(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--out", str(tmp_path / "x"), "--builtin", "--shard-bytes", "1XB"])
    assert "argument --shard-bytes: 1XB is no size: write 1000000, 64MiB or 1GB" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--overwrit", "--over"])
def test_a_mistyped_option_is_not_taken_for_another(tmp_path: Path, capsys, option: str) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["prepare", "--out", str(tmp_path / "out"), "--builtin", option])
    assert refusal.value.code == 2
    assert f"unrecognised arguments: {option}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_report_of_something_else_names_it(tmp_path: Path, capsys) -> None:
    assert str(tmp_path) in refused(capsys, "report", str(tmp_path))


def test_print_config_shows_every_section(capsys) -> None:
    assert main(["train", str(ROOT / "configs" / "demo.yaml"), "--print-config", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "seed: 3" in text
    assert "# LoRA rank" in text
