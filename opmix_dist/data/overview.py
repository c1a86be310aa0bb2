"""What a prepared folder holds, in numbers: for ``opmix data ls``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opmix_dist.data.catalogue import SPLITS, Catalogue, Packing, SplitInfo
from opmix_dist.data.samples import Compression, DType
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import size_of


@dataclass(frozen=True)
class DomainOverview:
    """One domain, as its description and its indexes have it."""

    name: str
    packing: Packing
    train: SplitInfo
    eval: SplitInfo
    shards: int
    stored_bytes: int
    """Of all shards as they are stored, compressed if they are."""
    here_bytes: int
    """Of the shards that are on this machine: in a cache, or with decompressed copies beside them."""
    compression: Compression
    dtype: DType


def overview(catalogue: Catalogue) -> list[DomainOverview]:
    """The catalogue's domains, in order; reads indexes and sizes, no shard.

    Raises:
        UserError: a damaged index.
    """
    return [_domain(catalogue, name) for name in catalogue.names]


def total(splits: Sequence[SplitInfo]) -> SplitInfo:
    """Their sum."""
    return SplitInfo(
        samples=sum(split.samples for split in splits),
        tokens=sum(split.tokens for split in splits),
        documents=sum(split.documents for split in splits),
    )


def _domain(catalogue: Catalogue, name: str) -> DomainOverview:
    info = catalogue.domains[name]
    splits = [ShardedSplit(catalogue.split_dir(name, split), catalogue.store) for split in SPLITS]
    files = [(split.local, file) for split in splits for file in split.files]
    return DomainOverview(
        name=name,
        packing=info.packing,
        train=info.splits["train"],
        eval=info.splits["eval"],
        shards=len(files),
        stored_bytes=sum(file.zip_bytes if file.zip_name else file.raw_bytes for _, file in files),
        here_bytes=sum(
            max(0, size_of(folder / name))
            for folder, file in files
            for name in {file.raw_name, file.stored_name}
        ),
        compression=info.compression,
        dtype=info.dtype,
    )
