"""Importances and anchors on disk: whole tensors by the parameters' names, a safetensors file of each rank.

They are read back by the place of a rank's part, on any number of ranks, in this run or in one that goes on
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from opmix_dist.distributed import PeerError, World
from opmix_dist.engines.base import owners
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import read_record
from opmix_dist.exchange.schemas import Finite, Mixture, Record
from opmix_dist.models.source import CheckpointFiles

Kind = Literal["importance", "anchor"]
KINDS: tuple[Kind, ...] = ("importance", "anchor")
Parts = dict[Kind, dict[str, Tensor]]
"""This rank's part for each parameter, by kind and name."""


class Provenance(Record):
    """COMPLETE.json of a folder of importances: what they were measured on, and how."""

    method: str
    settings: dict[str, str]
    """Those that change the numbers."""
    domains: Mixture
    """Share of each old domain in what was added in this run."""
    samples: dict[str, int] = Field(default_factory=dict)
    earlier: str = ""
    """The run whose importances are within these, or ""."""
    sum: Finite
    """Of all importances: a glance tells whether there are any."""


def write_parts(folder: Path, world: World, engine: SingleEngine, parts: Parts, made: Provenance) -> None:
    """Collective over the trainer ranks.

    Raises:
        UserError: on every rank; it could not be written.
    """
    mine = owners(engine.trained, world.size)
    own: dict[str, Tensor] = {}
    for kind in KINDS:
        for name in engine.trained:
            whole = engine.whole(name, parts[kind][name])  # of one parameter at a time
            if mine[name] == world.rank:
                own[f"{kind}.{name}"] = whole.detach().cpu().clone()

    def index() -> None:
        places = {f"{kind}.{name}": _file(rank, world.size) for kind in KINDS for name, rank in mine.items()}
        files.write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": places})
        files.mark_complete(folder, made.model_dump(mode="json"))

    def make() -> None:
        files.remove_folder(folder)
        folder.mkdir(parents=True)

    _together(world, folder, make if world.is_leader else None)
    _together(
        world, folder, (lambda: save_file(own, folder / _file(world.rank, world.size))) if own else None
    )
    _together(world, folder, index if world.is_leader else None)


def read_parts(folder: Path, engine: SingleEngine) -> Parts:
    """On the parameters' devices.

    Raises:
        UserError: a damaged folder, or one of another model.
    """
    stored = CheckpointFiles(str(folder), local_only=True)
    return {kind: {name: _read(stored, kind, name, engine) for name in engine.trained} for kind in KINDS}


def _read(stored: CheckpointFiles, kind: Kind, name: str, engine: SingleEngine) -> Tensor:
    key, shape = f"{kind}.{name}", engine.trained[name]
    if key not in stored.keys or stored.shape(key) != shape:
        raise UserError(f"{stored.path} does not fit this model at {key}: it is of another one")
    part = engine.parts()[name]
    return stored.read(key, engine.place(name)).to(part.device, torch.float32)


def provenance(folder: Path) -> Provenance:
    """Raises UserError: it was never finished, or is damaged."""
    files.require_complete(folder, "the folder of importances")
    return read_record(folder / files.COMPLETE, Provenance)


def _together(world: World, folder: Path, work: Callable[[], None] | None) -> None:
    """Collective. UserError on every rank where one cannot do its work."""
    failure = None
    try:
        if work is not None:
            work()
    except (OSError, SafetensorError) as error:
        failure = " ".join(str(error).split())
    try:
        world.agree(failure)
    except PeerError as error:
        raise UserError(f"{folder} cannot be written: {error}; resume to try again") from None


def _file(rank: int, ranks: int) -> str:
    return f"importance-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def combined(importances: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> Parts:
    """One quadratic penalty that is the sum of several, but for a constant.

    sum_k F_k (theta - a_k)^2 = F (theta - a)^2 + const with F = sum_k F_k, a = sum_k F_k a_k / F; where F is
    0, a is that of the last.

    Args:
        importances: F_k and a_k by name.
    """
    found: Parts = {"importance": {}, "anchor": {}}
    for name in importances[-1][0]:
        total = torch.stack([F[name] for F, _ in importances]).sum(dim=0)
        weighted = torch.stack([F[name] * a[name] for F, a in importances]).sum(dim=0)
        last = importances[-1][1][name]
        found["importance"][name] = total
        found["anchor"][name] = torch.where(total > 0, weighted / total, last)
    return found
