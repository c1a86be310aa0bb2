"""Snapshots and exports: a sharded Hugging Face folder, to which every rank writes a file of its own.

Training stands still while each rank copies its share of the parameters; the copies are written in a thread.
A folder counts once its completion marker is there, which the leader writes when all ranks have written.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine, owners
from opmix_dist.engines.single import SingleEngine
from opmix_dist.exchange import files
from opmix_dist.faults.points import point
from opmix_dist.models.peft_files import write_peft
from opmix_dist.models.source import ModelSource

log = logging.getLogger(__name__)
_POLL_S = 0.02


@dataclass(frozen=True)
class _Writing:
    folder: Path
    marker: dict[str, Any]
    dtype: torch.dtype
    extra: Callable[[Path], object]
    mine: Future[None]


class ModelWriter:
    """Every method is collective over the trainer ranks."""

    def __init__(self, world: World, engine: Engine, source: ModelSource) -> None:
        self.world, self.engine, self.source = world, engine, source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._writing: _Writing | None = None

    def begin(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        marker: dict[str, Any],
        extra: Callable[[Path], object] = lambda folder: None,
    ) -> str:
        """Copy the parameters as they are now and write them in the background, after a folder before it.

        Args:
            folder: of this step; what an earlier attempt has left there is removed.
            marker: content of the completion marker.
            extra: writes further files into the folder, on the leader.

        Returns:
            Why the folder could not be made, or "".
        """
        self._settle()
        failure = self.world.share_text(_make(folder) if self.world.is_leader else None)
        if not failure:
            share = self.engine.share(dtype)
            if self.world.is_leader:  # what the model computes with besides its parameters
                share |= self.source.persistent_buffers()
            file = folder / _file(self.world.rank, self.world.size)
            written = self.world.beside(f"writing {file}")
            mine = self._thread.submit(_write, file, share)
            mine.add_done_callback(lambda _: written())
            self._writing = _Writing(folder, marker, dtype, extra, mine)
        return failure

    def poll(self) -> str | None:
        """None while a rank still writes; then "" once the folder is complete, or why it is not."""
        assert self._writing is not None
        done = self._writing.mine.done()
        error = self._writing.mine.exception() if done else None
        counts = self.world.sum(torch.tensor([int(done), int(error is not None)]))
        if int(counts[0]) < self.world.size:
            return None
        if error is not None:
            log.warning("%s could not be written: %s", self._writing.folder, error)
        writing, self._writing = self._writing, None
        failure = f"{int(counts[1])} of {self.world.size} rank(s) could not write" if counts[1] else ""
        if self.world.is_leader and not failure:
            failure = self._complete(writing)
        elif self.world.is_leader and error is not None:
            failure = str(error)
        return self.world.share_text(failure if self.world.is_leader else None)

    def write(self, folder: Path, **arguments: Any) -> str:
        """:meth:`begin` and wait; why it failed, or ""."""
        return self.begin(folder, **arguments) or self._settle()

    def write_adapter(self, folder: Path) -> str:
        """What ``model.lora`` has trained, in PEFT's format, beside the model that it was trained on; why it
        could not be written, or ""."""
        engine = self.engine
        assert isinstance(engine, SingleEngine)
        assert engine.adapters is not None
        config = engine.adapters.config
        whole = {name: tensor.cpu() for name, tensor in engine._whole("parameter")}
        failure = ""
        if self.world.is_leader:
            try:
                files.remove_folder(folder)
                write_peft(
                    folder,
                    {n: (whole[f"{n}.lora_A"], whole[f"{n}.lora_B"]) for n in engine.adapters.layers},
                    rank=config.rank,
                    alpha=config.alpha,
                    dropout=config.dropout,
                    base_model="" if self.source.weights is None else self.source.weights.path,
                )
                files.mark_complete(folder, {})
            except OSError as error:
                failure = str(error)
        return self.world.share_text(failure if self.world.is_leader else None)

    def _settle(self) -> str:
        """Wait until nothing is being written; why that failed, or ""."""
        failure: str | None = ""
        while self._writing is not None and (failure := self.poll()) is None:
            time.sleep(_POLL_S)
        return failure or ""

    def _complete(self, writing: _Writing) -> str:
        """On the leader."""
        try:
            self.source.save_config(writing.folder, writing.dtype)
            writing.extra(writing.folder)
            files.write_json(writing.folder / SAFE_WEIGHTS_INDEX_NAME, self._index(writing.dtype))
            point("model.complete", detail=writing.folder.parent.name)
            files.mark_complete(writing.folder, writing.marker)
        except OSError as error:
            return str(error)
        return ""

    def _index(self, dtype: torch.dtype) -> dict[str, Any]:
        shapes, ranks = self.engine.shapes, self.world.size
        buffers = self.source.persistent_buffers()
        size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        size += sum(buffer.nbytes for buffer in buffers.values())
        places = owners(shapes, ranks) | dict.fromkeys(buffers, 0)
        return {
            "metadata": {"total_size": size},
            "weight_map": {name: _file(rank, ranks) for name, rank in places.items()},
        }


def _file(rank: int, ranks: int) -> str:
    return f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _make(folder: Path) -> str:
    try:
        point("model.begin", detail=folder.parent.name)
        files.remove_folder(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """In the thread. A rank without a parameter writes no file. Each rank brings its file to the disk, which
    may be that of another node than the leader's."""
    if not tensors:
        return
    point("model.write", detail=file.parent.parent.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    with open(file, "rb") as written:
        os.fsync(written.fileno())
