"""Taking a run directory over: one job at a time, and only to go on with what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opmix_dist.config import SharedConfig
from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import HANGS, LAUNCH, RunDir
from opmix_dist.process import lock_run
from opmix_dist.settings import changed_settings


@contextmanager
def open_run(run: RunDir, config: SharedConfig, world: World, may_change: Sequence[str]) -> Iterator[None]:
    """Collective. The leader has checked the run directory, and holds its lock inside.

    Args:
        may_change: settings that may differ from those that the run was started with.

    Raises:
        UserError: on every rank; as of ``lock_run`` and ``check_earlier_attempt``.
    """
    lock, failure = None, None
    try:
        if world.is_leader:
            try:
                lock = lock_run(run.path)
                check_earlier_attempt(run, config, may_change)
            except (UserError, OSError) as error:
                failure = str(error)
        text = world.share_text((failure or "") if world.is_leader else None)
        if text:
            raise UserError(text)
        yield
    finally:
        if lock is not None:
            lock.close()


def check_earlier_attempt(run: RunDir, config: SharedConfig, may_change: Sequence[str]) -> None:
    """UserError where the folder holds something else than an attempt at the same job."""
    if not run.config_file.exists():
        others = [
            p.name for p in run.path.iterdir() if not p.name.startswith(".") and p.name not in (LAUNCH, HANGS)
        ]
        if others:
            raise UserError(f"run_dir {run.path} holds {others[0]} but is no run: choose an empty folder")
        return
    if config.resume == "never":
        raise UserError(f"run_dir {run.path} holds a run and resume is never: choose another folder")
    earlier = run.any_config()
    if type(earlier) is not type(config):
        raise UserError(
            f"run_dir {run.path} holds a job of another kind (opmix train or opmix search): choose another "
            "folder"
        )
    changed = changed_settings(earlier, config, may_change)
    if changed:
        raise UserError(
            f"run_dir {run.path} was started with other settings ({', '.join(changed)}): "
            "put them back to resume it, or choose another run_dir"
        )
