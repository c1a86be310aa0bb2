"""DeepSpeed's own files: checkpoints beside the common ones, and what is offloaded to NVMe."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opmix_dist.atomic import write_bytes
from opmix_dist.distributed import PeerError, World
from opmix_dist.engines.deepspeed_config import Settings
from opmix_dist.errors import UserError

log = logging.getLogger(__name__)
_OFFLOADED = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
"""DeepSpeed's sections and our settings."""


def save_native(engine: Any, folder: Path, tag: str, world: World) -> None:
    """Write DeepSpeed's checkpoint into ``folder / tag``. Collective over the trainer ranks.

    One that cannot be written, on whatever rank, is logged and removed, and training goes on: no resume
    reads it.

    Args:
        engine: DeepSpeed's.
    """
    try:
        world.agree(_make(folder / tag))
        world.agree(_save(engine, folder, tag))
        world.agree(_name_latest(folder, tag) if world.is_leader else None)
    except PeerError as error:
        if world.is_leader:
            log.warning("DeepSpeed's own checkpoint %s failed, on %s", folder / tag, error)
            shutil.rmtree(folder / tag, ignore_errors=True)


def _make(folder: Path) -> str | None:
    """Why the folder could not be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None


def _name_latest(folder: Path, tag: str) -> str | None:
    """Only now that all ranks have written, which DeepSpeed would not wait for."""
    try:
        write_bytes(folder / "latest", tag.encode())
    except OSError as error:
        return str(error)
    return None


def _save(engine: Any, folder: Path, tag: str) -> str | None:
    """Why this rank could not write its files; collective nevertheless.

    The folder is there, so that nothing fails before the ranks write; from there on they meet in the
    optimizer's epilogue and in a barrier only, where the others wait for a rank that could not.
    """
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter where a disk is full
        if engine._optimizer_has_ckpt_event_epilogue():
            engine.optimizer.checkpoint_event_epilogue()
        dist.barrier()
        return " ".join(str(error).split())
    return None


def require_nvme(settings: Settings) -> None:
    """Compile what reads and writes NVMe, which DeepSpeed does at its first use, and make the folders.

    Args:
        settings: DeepSpeed's.

    Raises:
        UserError: it does not compile here, or a folder cannot be made.
    """
    for section, ours in _OFFLOADED.items():
        offload = settings["zero_optimization"].get(section, {})
        if offload.get("device") == "nvme":
            _require_async_io(f"engine.deepspeed.{ours} nvme")
            if failure := _make(Path(offload["nvme_path"])):
                path = offload["nvme_path"]
                raise UserError(f"engine.deepspeed.nvme_path {path} cannot be used: {failure}")


def _require_async_io(setting: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise UserError(
            f"{setting} needs DeepSpeed's async_io, which does not compile here: install a C++ compiler and "
            "libaio with its headers (package libaio-dev or libaio-devel), or set it to cpu"
        )
    try:
        builder.load(verbose=False)
    except Exception as error:  # of the compiler, the linker or the loader
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{setting} needs DeepSpeed's async_io, which cannot be loaded: {reason}") from None
