"""A training step on 32,768 tokens, in one process and in FSDP2 over two: the same with the head in chunks,
in a fraction of the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.long_context import CHUNKED, WHOLE
from tests.engines.long_ranks import case
from tests.helpers import on_ranks

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out: Path = tmp_path_factory.mktemp("long") / "rows.json"
    on_ranks(2, "tests.engines.long_ranks", str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_a_long_step_is_the_same_without_its_logits(engine: str, measured: dict[str, Any]) -> None:
    whole, chunked = measured[f"{engine}, {WHOLE}"], measured[f"{engine}, {CHUNKED}"]
    for name in ("sample_loss", "grad_norm"):
        assert chunked[name] == pytest.approx(whole[name], rel=1e-5)
    copy = case(engine, WHOLE).logits_bytes
    assert copy == 512 << 20
    assert whole["peak_bytes"] > 2.5 * copy, "logits, their softmax and their gradient"
    assert chunked["peak_bytes"] < 0.5 * copy
