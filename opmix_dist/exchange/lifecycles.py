"""The folder of a lifecycle: lifecycle.yaml, and a run directory in stages/ for each stage that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import Name, Record
from opmix_dist.settings import read_yaml

LIFECYCLE_FILE = "lifecycle.yaml"
STAGES = "stages"
MAX_STAGES = 1000


class _Named(Record):
    """A stage in lifecycle.yaml, of which only the name is needed here."""

    model_config = ConfigDict(extra="ignore")
    name: Name


_STAGES = TypeAdapter(Annotated[list[_Named], Field(min_length=1, max_length=MAX_STAGES)])


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
