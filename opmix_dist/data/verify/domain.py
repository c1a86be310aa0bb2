"""What one domain's small files say: of each other, of the folder, and of what was found in the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from opmix_dist.bounded import open_ordinary, read_bounded
from opmix_dist.data.catalogue import (
    DIGESTS_FILE,
    DOMAIN_FILE,
    SOURCES_FILE,
    SPLITS,
    DomainInfo,
    SourceInfo,
    Split,
)
from opmix_dist.data.remote import is_url
from opmix_dist.data.samples import INDEX_FILE
from opmix_dist.data.shards import MAX_INDEX_BYTES, ShardedSplit
from opmix_dist.data.store import BLOCK_BYTES, one_line
from opmix_dist.data.survey import DIGEST_BYTES
from opmix_dist.data.verify.report import DomainReport
from opmix_dist.errors import UserError

PREPARE_AGAIN = "copy the domain again or prepare it again"


def open_splits(local: Path, info: DomainInfo, report: DomainReport) -> dict[Split, ShardedSplit]:
    """The splits whose index can be used; what is wrong with an index goes into the report.

    Args:
        local: the domain's folder, or its place in a cache.
    """
    splits: dict[Split, ShardedSplit] = {}
    for split in SPLITS:
        try:
            opened = ShardedSplit(local / split)
        except UserError as error:
            report.fault(str(error), split)
            continue
        splits[split] = opened
        if len(opened) != info.splits[split].samples:
            report.fault(
                f"{local / split / INDEX_FILE}: counts {len(opened)} samples, {DOMAIN_FILE} says "
                f"{info.splits[split].samples}; {PREPARE_AGAIN}",
                split,
            )
        if any((file.zip_name is None) != (info.compression == "none") for file in opened.files):
            report.fault(
                f"{local / split / INDEX_FILE}: its shards are not compressed as {DOMAIN_FILE} says "
                f"({info.compression}); {PREPARE_AGAIN}",
                split,
            )
    if len(splits) == len(SPLITS):
        _check_indexes(local, info, report)
    return splits


def _check_indexes(local: Path, info: DomainInfo, report: DomainReport) -> None:
    state = hashlib.sha256()
    for split in SPLITS:
        state.update(read_bounded(local / split / INDEX_FILE, MAX_INDEX_BYTES))
    if state.hexdigest() != info.content_sha256:
        report.fault(
            f"{local / DOMAIN_FILE}: content_sha256 is not that of the splits' {INDEX_FILE}: they are of "
            f"another version; {PREPARE_AGAIN}"
        )


def check_counts(
    local: Path, info: DomainInfo, split: Split, found: dict[str, int], report: DomainReport
) -> None:
    """Compare what all shards of a split hold together; ``found`` has ``tokens`` and ``documents``."""
    for what, count in found.items():
        said = getattr(info.splits[split], what)
        if count != said:
            report.fault(
                f"{local / DOMAIN_FILE}: says {said} {what}, the shards hold {count}; {PREPARE_AGAIN}", split
            )


def check_side_files(root: str, info: DomainInfo, report: DomainReport, scratch: Path) -> Path | None:
    """Check ``sources.jsonl`` and ``digests.bin``, wherever they lie.

    Returns:
        A local file with the digests, when they are sound.
    """
    kept = sum(split.documents for split in info.splits.values()) + info.documents_unlearnt
    if info.sources_sha256 is not None:
        sources = _Sources()
        if _read(root, info, SOURCES_FILE, info.sources_sha256, sources.line, report):
            dropped = info.documents_duplicate + info.documents_empty + info.documents_contaminated
            if sources.fault or sources.documents != kept + dropped:
                what = sources.fault or (
                    f"counts {sources.documents} documents, {DOMAIN_FILE} {kept + dropped}"
                )
                report.fault(f"{root}/{info.name}/{SOURCES_FILE}: {what}; {PREPARE_AGAIN}")
    if info.digests_sha256 is None:
        return None
    digests = scratch / info.name if is_url(root) else Path(root) / info.name / DIGESTS_FILE
    with open(digests if is_url(root) else os.devnull, "wb") as copy:
        if not _read(root, info, DIGESTS_FILE, info.digests_sha256, copy.write, report):
            return None
    size = digests.stat().st_size
    if size != kept * DIGEST_BYTES:
        report.fault(
            f"{root}/{info.name}/{DIGESTS_FILE}: has {size} bytes, {kept} documents have "
            f"{kept * DIGEST_BYTES}; {PREPARE_AGAIN}"
        )
        return None
    return digests


class _Sources:
    """Reads ``sources.jsonl`` block by block."""

    def __init__(self) -> None:
        self.documents = 0
        self.fault: str | None = None
        self._rest, self._number = b"", 0

    def line(self, block: bytes) -> None:
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._number += 1
            try:
                self.documents += SourceInfo.model_validate(json.loads(line)).documents
            except (ValueError, ValidationError, RecursionError):
                self.fault = self.fault or f"line {self._number} is none of `opmix prepare`"


def _read(root: str, info: DomainInfo, name: str, sha256: str, use: Any, report: DomainReport) -> bool:
    """Pass a file of the domain to ``use``, block by block; whether it is the one of ``domain.json``."""
    path, state = f"{root}/{info.name}/{name}", hashlib.sha256()
    try:
        with _open(path) as file:
            while block := file.read(BLOCK_BYTES):
                state.update(block)
                use(block)
    except FileNotFoundError:
        report.fault(f"{path}: is missing; {PREPARE_AGAIN}")
        return False
    except Exception as error:  # each store's client raises its own
        report.fault(f"{path}: cannot be read ({one_line(error)})")
        return False
    if state.hexdigest() != sha256:
        report.fault(f"{path}: its sha256 is not the one of {DOMAIN_FILE}; {PREPARE_AGAIN}")
        return False
    return True


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if is_url(path):
        import fsspec

        with fsspec.open(path, "rb") as file:
            yield file
        return
    with open(open_ordinary(Path(path)), "rb") as file:
        yield file
