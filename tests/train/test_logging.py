"""When the training log is on disk, and what lines of it say."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import EvalLine, TrainLine
from opmix_dist.ledger import Ledger
from opmix_dist.train.callbacks import JsonlLogger, heldout_text
from opmix_dist.train.trainer import Trainer


def line(step: int) -> TrainLine:
    return TrainLine(
        step=step, loss=2.0, domain_loss={}, grad_norm=1.0, lr=1e-3, tokens=8 * step, tokens_per_second=1.0,
        mixture_version=0,
    )  # fmt: skip


def test_no_step_waits_for_the_disk_but_a_checkpoint_has_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        events.append(Path(f"/proc/self/fd/{file}").resolve().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    run = RunDir(tmp_path)
    trainer: Any = SimpleNamespace(
        run=run,
        world=SimpleNamespace(is_leader=True, enter=lambda phase, step: None),
        loader=SimpleNamespace(state_dict=dict),
        ledger=Ledger(1),
        state=SimpleNamespace(step=0),
        engine=None,
    )
    logger = JsonlLogger()
    logger.on_start(trainer)
    for step in (1, 2):
        logger.on_step(trainer, line(step))
        assert [row["step"] for row in files.read_jsonl(run.train_file)][-1] == step, "a kill would lose it"
    assert events == []
    checkpointer: Any = SimpleNamespace(save=lambda engine, state: events.append("checkpoint"))
    Trainer.save_checkpoint(trainer, checkpointer)
    assert events == ["train.jsonl", "checkpoint"]


def test_the_mean_is_of_what_is_trained_on() -> None:
    found = EvalLine(step=4, tokens=64, loss={"web": 2.0, "code": 3.0, "old": 4.0}, stderr={})
    assert (
        heldout_text(found, ["web", "code", "old"])
        == "held-out mean 3.0000  web 2.000  code 3.000  old 4.000"
    )
    watched = "held-out mean 2.5000  web 2.000  code 3.000  (watched: old 4.000)"
    assert heldout_text(found, ["web", "code"]) == watched
