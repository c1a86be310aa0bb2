"""Training methods on FSDP2's shards, and on replicas, against one rank that holds everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import on_ranks
from tests.methods.linear import LinearEngine
from tests.methods.ranks import LAYOUTS, RANKS, STEPS, everything

pytestmark = pytest.mark.launch
METHODS = ("ewc", "sampled", "mas", "gem", "a_gem", "o_lora")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    on_ranks(RANKS, "tests.methods.ranks", str(folder), str(tiny_data))
    return folder


@pytest.fixture(scope="module")
def alone(out: Path, tiny_data: Path) -> dict[str, Any]:
    return everything(LinearEngine([0.0]).world, None, out / "alone", tiny_data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_train_as_one(out: Path, alone: dict[str, Any], layout: str, method: str) -> None:
    found = json.loads((out / f"{layout}.json").read_text())[method]
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone[method]), rtol=2e-4, atol=0)
    told = {row[2] for row in found}
    assert max(told) > 0, "the method has done nothing"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.mark.parametrize(
    "written", ["ewc/importance", "sampled/importance", "mas/importance", "o_lora/hf", "o_lora/adapter"]
)
def test_what_is_written_is_whole(out: Path, alone: dict[str, Any], written: str) -> None:
    expected = stored(out / "alone" / written)
    for layout in LAYOUTS:
        found = stored(out / layout / written)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-6)
