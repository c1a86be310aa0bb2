"""Full training checkpoints through torch DCP, written while training goes on.

Their format is that of :meth:`~opmix_dist.engines.base.Engine.state_dict`, the same for all engines.

A checkpoint is a fresh folder that counts once its completion marker is there; the marker is the last file
written. DCP's ``.metadata`` and its non-tensor entries are pickles: they are read through an unpickler that
admits DCP's own metadata types only, and through ``weights_only`` loading.
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from opmix_dist.config import CheckpointConfig
from opmix_dist.distributed import World
from opmix_dist.engines.base import KINDS, Engine, Kind
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.train.state import TrainerState

log = logging.getLogger(__name__)
STATE_FILE = "trainer.json"


class Checkpointer:
    """Saves and restores engine and trainer state. Building it is collective over the trainer ranks."""

    def __init__(self, run: RunDir, config: CheckpointConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        # Its own group: the collectives of a save in the background would meet training's in the default one.
        self.group = dist.new_group(backend="gloo")
        self._pending: tuple[int, Future[Any]] | None = None

    def save(self, engine: Engine, state: TrainerState) -> None:
        """Collective. Returns when the state has been copied; a save before it has ended by then.

        A save that fails (disk full) is logged and leaves no readable checkpoint; training goes on.
        """
        self.wait()
        folder = self.run.checkpoint(state.step)
        failure = self.world.share_text(self._begin(folder, state) if self.world.is_leader else None)
        if failure:
            log.warning("the checkpoint of step %d failed: %s", state.step, failure)
            return
        engine.save_beside(folder)
        future = dcp.async_save(engine.state_dict(), checkpoint_id=folder, process_group=self.group)
        assert isinstance(future, Future)
        step = state.step  # `state` moves on with training, before the save has ended
        self._pending = (step, future)
        if self.world.is_leader:
            self._finished = threading.Event()
            future.add_done_callback(lambda done: self._finish(step, done))
        if not self.config.asynchronous:
            self.wait()

    def _begin(self, folder: Path, state: TrainerState) -> str:
        """On the leader: a fresh folder with the trainer's state; why it could not be made, or ""."""
        try:
            files.remove_folder(folder)
            write_record(folder / STATE_FILE, state)
        except OSError as error:
            return str(error)
        return ""

    def _finish(self, step: int, done: Future[Any]) -> None:
        """On the leader, in the saving thread. DCP's coordinator is done when every rank has written."""
        try:
            if done.exception() is None:  # else wait() reports it
                files.mark_complete(self.run.checkpoint(step), {"step": step})
                for old in self.run.complete_checkpoints()[: -self.config.keep]:
                    files.remove_folder(self.run.checkpoint(old))
        except OSError as error:
            log.warning("the checkpoint of step %d could not be completed: %s", step, error)
        finally:
            self._finished.set()

    def wait(self) -> None:
        """Let a save in the background end; collective in the sense that all ranks wait for theirs."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
            if self.world.is_leader:
                self._finished.wait()
        except Exception as error:  # whatever the storage raised: training must go on
            log.warning("the checkpoint of step %d failed and is not used: %s", step, error)

    def newest(self) -> int | None:
        """Collective. Step of the newest complete checkpoint; the leader removes unfinished ones."""
        step = -1
        if self.world.is_leader:
            for folder in self.run.incomplete_checkpoints():
                log.info("removing %s, which was never finished", folder)
                files.remove_folder(folder)
            step = max(self.run.complete_checkpoints(), default=-1)
        step = int(self.world.share([step] if self.world.is_leader else None)[0])
        return None if step < 0 else step

    def load(self, engine: Engine, step: int) -> TrainerState:
        """Collective. Restore the engine, whatever engine wrote it, on any number of trainer ranks: with the
        optimizer's state where it is that of the same optimizer, parameters only otherwise. The log says
        which.

        Raises:
            UserError: the checkpoint is unfinished, lacks what the model has, or its files are not what a
                checkpoint may hold.
        """
        folder = self.run.checkpoint(step)
        files.require_complete(folder, "checkpoint")
        state = read_record(folder / STATE_FILE, TrainerState)
        same = state.optimizer == engine.optimizer_name
        failure = None
        if self.world.is_leader:
            failure = _lacking(folder, engine.shapes, KINDS if same else KINDS[:1])
        if text := self.world.share_text(failure):
            raise UserError(text)

        def read(part: dict[str, Any]) -> None:
            dcp.load(part, storage_reader=SafeReader(folder), planner=SafePlanner(), process_group=self.group)

        try:
            engine.load_state(read, optimizer=same)
        except dcp.api.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise UserError(
                f"cannot load the checkpoint {folder} ({first}): delete it to resume from the one before"
            ) from None
        if self.world.is_leader:
            log.info("%s", _told(state, engine))
        return state


def _told(state: TrainerState, engine: Engine) -> str:
    """Who continues whose checkpoint, and with what."""
    ours = engine.optimizer_name
    taken = f"parameters and {ours}'s state"
    if state.optimizer != ours:
        taken = f"parameters only, since it holds the state of {state.optimizer}: {ours} starts anew"
    return (
        f"checkpoint of step {state.step}, written by {state.engine or 'an engine that it does not name'} on "
        f"{state.world_size} rank(s), continued by {engine.layout} on {engine.world.size}: {taken}"
    )


def _lacking(folder: Path, shapes: Mapping[str, torch.Size], kinds: Sequence[Kind]) -> str:
    """What a checkpoint lacks of ``kinds`` of all parameters, for the user, or ""."""
    try:
        found = SafeReader(folder).read_metadata().state_dict_metadata
    except (UserError, OSError, EOFError, pickle.UnpicklingError) as error:
        return f"cannot load the checkpoint {folder} ({error}): delete it to resume from the one before"
    for kind in kinds:
        if not any(key.startswith(f"{kind}.") for key in found):
            return (
                f"the checkpoint {folder} has no `{kind}`: it is of another version's format. Resume with "
                "that version, or begin another run with model.checkpoint set to a snapshot or an export of "
                "this one"
            )
        for name, shape in shapes.items():
            entry = found.get(f"{kind}.{name}")
            size = entry.size if isinstance(entry, TensorStorageMetadata) else None
            if size != shape:
                what = "missing" if size is None else f"of shape {tuple(size)}"
                return (
                    f"the checkpoint {folder} is of another model: {kind} {name} is {what}, not of shape "
                    f"{tuple(shape)}"
                )
    return ""


_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    (_DCP_METADATA, "Metadata"),
    (_DCP_METADATA, "MetadataIndex"),
    (_DCP_METADATA, "TensorStorageMetadata"),
    (_DCP_METADATA, "TensorProperties"),
    (_DCP_METADATA, "ChunkStorageMetadata"),
    (_DCP_METADATA, "BytesStorageMetadata"),
    (_DCP_METADATA, "StorageMeta"),
    (_DCP_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ADMITTED and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader, with metadata restricted to DCP's own types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        if not file.is_file() or file.stat().st_size > files.MAX_JSON_BYTES:
            raise UserError(f"{file} is missing or too large")
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"{file} does not hold checkpoint metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{file} names a file outside of its folder: {info.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, with non-tensor entries loaded as plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)  # raises on anything but plain data
        checked = io.BytesIO()
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
