"""Paths of a run directory and typed access to its files; the map is in docs/run_directory.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from opmix_dist.config import RunConfig, SearchRunConfig, SharedConfig, check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.schemas import (
    BadStep,
    EvalLine,
    Fit,
    MixtureRecord,
    Proposal,
    Record,
    SearchRequest,
    SearchStatus,
    Stopped,
    Summary,
    TrainLine,
)
from opmix_dist.settings import check_settings, read_yaml, to_yaml

R = TypeVar("R", bound=Record)
LAUNCH = "launch"
"""Folder of what started the run; it may be there before the run is."""
HANGS = "hangs"
"""Folder of the stacks of ranks that hung; one may hang before the run is there."""
CURVE_FILE = "curve.jsonl"
_STEP_FOLDER = re.compile(r"^step_(0|[1-9][0-9]{0,11})$")
_DAMAGED_FOLDER = re.compile(r"^damaged_step_(0|[1-9][0-9]{0,11})$")
_SEARCH_FOLDER = re.compile(r"^[0-9]{4}$")


def read_record(path: Path, kind: type[R]) -> R:
    """A checked record; UserError naming the file and the field when it does not fit its schema."""
    return _check(kind, files.read_json(path), str(path))


def read_records(path: Path, kind: type[R]) -> list[R]:
    return [_check(kind, row, f"{path}:{i}") for i, row in enumerate(files.read_jsonl(path), 1)]


def _check(kind: type[R], value: object, where: str) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where} is not a valid {kind.__name__}: {field}: {first['msg']}") from None


def write_record(path: Path, record: Record) -> None:
    files.write_json(path, record.model_dump(mode="json"))


class SearchDir:
    """searches/0001: request by the trainer, everything else by the pool."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.request_file = path / "request.json"
        self.status_file = path / "status.json"
        self.proposal_file = path / "proposal.json"
        self.fit_file = path / "fit.json"
        self.candidates_file = path / "candidates.parquet"
        self.evaluations = path / "evaluations"
        self.plan_file = path / "evaluation.json"

    def request(self) -> SearchRequest:
        return read_record(self.request_file, SearchRequest)

    def status(self) -> SearchStatus | None:
        """None until the pool has begun."""
        return read_record(self.status_file, SearchStatus) if self.status_file.exists() else None

    def proposal(self) -> Proposal:
        return read_record(self.proposal_file, Proposal)

    def fit(self) -> Fit:
        return read_record(self.fit_file, Fit)

    def probe(self, component: str) -> Path:
        """Folder of one adapter in PEFT's format."""
        return self.path / "probes" / component

    def curve(self, component: str) -> Path:
        """Training curve of one probe, lines {"step", "loss"}; complete with the folder."""
        return self.probe(component) / CURVE_FILE


class RunDir:
    """One run's folder. Opening it reads nothing; each method names the file it reads in its errors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.mixtures_file = self.path / "mixtures.jsonl"
        self.train_file = self.path / "metrics" / "train.jsonl"
        self.eval_file = self.path / "metrics" / "eval.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.summary_file = self.path / "summary.json"
        self.stopped_file = self.path / "stopped.json"
        self.report_file = self.path / "report.html"
        self.export = self.path / "export" / "hf"
        self.adapter = self.path / "export" / "adapter"
        self.importance = self.path / "method" / "importance"
        self.snapshots = self.path / "snapshots"
        self.checkpoints = self.path / "checkpoints"
        self.searches = self.path / "searches"
        self.launch = self.path / LAUNCH
        self.hangs = self.path / HANGS

    def snapshot(self, step: int) -> Path:
        return self.snapshots / f"step_{step}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def search(self, name: str) -> SearchDir:
        return SearchDir(self.searches / name)

    def search_dirs(self) -> list[SearchDir]:
        """All requested searches, oldest first."""
        if not self.searches.is_dir():
            return []
        found = sorted(p for p in self.searches.iterdir() if _SEARCH_FOLDER.match(p.name))
        return [SearchDir(p) for p in found if (p / "request.json").exists()]

    def complete_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that were finished, ascending."""
        return [step for step, folder in self._checkpoint_folders() if files.is_complete(folder)]

    def incomplete_checkpoints(self) -> list[Path]:
        return [folder for _, folder in self._checkpoint_folders() if not files.is_complete(folder)]

    def damaged_checkpoint(self, step: int) -> Path:
        """Where a checkpoint is set aside whose files are not as they were written."""
        return self.checkpoints / f"damaged_step_{step}"

    def damaged_checkpoints(self) -> list[int]:
        """Steps of those that were set aside, ascending."""
        return [step for step, _ in self._checkpoint_folders(_DAMAGED_FOLDER)]

    def _checkpoint_folders(self, pattern: re.Pattern[str] = _STEP_FOLDER) -> list[tuple[int, Path]]:
        if not self.checkpoints.is_dir():
            return []
        matches = [(pattern.match(p.name), p) for p in self.checkpoints.iterdir()]
        return sorted((int(m[1]), p) for m, p in matches if m)

    def write_config(self, config: SharedConfig) -> None:
        files.write_bytes(self.config_file, to_yaml(config).encode())

    def config(self) -> RunConfig:
        """The configuration of a training run.

        Raises:
            UserError: there is none, or it is that of a search alone.
        """
        found = self.any_config()
        if not isinstance(found, RunConfig):
            raise UserError(f"{self.path} is the folder of a search alone: it has no training")
        return found

    def any_config(self) -> RunConfig | SearchRunConfig:
        """Of a training run, or of a search alone, which trains nothing."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is not a run directory: it has no config.yaml")
        data = read_yaml(self.config_file)
        return check_config(data) if "train" in data else check_settings(SearchRunConfig, data)

    def mixtures(self) -> list[MixtureRecord]:
        """The recorded schedule in order, the last line for each step (a step is decided once)."""
        return list({r.step: r for r in read_records(self.mixtures_file, MixtureRecord)}.values())

    # A step that a resumed run has done again counts once, with its last line.

    def train_lines(self) -> list[TrainLine]:
        return list({r.step: r for r in read_records(self.train_file, TrainLine)}.values())

    def eval_lines(self) -> list[EvalLine]:
        return list({r.step: r for r in read_records(self.eval_file, EvalLine)}.values())

    def bad_steps(self) -> list[BadStep]:
        """In the order in which they were met."""
        return read_records(self.events_file, BadStep)

    def summary(self) -> Summary:
        return read_record(self.summary_file, Summary)

    def stopped(self) -> Stopped | None:
        """Of a run that was asked to stop and has not been started since."""
        return read_record(self.stopped_file, Stopped) if self.stopped_file.exists() else None
