"""Which domains there are to verify, of a folder or a remote root."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opmix_dist.data.catalogue import DOMAIN_FILE, find_domains
from opmix_dist.data.remote import mirror, stored_domains
from opmix_dist.data.samples import INDEX_FILE
from opmix_dist.data.store import ShardStore
from opmix_dist.errors import UserError


@dataclass(frozen=True)
class Found:
    """Names, each with why its small files cannot be had, or None."""

    names: dict[str, str | None]
    left_out: int


def find(root: str, store: ShardStore | None, domains: Sequence[str] | None) -> Found:
    """The domains to look at. Of a store, their small files are in its cache afterwards.

    Raises:
        UserError: no folder, a remote that cannot be listed, no domain, or one that is not there.
    """
    there = find_domains(Path(root)) if store is None else stored_domains(store)
    if not there:
        raise UserError(f"{root} holds no domain: make some with `opmix prepare --out {root}`")
    for name in domains or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)[0]
            raise UserError(f"{root} has no domain {name!r}: the nearest is `{near}`")
    names = list(dict.fromkeys(domains)) if domains else there
    faults = dict.fromkeys(names) if store is None else _mirror(store, names)
    if store is None and not domains:
        faults |= {name: _undescribed(Path(root) / name) for name in _folders_of_shards(Path(root), there)}
    return Found(faults, len(there) - len(names))


def _folders_of_shards(root: Path, described: Sequence[str]) -> list[str]:
    """Folders that hold shards and are no domain, for want of a ``domain.json``."""
    folders = {file.parent.parent.name for file in root.glob(f"*/*/{INDEX_FILE}")}
    return sorted(folder for folder in folders - {*described} if not folder.startswith("."))


def _undescribed(folder: Path) -> str:
    return f"{folder} has shards and no {DOMAIN_FILE}: restore it, or remove the folder"


def _mirror(store: ShardStore, names: Sequence[str]) -> dict[str, str | None]:
    """All at once, which is fast; and one by one if that fails, to learn which cannot be had."""
    try:
        mirror(store, names)
        return dict.fromkeys(names)
    except UserError:
        return {name: _fault(store, name) for name in names}


def _fault(store: ShardStore, name: str) -> str | None:
    try:
        mirror(store, [name])
    except UserError as error:
        return str(error)
    return None
