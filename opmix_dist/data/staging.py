"""Files that are whole or absent, and a domain's folder while it is made.

A domain is made in ``ROOT/.NAME.tmp``, which takes its place under its name at the end::

    train/ eval/ domain.json ...    what is published; domain.json comes last
    work/                           what only its making needs; work/settings.json says with which settings

A later run with the same settings goes on with what it finds there; with others it begins anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from opmix_dist.atomic import TEMPORARY, write_json
from opmix_dist.bounded import read_json
from opmix_dist.data.catalogue import DOMAIN_FILE, MAX_DOMAIN_FILE_BYTES
from opmix_dist.errors import UserError

Settings = dict[str, JsonValue]


class Staging:
    """The folder ``.NAME.tmp`` beside a domain's place, new or as an earlier run left it.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, target: Path, settings: Settings) -> None:
        self.target = target
        self.folder = _hidden(target, "tmp")
        self.work = self.folder / "work"
        found = _settings(self.folder / DOMAIN_FILE, "settings")
        self.complete = found is not None and found == settings
        """Only the move to its place is left."""
        if self.complete or _settings(self.work / "settings.json") == settings:
            return
        with writing(target):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.work.mkdir(parents=True)
            write_json(self.work / "settings.json", settings)

    def publish(self) -> None:
        """Move the folder, whose ``domain.json`` is written, to its place; what was there goes."""
        with writing(self.target):
            shutil.rmtree(self.work, ignore_errors=True)
            for left_by_a_kill in self.folder.glob(TEMPORARY):
                left_by_a_kill.unlink()
            _take_place(self.folder, self.target)


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of ``target`` at the end, or vanishes on an error.

    Raises:
        UserError: the files cannot be written, for example because the disk is full.
    """
    temporary = _hidden(target, "tmp")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _take_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an OSError into one line that names ``target``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; mend that and run again, which goes on"
        ) from error


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Keep other ingests out of ``root`` while this one runs; the system lets go when a process ends.

    Raises:
        UserError: one is at work there, or the file system has no locks.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `opmix prepare` writes {root}: wait for it, or end it") from None
        except OSError as error:
            raise UserError(
                f"cannot lock {root} ({error.strerror}): prepare on a local disk, and copy"
            ) from None
        yield
    finally:
        os.close(descriptor)


def sync(folder: Path) -> None:
    """fsync the folder's files and the folders themselves, so that a rename never outruns the content."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hidden(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def _take_place(temporary: Path, target: Path) -> None:
    old = _hidden(target, "old")
    shutil.rmtree(old, ignore_errors=True)  # left by a kill
    sync(temporary)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    _sync_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settings(file: Path, key: str | None = None) -> Any:
    """The settings that a file of ours holds; None when there is no file."""
    try:
        value = read_json(file, MAX_DOMAIN_FILE_BYTES)
        return value if key is None else value[key]
    except FileNotFoundError:
        return None
    except (UserError, OSError, LookupError, TypeError) as error:
        raise UserError(f"cannot read {file} ({error}): delete its folder and run again") from None
