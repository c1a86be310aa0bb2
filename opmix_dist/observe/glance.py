"""What a run directory shows at one moment.

Whoever watches may look while files are being written, before there are any, at a run of another
version or at a copy that is not complete. So nothing here raises for a file that is missing or invalid:
the latter becomes a problem, one sentence, and the rest is shown. Ages come from the file system's own
times, whose clock may not be this machine's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel

from opmix_dist.bounded import open_ordinary
from opmix_dist.config import RunConfig, SearchRunConfig
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir
from opmix_dist.exchange.schemas import (
    BadStep,
    EvalLine,
    MixtureRecord,
    SearchRequest,
    SearchStage,
    SearchStatus,
    Stopped,
    Summary,
)
from opmix_dist.observe.tail import MAX_TAIL_BYTES, M, tail_of_jsonl

T = TypeVar("T")
MAX_LOCK_BYTES = 200
MAX_EVENT_BYTES = 4 << 20
"""Of the newest bad steps; of older ones it is only known that there are more."""
_STACKS = re.compile(r"(trainer|pool)_\d{1,6}_\d{8}T\d{6}Z\.txt")


class StepLine(BaseModel):
    """What is shown of a line of metrics/train.jsonl. Lines of other versions may have more."""

    step: int
    loss: float
    tokens: int
    tokens_per_second: float
    lr: float
    grad_norm: float
    domain_loss: dict[str, float] = {}
    mfu: float | None = None


@dataclass(frozen=True)
class Mark:
    """Something that was done: ``step``, and when it was written, Unix seconds."""

    step: int
    at: float


@dataclass
class SearchGlance:
    """One search. Times are Unix seconds, None where the file is not there."""

    name: str
    request: SearchRequest | None = None
    status: SearchStatus | None = None
    decided: MixtureRecord | None = None
    """The line of mixtures.jsonl that names it."""
    asked_at: float | None = None
    stage_began_at: float | None = None
    """About when the stage of ``status`` began."""
    beat_at: float | None = None
    """When ``status`` was written."""

    @property
    def open(self) -> bool:
        """Somebody still works on it, or should."""
        return self.decided is None and not (self.status and self.status.stage.final)


@dataclass
class Glance:
    """All that is shown of a run. ``now`` is on the file system's clock as far as that is known."""

    path: Path
    now: float
    config: RunConfig | SearchRunConfig | None = None
    lines: list[StepLine] = field(default_factory=list)
    """The newest steps, the last one last."""
    stepped_at: float | None = None
    """When the last step was written."""
    evaluation: EvalLine | None = None
    mixtures: list[MixtureRecord] = field(default_factory=list)
    searches: list[SearchGlance] = field(default_factory=list)
    checkpoint: Mark | None = None
    damaged_checkpoints: list[int] = field(default_factory=list)
    bad_steps: list[BadStep] = field(default_factory=list)
    """In the order in which they were met."""
    more_bad_steps: bool = False
    """There were others before them."""
    stacks: list[str] = field(default_factory=list)
    """Names of the files that ranks left which hung, oldest first."""
    holder: str = ""
    """The process that holds the run directory, or held it last: ``pid 12 on host``."""
    stopped: Stopped | None = None
    summary: Summary | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def training(self) -> RunConfig | None:
        return self.config if isinstance(self.config, RunConfig) else None

    @property
    def step(self) -> int:
        if self.summary is not None:
            return self.summary.steps
        return self.lines[-1].step if self.lines else 0

    @property
    def ended(self) -> bool:
        """Nothing more will happen unless somebody starts it again."""
        return self.summary is not None or self.stopped is not None


def glance(run: RunDir) -> Glance:
    """Look once.

    Raises:
        UserError: there is no such folder.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path} is no folder: name a run directory")
    seen = Glance(path=run.path, now=time.time())
    look = _Look(seen.problems)
    if run.config_file.exists():
        seen.config = look(run.any_config)
    else:
        seen.problems.append("no config.yaml yet: the run has not begun, or this is no run directory")
    # of a step that a resumed run has done again, the last line counts
    seen.lines = list({line.step: line for line in _tail(run.train_file, StepLine, look)}.values())
    seen.stepped_at = _written_at(run.train_file)
    seen.evaluation = next(reversed(_tail(run.eval_file, EvalLine, look)), None)
    seen.mixtures = look(run.mixtures) or []
    seen.searches = [_search(search, seen.mixtures, look) for search in look(run.search_dirs) or []]
    seen.checkpoint = look(lambda: _checkpoint(run))
    seen.damaged_checkpoints = look(run.damaged_checkpoints) or []
    seen.bad_steps = _tail(run.events_file, BadStep, look, MAX_EVENT_BYTES)
    seen.more_bad_steps = bool(seen.bad_steps) and run.events_file.stat().st_size > MAX_EVENT_BYTES
    seen.stacks = look(lambda: _stacks(run)) or []
    seen.holder = look(lambda: _holder(run)) or ""
    seen.stopped = look(run.stopped)
    seen.summary = look(run.summary) if run.summary_file.exists() else None
    # a file that was written later than now tells that this machine's clock is behind
    times = [seen.stepped_at, *(search.beat_at for search in seen.searches)]
    seen.now = max([seen.now, *(at for at in times if at is not None)])
    return seen


class _Look:
    """Calls a reader; what that refuses becomes a problem, and the answer None."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def __call__(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (UserError, OSError, yaml.YAMLError, ValueError) as error:
            self.problems.append(" ".join(str(error).split()))
            return None


def _tail(path: Path, kind: type[M], look: _Look, max_bytes: int = MAX_TAIL_BYTES) -> list[M]:
    rows, invalid = look(lambda: tail_of_jsonl(path, kind, max_bytes)) or ([], 0)
    if invalid:
        look.problems.append(f"{path}: {invalid} of the last lines are not valid")
    return rows


def _search(search: SearchDir, mixtures: list[MixtureRecord], look: _Look) -> SearchGlance:
    status = look(search.status)
    probing = status is None or status.stage is SearchStage.PROBING
    return SearchGlance(
        name=search.name,
        request=look(search.request),
        status=status,
        decided=next((record for record in mixtures if record.search == search.name), None),
        asked_at=_written_at(search.request_file),
        stage_began_at=_written_at(search.request_file if probing else search.plan_file),
        beat_at=_written_at(search.status_file),
    )


def _checkpoint(run: RunDir) -> Mark | None:
    step = max(run.complete_checkpoints(), default=None)
    if step is None:
        return None
    at = _written_at(run.checkpoint(step) / files.COMPLETE)
    return Mark(step, at) if at is not None else None  # removed while we looked


def _stacks(run: RunDir) -> list[str]:
    if not run.hangs.is_dir():
        return []
    names = [path.name for path in run.hangs.iterdir() if _STACKS.fullmatch(path.name)]
    return sorted(names, key=lambda name: name.rpartition("_")[2])


def _holder(run: RunDir) -> str:
    try:
        with open(open_ordinary(run.path / ".lock"), "rb") as file:
            return file.read(MAX_LOCK_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""


def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
