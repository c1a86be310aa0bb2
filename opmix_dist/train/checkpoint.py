"""Full training checkpoints through torch DCP, written while training goes on.

Their format is that of :meth:`~opmix_dist.engines.base.Engine.state_dict`, the same for all engines.

A checkpoint is a fresh folder that counts once its completion marker is there; the marker is the last file
written, and holds size and checksum of each of the others. A resume takes the newest checkpoint whose files
are as they were written.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from opmix_dist.config import CheckpointConfig
from opmix_dist.distributed import PeerError, World
from opmix_dist.engines.base import KINDS, Engine, Kind
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, damage
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.faults.points import point
from opmix_dist.train.checkpoint_storage import HashingWriter, SafePlanner, SafeReader
from opmix_dist.train.state import STATE_FILE, TrainerState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Saving:
    """A save under way. ``settled`` is set on the leader once the folder is complete, or removed again."""

    step: int
    future: Future[Any]
    settled: threading.Event = field(default_factory=threading.Event)


class Checkpointer:
    """Saves and restores engine and trainer state. Building it is collective over the trainer ranks."""

    def __init__(self, run: RunDir, config: CheckpointConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        # Its own group: the collectives of a save in the background would meet training's in the default one.
        self.group = dist.new_group(backend="gloo", timeout=world.timeout)
        self._saving: _Saving | None = None

    def save(self, engine: Engine, state: TrainerState) -> None:
        """Collective. Returns when the state has been copied; a save before it has ended by then.

        A save that fails (disk full) is logged and its files are removed; training goes on.
        """
        self.wait()
        folder = self.run.checkpoint(state.step)
        failure = self._begin(engine, folder, state)
        if failure:
            if self.world.is_leader:
                self._give_up(state.step, failure)
            return
        writer = HashingWriter(folder, self.world)
        # without it the writer itself would copy the state, as it did before DCP had stagers
        stager = DefaultStager(StagingOptions(False, False, False, False))
        future = dcp.async_save(
            engine.state_dict(), storage_writer=writer, async_stager=stager, process_group=self.group
        )
        assert isinstance(future, Future)
        written = self.world.beside(f"writing {folder}")
        future.add_done_callback(lambda done: stager.close())
        future.add_done_callback(lambda done: written())
        self._saving = saving = _Saving(state.step, future)  # `state` moves on with training
        if self.world.is_leader:
            future.add_done_callback(lambda done: self._settle(saving, writer))
        if not self.config.asynchronous:
            self.wait()

    def _begin(self, engine: Engine, folder: Path, state: TrainerState) -> str:
        """Collective. A fresh folder with the trainer's state; why it could not be made, or ""."""
        failure = self.world.share_text(_make(folder, state) if self.world.is_leader else None)
        if failure:
            return failure
        try:
            engine.save_beside(folder)
        except (OSError, RuntimeError) as error:  # torch's writers turn a full disk into the latter
            failure = str(error)
        return self._agree(failure or None)

    def _settle(self, saving: _Saving, writer: HashingWriter) -> None:
        """On the leader, in the saving thread. DCP's coordinator is done when every rank has written."""
        try:
            self._conclude(saving, writer)
        finally:  # also after an error that nobody foresaw: the next save waits for it
            saving.settled.set()

    def _conclude(self, saving: _Saving, writer: HashingWriter) -> None:
        failure = _reason(saving.future.exception())
        try:
            if not failure:
                point("checkpoint.complete", step=saving.step)
                marker = CheckpointMarker(step=saving.step, files=writer.manifest)
                files.mark_complete(writer.folder, marker.model_dump(mode="json"))
        except OSError as error:
            failure = str(error)
        if failure:
            self._give_up(saving.step, failure)
        else:
            self._prune()

    def _give_up(self, step: int, reason: str) -> None:
        """On the leader. What was written makes room again; the checkpoints before it stay."""
        log.warning("the checkpoint of step %d could not be written and is removed: %s", step, reason)
        _remove(self.run.checkpoint(step))

    def _prune(self) -> None:
        """On the leader. Remove what ``keep`` and ``keep_every_steps`` do not keep."""
        every = self.config.keep_every_steps
        for step in self.run.complete_checkpoints()[: -self.config.keep]:
            if not every or step % every:
                _remove(self.run.checkpoint(step))

    def wait(self) -> None:
        """Let a save in the background end; collective in the sense that all ranks wait for theirs."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        failure = _reason(saving.future.exception())
        if self.world.is_leader:
            saving.settled.wait()  # and has said why it failed, if it did
        elif failure:
            log.debug("the checkpoint of step %d failed: %s", saving.step, failure)

    def newest(self) -> int | None:
        """Collective. Step of the newest checkpoint whose files are as they were written; None: there is none
        at all.

        Of what is newer, the leader removes what was never finished, and sets aside what is damaged.

        Raises:
            UserError: on every rank; there are checkpoints, and all of them are damaged.
        """
        reasons: dict[int, str] = {}
        for step in map(int, self._on_leader(self._finished_steps)):
            reason = self._damage(step)
            if not reason:
                self._on_leader(partial(self._set_aside, reasons, step))
                return step
            reasons[step] = reason
        if reasons:
            raise UserError(
                f"no checkpoint in {self.run.checkpoints} can be read ({_listed(reasons)}): restore one, or "
                "remove the folder to start from step 0"
            )
        return None

    def _finished_steps(self) -> list[int]:
        """On the leader, newest first; what was never finished is removed."""
        for folder in self.run.incomplete_checkpoints():
            log.info("removing %s, which was never finished", folder)
            files.remove_folder(folder)
        return self.run.complete_checkpoints()[::-1]

    def _damage(self, step: int) -> str:
        """Collective. How the checkpoint differs from what was written, or "". Each rank looks at a share of
        the files."""
        folder = self.run.checkpoint(step)
        try:
            marker = read_record(folder / files.COMPLETE, CheckpointMarker)
            if marker.files is None and self.world.is_leader:
                log.warning("%s was written without checksums: it is taken as it is", folder)
            names = sorted(marker.files or {})
            mine = {name: (marker.files or {})[name] for name in names[self.world.rank :: self.world.size]}
            failure = damage(folder, mine, checksums=self.config.verify == "checksums")
        except (UserError, OSError) as error:
            failure = str(error)
        return self._agree(failure)

    def _set_aside(self, reasons: dict[int, str], taken: int) -> list[int]:
        """On the leader. Damaged checkpoints make way under another name; of those, ``keep`` stay."""
        for step, reason in reasons.items():
            aside = self.run.damaged_checkpoint(step)
            files.remove_folder(aside)
            self.run.checkpoint(step).rename(aside)
            log.warning("the checkpoint of step %d is damaged (%s) and set aside as %s", step, reason, aside)
        if reasons:
            lost = max(reasons) - taken
            log.warning("going on from step %d: at least %d steps are lost and done again", taken, lost)
        for old in self.run.damaged_checkpoints()[: -self.config.keep]:
            files.remove_folder(self.run.damaged_checkpoint(old))
        return []

    def load(self, engine: Engine, step: int, *, beside: bool = True) -> TrainerState:
        """Collective. Restore the engine, whatever engine wrote it, on any number of trainer ranks: with the
        optimizer's state where it is that of the same optimizer, parameters only otherwise. The log says
        which.

        Args:
            beside: false: not what a training method keeps, which is another run's.

        Raises:
            UserError: the checkpoint is unfinished, lacks what the model has, or its files are not what a
                checkpoint may hold.
        """
        folder = self.run.checkpoint(step)
        files.require_complete(folder, "checkpoint")
        state = read_record(folder / STATE_FILE, TrainerState)
        same = state.optimizer == engine.optimizer_name
        failure, reader = None, SafeReader(folder)
        if self.world.is_leader:
            failure = _lacking(reader, engine.trained, KINDS if same else KINDS[:1])
        if text := self.world.share_text(failure):
            raise UserError(text)

        def read(part: dict[str, Any]) -> None:
            dcp.load(part, storage_reader=reader, planner=SafePlanner(), process_group=self.group)

        try:
            engine.load_state(read, optimizer=same, beside=beside)
        except CheckpointException as error:
            raise UserError(
                f"cannot load the checkpoint {folder} ({_reason(error)}): delete it to resume from the one "
                "before"
            ) from None
        if self.world.is_leader:
            log.info("%s", _told(state, engine))
        return state

    def _agree(self, failure: str | None) -> str:
        """Collective. The failure of the first rank that has one, or ""."""
        try:
            self.world.agree(failure)
        except PeerError as error:
            return str(error)
        return ""

    def _on_leader(self, work: Callable[[], Sequence[int]]) -> list[float]:
        """Collective. What the leader found, on every rank; its OSError is a UserError on all."""
        found: Sequence[int] = ()
        failure = ""
        if self.world.is_leader:
            try:
                found = work()
            except OSError as error:
                failure = str(error)
        if reason := self._agree(failure or None):
            raise UserError(f"{self.run.checkpoints} cannot be put in order: {reason}; mend its permissions")
        return self.world.share([float(step) for step in found] if self.world.is_leader else None)


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


def _lacking(reader: SafeReader, shapes: Mapping[str, torch.Size], kinds: Sequence[Kind]) -> str:
    """What a checkpoint lacks of ``kinds`` of all parameters, for the user, or ""."""
    folder = reader.path
    try:
        found = reader.read_metadata().state_dict_metadata
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


def _make(folder: Path, state: TrainerState) -> str:
    """Why a fresh folder with the trainer's state could not be made, or ""."""
    try:
        point("checkpoint.begin", step=state.step)
        files.remove_folder(folder)
        write_record(folder / STATE_FILE, state)
    except OSError as error:
        return str(error)
    return ""


def _remove(folder: Path) -> None:
    try:
        files.remove_folder(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)


def _reason(error: BaseException | None) -> str:
    """One line; "" for None. Of what failed on several ranks, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(cause)}"
    return "" if error is None else " ".join(str(error).split()) or type(error).__name__


def _listed(reasons: dict[int, str]) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
