"""docs/search.md holds what it says: its commands and its Python are run, its YAML is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opmix_dist.config import SearchRunConfig
from opmix_dist.exchange.rundir import write_record
from opmix_dist.search_config import SearchConfig
from opmix_dist.searched import read_searched
from opmix_dist.settings import check_settings, fields
from tests.helpers import ROOT
from tests.pages import compare_shown, read_blocks, run_blocks
from tests.report.runs import DOMAINS, UNIFORM, RunWriter

PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")


def write_run(path: Path) -> None:
    """A run whose search recorded what its own laws predict."""
    search = RunWriter(path).mixture(0, UNIFORM, "mixture.initial: uniform").search()
    searched = read_searched(path, resampled=2)
    predicted = searched.fit.law.predict(searched.proposal[None])[0].tolist()
    record = search.proposal().model_copy(update={"predicted": dict(zip(DOMAINS, predicted, strict=True))})
    write_record(search.proposal_file, record)


@pytest.mark.launch
def test_commands_print_what_the_page_shows(tmp_path: Path):
    write_run(tmp_path / "runs" / "mine")
    blocks = read_blocks(PAGE)
    run_blocks(blocks, tmp_path)
    assert compare_shown(blocks) > 15
    assert (tmp_path / "runs" / "mine" / "pareto.html").is_file()


def test_the_python_runs_as_it_stands():
    names: dict = {}
    for block in read_blocks(PAGE):
        if block.language == "python":
            exec(block.content, names)
    assert names["proposal"].mixture[0] <= 0.5 + 1e-6
    assert (
        (names["low"] <= names["proposal"].mixture + 1e-3)
        & (names["proposal"].mixture <= names["high"] + 1e-3)
    ).all()
    assert names["result"].rounds > 1


def test_the_yaml_is_a_configuration_and_named_settings_exist():
    loaded = [
        check_settings(SearchRunConfig, yaml.safe_load(block.content))
        for block in read_blocks(PAGE)
        if block.language == "yaml"
    ]
    assert [config.run_dir for config in loaded] == ["runs/search"]
    proposal = PAGE.partition("under `search.proposal`:")[2].partition("\n\n")[2].partition("\n\n")[0]
    named = [line.split("|")[1].replace("`", "").split(",") for line in proposal.splitlines()[2:]]
    settings = {key for key, _ in fields(SearchConfig)}
    assert len(named) > 5
    for key in (name.strip() for row in named for name in row):
        assert f"proposal.{key}" in settings
