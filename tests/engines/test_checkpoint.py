"""What a checkpoint tells of itself: who continues it with what, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from opmix_dist.config import CheckpointConfig, EngineConfig, OptimizerConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import KINDS
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.source import ModelSource
from opmix_dist.train.checkpoint import STATE_FILE, Checkpointer
from tests.engines.ranks import LENGTH, LR, MODELS, SAVED, saved, train


@pytest.fixture
def world() -> Iterator[World]:
    joined = World.join(Placement(Role.TRAINER, 0, 1), device="cpu")
    yield joined
    joined.leave()


def build(world: World, model: str = "llama") -> SingleEngine:
    return SingleEngine(
        ModelSource(MODELS[model], seed=3),
        world,
        config=EngineConfig(),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


@pytest.fixture
def written(world: World, tmp_path: Path) -> SingleEngine:
    """It has saved a checkpoint to ``tmp_path``."""
    engine = build(world)
    saved(world, engine, tmp_path)[0].wait()
    return engine


def load(world: World, run: Path, engine: SingleEngine) -> None:
    Checkpointer(RunDir(run), CheckpointConfig(), world).load(engine, SAVED)


def record(run: Path, **changes: str | None) -> None:
    """Change what the checkpoint tells; None takes the key away."""
    path = RunDir(run).checkpoint(SAVED) / STATE_FILE
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize("engine", ["deepspeed (stage 2)", None])
def test_the_log_says_who_continues_whose(
    world: World, written: SingleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str | None
) -> None:
    """None: written before checkpoints told it; all of them hold AdamW's state."""
    record(tmp_path, engine=engine, optimizer="AdamW" if engine else None)
    with caplog.at_level(logging.INFO):
        load(world, tmp_path, build(world))
    by = engine or "an engine that it does not name"
    assert f"step 4, written by {by} on 1 rank(s), continued by single on 1: parameters and AdamW's" in (
        caplog.text
    )


def test_the_state_of_another_optimizer_is_left_out_and_the_log_says_so(
    world: World, written: SingleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, optimizer="Lion")
    engine = build(world, "llama")
    with caplog.at_level(logging.INFO):
        load(world, tmp_path, engine)
    assert "parameters only, since it holds the state of Lion: AdamW starts anew" in caplog.text
    assert engine.optimizer_steps == 0
    for kind in KINDS:
        ours, theirs = dict(engine._whole(kind)), dict(written._whole(kind))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name] if kind == "parameter" else torch.zeros_like(tensor))
    train(engine, SAVED, SAVED + 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"model": {"w": torch.ones(2)}, "optimizer": {"step": torch.ones(1)}},
            "no `parameter`: it is of an",
        ),
        ({"parameter": {"w": torch.ones(2)}}, "is missing, not of shape (64, 32)"),
        ({"parameter": {"model.embed_tokens.weight": torch.ones(2)}}, "is of shape (2,), not of shape (64,"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(
    world: World, tmp_path: Path, content: dict[str, dict[str, torch.Tensor]], words: str
) -> None:
    refuse(world, tmp_path, content, words)


def test_an_older_format_without_moments_is_refused(world: World, tmp_path: Path) -> None:
    parameters = dict(build(world)._whole("parameter"))
    refuse(world, tmp_path, {"parameter": parameters, "optimizer": {"step": torch.ones(1)}}, "no `exp_avg`")


def refuse(world: World, run: Path, content: dict[str, dict[str, torch.Tensor]], words: str) -> None:
    """A checkpoint of ``content`` in the place of an engine's."""
    engine = build(world)
    saved(world, engine, run)[0].wait()
    folder = RunDir(run).checkpoint(SAVED)
    state = (folder / STATE_FILE).read_text()
    files.remove_folder(folder)
    dcp.save(content, checkpoint_id=folder)
    (folder / STATE_FILE).write_text(state)
    files.mark_complete(folder, {"step": SAVED})
    with pytest.raises(UserError) as error:
        load(world, run, engine)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_metadata_that_is_no_metadata_is_refused(world: World, written: SingleEngine, tmp_path: Path) -> None:
    (RunDir(tmp_path).checkpoint(SAVED) / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match="os.system has no place in a checkpoint's metadata"):
        load(world, tmp_path, written)
