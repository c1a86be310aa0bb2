"""The files that paths, folders, globs and URLs name, and how they are opened.

Local names and URLs end as the same thing, a :class:`File` on an fsspec file system. Names come from the user
and from the file systems' own listings only.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from opmix_dist.errors import UserError

CHUNK_BYTES = 4 << 20
"""Bytes of a source in one chunk, roughly: what a tokenising process needs about a second for."""
MEGATRON_INDEX, MEGATRON_DATA = ".idx", ".bin"


@dataclass(frozen=True)
class File:
    """A file that exists."""

    fs: AbstractFileSystem
    path: str  # in `fs`
    name: str  # as the user would write it
    size: int  # bytes

    def open(self) -> IO[bytes]:
        """Raises OSError, or what the store's client raises: use it within :func:`reading`."""
        opened: IO[bytes] = self.fs.open(self.path, "rb")
        return opened

    @property
    def base(self) -> str:
        """The name without its folder."""
        return self.path.rpartition("/")[2]

    def beside(self, relative: str) -> tuple[AbstractFileSystem, str]:
        """Key of the file at ``relative`` to this one's folder; it need not exist."""
        return self.fs, self.path.removesuffix(self.base) + relative

    def sibling(self, relative: str) -> File | None:
        """The file at ``relative`` to this one's folder, or None when there is none."""
        head, *chain = self.name.split("::")  # what archives and caches are reached through
        name = "::".join([head.removesuffix(self.base) + relative, *chain])
        fs, path = self.beside(relative)
        with reading(name):
            return _file(fs, path, name, fs.info(path)["size"]) if fs.isfile(path) else None


def list_files(names: Iterable[str]) -> list[File]:
    """Sorted by the parts of their names, each once; hidden files are left out of folders and globs.

    Raises:
        UserError: a name that matches no file, or a store that cannot be asked.
    """
    files = {(file.fs, file.path): file for name in names for file in _expand(name)}
    return sorted(files.values(), key=lambda file: file.name.split("/"))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what reading the file ``name`` raises into one UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # pyarrow, and every store's client, have their own
        if not _is_url(name) and type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        raise UserError(f"cannot read {name}: {one_line(error)}") from error


def _is_url(name: str) -> bool:
    return "://" in name or "::" in name


def one_line(error: BaseException) -> str:
    """What the error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _expand(name: str) -> list[File]:
    if _is_url(name):
        with reading(name):
            files = _expand_url(name)
    else:
        files = [_local(path) for path in _expand_local(Path(name).expanduser())]
    if not files:
        raise UserError(f"{name} matches no file: give a file, a folder, or a glob in quotes")
    return files


def _expand_local(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    pattern = str(Path(glob.escape(str(path))) / "**" / "*") if path.is_dir() else str(path)
    found = [file for file in map(Path, glob.iglob(pattern, recursive=True)) if file.is_file()]
    pair = [path.with_name(path.name + end) for end in (MEGATRON_DATA, MEGATRON_INDEX)]
    return found or [file for file in pair if file.is_file()]


def _local(path: Path) -> File:
    with reading(str(path)):
        return File(LocalFileSystem(), str(path.absolute()), str(path), path.stat().st_size)


def _expand_url(url: str) -> list[File]:
    fs, path = url_to_fs(url)
    fs.invalidate_cache()  # listings that an earlier look left may be old
    chain = "".join(url.partition("::")[1:])
    pair = [path + end for end in (MEGATRON_DATA, MEGATRON_INDEX)]
    found = _find(fs, path) or [fs.info(file) for file in pair if fs.isfile(file)]
    return [_file(fs, one["name"], fs.unstrip_protocol(one["name"]) + chain, one["size"]) for one in found]


def _find(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """What fsspec says of the file ``path``, or of those below that folder, or that match that glob."""
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # the host, not the file, is missing
            raise error.__cause__ from None
        found = fs.glob(path, detail=True) if glob.has_magic(path) else {}
        literal = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]
        below = [one for one in found.values() if one["type"] == "file"]
    else:
        if info["type"] == "file":
            return [{**info, "name": path}]
        literal = path
        below = list(fs.find(path, detail=True).values())
    return [one for one in below if not _is_hidden(one["name"], literal)]


def _is_hidden(path: str, folder: str) -> bool:
    """As a shell's ``*`` understands it, below ``folder``."""
    return any(part.startswith(".") for part in path.removeprefix(folder).split("/"))


def _file(fs: AbstractFileSystem, path: str, name: str, size: int | None) -> File:
    """Raises UserError when the server does not tell the size, as a change would go unnoticed."""
    if size is None:
        raise UserError(f"{name}: the server does not say how long it is: download it first")
    return File(fs, path, name, size)
