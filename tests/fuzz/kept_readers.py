"""Readers of what programs keep for their own later runs, and of what only looks at a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from opmix_dist.atomic import write_json
from opmix_dist.data.source import Place
from opmix_dist.data.staging import Staging, _settings
from opmix_dist.data.survey import Survey, Surveyed
from opmix_dist.data.written import RECORD_FILE, Counts, State, read_record
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.launch.records import Cancelled, Launch, LaunchDir, LocalProcess, SlurmOptions, Submission
from opmix_dist.observe.glance import glance
from opmix_dist.observe.screen import Screen
from opmix_dist.process import lock_run
from opmix_dist.searched import _recorded, read_searched

SURVEYED = 5


def make_kept(root: Path) -> None:
    """Beside the run of ``make_all``: a domain that is being made, and what a fit proposed."""
    staging = Staging(root / "staged" / "web", {"seed": 0})
    _survey(staging.work)
    counts = Counts(samples=1, tokens=8, documents=2)
    state = State(
        tokenizer="f", chunks=1, tokens_cut=0, unlearnt=0, counts={"train": counts, "eval": counts},
        shards={"train": [], "eval": []},
    )  # fmt: skip
    arrays = {"train.packer.tokens": np.arange(4, dtype=np.uint16), "train.packer.ends": np.array([2])}
    save_file(arrays, staging.work / RECORD_FILE, {"state": state.model_dump_json()})
    _launch(LaunchDir(RunDir(root / "run")))
    lock_run(root / "run").close()
    (root / "fitted").mkdir()
    write_json(root / "fitted" / "proposal.json", {"predicted": {"qa": 1.5}, "kl": None})


def _survey(work: Path) -> None:
    survey = Survey(work / "survey")
    columns = Surveyed(
        np.zeros((SURVEYED, 16), np.uint8), np.zeros(SURVEYED), np.zeros(SURVEYED, np.uint8),
        np.zeros(SURVEYED, np.uint32),
    )  # fmt: skip
    survey.append(Place(0, 0), columns)
    survey.save(complete=True)


def _launch(launch: LaunchDir) -> None:
    launch.path.mkdir(parents=True)
    options = SlurmOptions(nodes="2-4", ranks_per_node=8, python="/usr/bin/python3", setup=["module load x"])
    place = LocalProcess(host="here", pid=7, ranks=2, at="2026-01-01")
    submission = Submission(job="17", at="2026-01-01", nodes="2-4")
    launch.write(Launch(cwd="/", options=options, submissions=[submission], local=place, runs=["a"]))
    write_record(launch.cancelled_file, Cancelled(at="2026-01-01"))


def _read_survey(root: Path) -> object:
    survey = Survey(root / "staged" / ".web.tmp" / "work" / "survey")
    return survey.next_place, [len(block) for (block,) in survey.blocks("digests")]


def _read_top(root: Path) -> object:
    console = Console(file=io.StringIO(), width=104)
    console.print(Screen().draw(glance(RunDir(root / "run"))))
    return console.file


def _lock(root: Path) -> object:
    return lock_run(root / "run").close()


WORK = "staged/.web.tmp/work"
Kept = tuple[str, str, Callable[[Path], Any], bool]
KEPT: tuple[Kept, ...] = (
    ("survey", f"{WORK}/survey/survey.json", _read_survey, False),
    ("survey's digests", f"{WORK}/survey/digests.bin", _read_survey, False),
    ("survey's chunks", f"{WORK}/survey/chunks.bin", _read_survey, False),
    (
        "prepare's settings",
        f"{WORK}/settings.json",
        lambda root: _settings(root / WORK / "settings.json"),
        False,
    ),
    ("record of a second pass", f"{WORK}/{RECORD_FILE}", lambda root: read_record(root / WORK), False),
    ("launch", "run/launch/launch.json", lambda root: LaunchDir(RunDir(root / "run")).read(), False),
    ("lock", "run/.lock", _lock, False),
    ("top's steps", "run/metrics/train.jsonl", _read_top, True),
    ("top's mixtures", "run/mixtures.jsonl", _read_top, True),
    ("top's bad steps", "run/events.jsonl", _read_top, True),
    ("top's holder", "run/.lock", _read_top, True),
    ("top's search", "run/searches/0001/status.json", _read_top, True),
    (
        "what-if's candidates",
        "run/searches/0001/candidates.parquet",
        lambda r: read_searched(r / "run", resampled=2),
        True,
    ),
    (
        "what-if's request",
        "run/searches/0001/request.json",
        lambda r: read_searched(r / "run", resampled=2),
        True,
    ),
    (
        "what-if's proposal",
        "run/searches/0001/proposal.json",
        lambda r: read_searched(r / "run", resampled=2),
        True,
    ),
    (
        "what-if's fit",
        "fitted/proposal.json",
        lambda root: _recorded(root / "fitted/proposal.json", ["qa"]),
        False,
    ),
)
"""Name, file, what reads it, and whether that takes long."""
