"""The folder of a lifecycle: lifecycle.yaml, and a run directory in stages/ for each stage that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import Name, Record, Stopped
from opmix_dist.settings import read_yaml

LIFECYCLE_FILE = "lifecycle.yaml"
STAGES = "stages"
MAX_STAGES = 1000


class _Named(Record):
    """A stage in lifecycle.yaml, of which only the name is needed here."""

    model_config = ConfigDict(extra="ignore")
    name: Name


_STAGES = TypeAdapter(Annotated[list[_Named], Field(min_length=1, max_length=MAX_STAGES)])


def is_lifecycle(path: Path) -> bool:
    return (path / LIFECYCLE_FILE).is_file()


def stage_folders(path: Path) -> list[Path]:
    """Folders of a lifecycle's stages in their order, whether they are there yet or not.

    Raises:
        UserError: lifecycle.yaml does not name its stages.
    """
    file = path / LIFECYCLE_FILE
    try:
        stages = _STAGES.validate_python(read_yaml(file).get(STAGES))
    except ValidationError as error:
        raise UserError(f"{file} does not name its stages: {error.errors()[0]['msg']}") from None
    return [path / STAGES / stage.name for stage in stages]


def runs_in(path: Path) -> list[RunDir]:
    """What is trained in a folder: its run, or those of a lifecycle's stages in their order, whether they are
    there yet or not. UserError as of :func:`stage_folders`."""
    return [RunDir(folder) for folder in stage_folders(path)] if is_lifecycle(path) else [RunDir(path)]


def has_ended(path: Path) -> bool:
    """Whether there is nothing left to train. UserError as of :func:`stage_folders`."""
    return all(run.summary_file.exists() for run in runs_in(path))


def stopped_in(path: Path) -> Stopped | None:
    """Of the run, or the stage, that was asked to stop and has not been started since.

    Raises:
        UserError: as of :func:`stage_folders`, or the record is invalid.
    """
    return next((stopped for run in runs_in(path) if (stopped := run.stopped()) is not None), None)
