"""docs/fit.md holds what it says: its commands are run on small tables, and its output is compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opmix_dist.mixture_files import FORMATS
from tests.fit.swarms import DOMAINS, losses, ratios, write_csv, write_swarm
from tests.fit.test_config import OLMIX
from tests.helpers import ROOT
from tests.pages import Block, compare_shown, read_blocks, run_blocks

PAGE = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tables that the page's commands read."""
    folder = tmp_path_factory.mktemp("page")
    write_swarm(folder, noise=0.003)
    (folder / "olmix.yaml").write_text(OLMIX.replace("hard: 0.5", 'hard: "45/52.0"'))
    mixtures = ratios(60)
    for name, columns, table in (
        ("train_mixture", [f"train_{name}" for name in DOMAINS], mixtures.round(3)),
        ("train_loss", [f"metric/{name}_val_loss" for name in DOMAINS], losses(mixtures)),
    ):
        write_csv(folder / f"{name}.csv", ["index", *columns], ([i, *row] for i, row in enumerate(table)))
    return folder


@pytest.fixture(scope="module")
def blocks(folder: Path) -> list[Block]:
    """The page's blocks, after its commands were run."""
    blocks = read_blocks(PAGE)
    run_blocks(blocks, folder)
    return blocks


@pytest.mark.launch
def test_what_the_page_prints_is_what_its_commands_printed(blocks: list[Block]) -> None:
    assert compare_shown(blocks) > 25


@pytest.mark.launch
def test_the_files_of_the_page_are_there(blocks: list[Block], folder: Path) -> None:
    listed = re.findall(
        r"^\| `([\w.]+/?)` \|", PAGE.partition("`fitted` then holds")[2].partition("\n## ")[0], re.M
    )
    assert sorted(name.rstrip("/") for name in listed) == sorted(
        one.name for one in (folder / "fitted").iterdir()
    )
    for name, (file, _) in FORMATS.items():
        assert f"`{name}`" in PAGE
        assert f"`{file}`" in PAGE
    bounded = json.loads((folder / "bounded" / "proposal.json").read_text())
    rise = bounded["predicted"]["web_loss"] - bounded["predicted_current"]["web_loss"]
    assert rise <= 0.05 + 1e-5
    assert bounded["weights"]["math"] <= 0.3 + 1e-5
