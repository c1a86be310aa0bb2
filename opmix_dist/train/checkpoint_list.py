"""The checkpoints of a run, for who asks what there is and whether it is whole. Nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, damage
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.train.state import STATE_FILE, TrainerState

Standing = Literal["whole", "damaged", "set aside", "unfinished"]
"""set aside: a resume found it damaged. unfinished: being written, or what a killed save has left."""


@dataclass(frozen=True)
class Listed:
    """One checkpoint. ``engine`` and ``ranks`` wrote it, where it says so."""

    step: int
    standing: Standing
    folder: Path
    bytes: int
    """Of its files, as they are."""
    why: str = ""
    """How it differs from what was written."""
    engine: str = ""
    ranks: int | None = None
    at: float | None = None
    """When it was complete, Unix seconds."""
    has_manifest: bool = True
    """Sizes and checksums of its files were recorded; without them nothing can be compared."""


def list_checkpoints(run: RunDir, *, checksums: bool = False) -> list[Listed]:
    """All that are there, by step; what a resume would take is the last whole one.

    Args:
        checksums: read every file and compare its content with what was written, and not its size alone.

    Raises:
        UserError: there is no such folder.
        OSError: the folder cannot be listed.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path} is no folder: name a run directory")
    return sorted(_all(run, checksums), key=lambda found: (found.step, found.standing))


def _all(run: RunDir, checksums: bool) -> Iterator[Listed]:
    for step in run.complete_checkpoints():
        yield _look(step, "whole", run.checkpoint(step), checksums)
    for step in run.damaged_checkpoints():
        found = _look(step, "set aside", run.damaged_checkpoint(step), checksums)
        yield replace(found, standing="set aside")
    for folder in run.incomplete_checkpoints():
        step = int(folder.name.removeprefix("step_"))
        yield Listed(step, "unfinished", folder, _size(folder), f"it has no {files.COMPLETE}")


def _look(step: int, standing: Standing, folder: Path, checksums: bool) -> Listed:
    found = Listed(step, standing, folder, _size(folder))
    try:
        marker = read_record(folder / files.COMPLETE, CheckpointMarker)
        at = (folder / files.COMPLETE).stat().st_mtime
        found = replace(found, at=at, has_manifest=marker.files is not None)
        why = damage(folder, marker.files or {}, checksums=checksums)
        if why is None:
            state = read_record(folder / STATE_FILE, TrainerState)
            return replace(found, engine=state.engine, ranks=state.world_size)
    except (UserError, OSError) as error:
        why = str(error)
    return replace(found, standing="damaged", why=why)


def _size(folder: Path) -> int:
    """Of ordinary files, links not followed; of what is removed meanwhile, nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
