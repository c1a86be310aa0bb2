"""A catalogue that lies elsewhere: its small files are mirrored at once, its shards when they are needed."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from opmix_dist.atomic import write_bytes
from opmix_dist.bounded import read_bounded
from opmix_dist.data.catalogue import (
    DOMAIN_FILE,
    MAX_DOMAIN_FILE_BYTES,
    SPLITS,
    TOKENIZER,
    Catalogue,
    check_domain_name,
    is_domain_name,
)
from opmix_dist.data.samples import INDEX_FILE
from opmix_dist.data.store import LOCKS, ShardStore, one_line, within
from opmix_dist.errors import UserError


def is_url(root: str) -> bool:
    """Whether fsspec, and not the local file system, is to open ``root``."""
    return "://" in root or "::" in root


def open_catalogue(
    root: str, domains: Sequence[str] | None = None, store: ShardStore | None = None
) -> Catalogue:
    """Open the domains of a folder, or of a store's remote root through its cache.

    Args:
        root: what the user wrote as ``data.root``; the store's remote, if there is one.
        domains: names in the order wanted; None takes every domain, sorted.

    Raises:
        UserError: as :meth:`Catalogue.open`, or a remote that cannot be read, or a cache of other data.
    """
    if store is None:
        return Catalogue.open(root, domains)
    names = mirror(store, domains)
    return dataclasses.replace(Catalogue.open(store.cache, names), store=store)


def mirror(store: ShardStore, domains: Sequence[str] | None) -> list[str]:
    """Have the domains' descriptions and indexes, and the tokenizer, in the cache; names of the domains.

    Every process does this for itself, under a lock. ``domain.json`` is read anew each time, so that a cache
    of data that was prepared again since is noticed; it is written last.

    Raises:
        UserError: as :func:`open_catalogue`, or all of it took longer than the store's ``timeout_s``.
    """
    try:
        (store.cache / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache {store.cache} cannot be made ({error.strerror}): name another") from None
    return _in_time(store, lambda: _mirror(store, domains))


def stored_domains(store: ShardStore) -> list[str]:
    """Sorted names of the domains at a store's remote root, also of one whose description cannot be read.

    Raises:
        UserError: the remote cannot be listed, or not within the store's ``timeout_s``.
    """

    def listed() -> list[str]:
        with _reading(store.remote) as remote:
            return remote.domains()

    return _in_time(store, listed)


def _in_time(store: ShardStore, work: Callable[[], list[str]]) -> list[str]:
    names: list[str] = []
    try:
        within(store.timeout_s, lambda: names.extend(work()))
    except TimeoutError as error:
        raise UserError(
            f"data.root {store.remote} cannot be read: {error}; see to the store, or to another process that "
            f"reads it into {store.cache}, or raise data.fetch_timeout_s"
        ) from None
    return names


def _mirror(store: ShardStore, domains: Sequence[str] | None) -> list[str]:
    with _reading(store.remote) as remote:
        names = remote.domains() if domains is None else list(domains)
        with FileLock(store.cache / LOCKS / "catalogue.lock"):
            _mirror_tokenizer(remote, store.cache)
            _mirror_domains(remote, store.cache, names)
    return names


def _mirror_tokenizer(remote: _Remote, cache: Path) -> None:
    folder = cache / TOKENIZER
    if (folder / "tokenizer.json").exists():  # its fingerprint is compared with every domain's
        return
    files = remote.read(remote.files(TOKENIZER))
    for name, content in sorted(files.items(), key=lambda item: item[0].endswith("/tokenizer.json")):
        write_bytes(cache / name, content)


def _mirror_domains(remote: _Remote, cache: Path, names: Sequence[str]) -> None:
    described = remote.read([f"{check_domain_name(name)}/{DOMAIN_FILE}" for name in names])
    new = [name for name in names if not _is_mirrored(cache, name, described[f"{name}/{DOMAIN_FILE}"])]
    indexes = remote.read([f"{name}/{split}/{INDEX_FILE}" for name in new for split in SPLITS])
    for path, content in indexes.items():
        write_bytes(cache / path, content)
    for name in new:
        write_bytes(cache / name / DOMAIN_FILE, described[f"{name}/{DOMAIN_FILE}"])


def _is_mirrored(cache: Path, name: str, described: bytes) -> bool:
    mine = cache / name / DOMAIN_FILE
    if not mine.exists():
        return False
    if read_bounded(mine, MAX_DOMAIN_FILE_BYTES) != described:
        raise UserError(f"{cache / name} caches another version of domain {name}: delete that folder")
    return True


class _Remote:
    """Small files of a remote root, by their path relative to it; many are read at once."""

    def __init__(self, url: str, fs: Any, root: str) -> None:
        self._url, self._fs, self._root = url, fs, root.rstrip("/")

    def domains(self) -> list[str]:
        """Sorted names of the folders that hold a ``domain.json``, also one that cannot be read now."""
        folders = (name for name, kind in self._list("") if kind == "directory")
        files = {f"{name}/{DOMAIN_FILE}": name for name in sorted(filter(is_domain_name, folders))}
        found = self._cat([*files])
        return [name for file, name in files.items() if not isinstance(found[file], FileNotFoundError)]

    def files(self, folder: str) -> list[str]:
        return [f"{folder}/{name}" for name, kind in self._list(folder) if kind == "file"]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Contents by path; UserError names the first that is missing."""
        found = self._cat(paths)
        for path, content in found.items():
            if isinstance(content, FileNotFoundError):
                raise UserError(f"{self._url}/{path} does not exist: see data.root and data.domains")
            if isinstance(content, Exception):
                raise content
        return found

    def _list(self, folder: str) -> Iterable[tuple[str, str]]:
        path = posixpath.join(self._root, folder).rstrip("/")
        self._fs.invalidate_cache()
        for entry in self._fs.ls(path, detail=True):
            name = posixpath.basename(entry["name"].rstrip("/"))
            if name and entry["name"].rstrip("/") != path:  # some stores list the folder itself
                yield name, entry["type"]

    def _cat(self, paths: Sequence[str]) -> dict[str, Any]:
        """Content, or the store's error, by path."""
        if not paths:
            return {}
        found: Mapping[str, Any] = self._fs.cat([f"{self._root}/{path}" for path in paths], on_error="return")
        return {path: found[f"{self._root}/{path}"] for path in paths}


@contextmanager
def _reading(url: str) -> Iterator[_Remote]:
    """Anything that a store's client raises becomes one line that names the URL."""
    import fsspec

    try:
        yield _Remote(url, *fsspec.core.url_to_fs(url))
    except UserError:
        raise
    except Exception as error:  # of the store's client
        raise UserError(f"data.root {url} cannot be read: {one_line(error)}") from error
