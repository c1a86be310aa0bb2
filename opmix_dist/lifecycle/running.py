"""Going through the stages of a lifecycle, on every rank of a launch in step."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from opmix_dist.config import RESUME_MAY_CHANGE
from opmix_dist.distributed import STAGE_VARIABLE
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.lifecycles import LIFECYCLE_FILE
from opmix_dist.lifecycle.config import LifecycleConfig, Stage
from opmix_dist.settings import changed_settings, to_yaml
from opmix_dist.stopping import holding_signals
from opmix_dist.telling import tell

log = logging.getLogger(__name__)
ENDED, REFUSED, STOPPED = 0, 2, 75
"""How the process of a stage ends: the run has ended; the user can mend what it said; it was asked to stop
(EX_TEMPFAIL of sysexits.h). Other codes are those of a crash."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def chosen_stages(stages: Sequence[Stage], *, only: str | None, first: str | None) -> list[Stage]:
    """Those to go through.

    Args:
        only: name of the one stage; None: all.
        first: name of the stage to begin with; None: the first.

    Raises:
        UserError: there is no such stage, or the one before it has not ended.
    """
    name = only or first
    if name is None:
        return list(stages)
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(f"there is no stage `{name}`: the lifecycle has {', '.join(names)}")
    at = names.index(name)
    if at and stages[at].config.start.run is not None and not stages[at - 1].has_ended:
        raise UserError(f"stage {name} goes on from {names[at - 1]}, which has not ended: run that first")
    return [stages[at]] if only else list(stages[at:])


def require_same_stages(stages: Sequence[Stage]) -> None:
    """UserError where a stage that has ended was another one than it would be now: those behind it come from
    what it was. Those that are under way are compared when they go on."""
    for stage in stages:
        if not stage.has_ended:
            continue
        changed = changed_settings(stage.run.config(), stage.config, RESUME_MAY_CHANGE)
        if changed:
            raise UserError(
                f"stage {stage.name} has ended with other settings ({', '.join(changed)}): put them back, or "
                "choose another run_dir"
            )


class Lifecycle:
    """The stages on one rank. Signals go to the process of the stage that is under way."""

    def __init__(self, config: LifecycleConfig, stages: Sequence[Stage]) -> None:
        self.path, self.config, self.stages = Path(config.run_dir), config, stages
        self.is_leader = os.environ.get("RANK", "0") == "0"
        self.received = 0
        """Number of the last signal; 0: none."""
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, chosen: Sequence[Stage]) -> int:
        """Go through ``chosen``, but for those that have ended; every rank calls this.

        Returns:
            A code as of the process of a stage: that of the last one.
        """
        if self.is_leader:
            files.write_bytes(self.path / LIFECYCLE_FILE, to_yaml(self.config).encode())
        handlers = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            for stage in chosen:
                if stage.has_ended:
                    self._say(stage, "has ended")
                elif code := self._run(stage):
                    return code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return ENDED

    def _run(self, stage: Stage) -> int:
        joins = f", {', '.join(stage.joins)} join" if stage.joins else ""
        self._say(stage, f"{stage.config.train.steps} steps{joins}")
        with holding_signals():  # the stage gets what comes before it listens
            child = subprocess.Popen(
                [sys.executable, "-m", "opmix_dist.lifecycle.stage", str(os.getpid())],
                stdin=subprocess.PIPE,
                env={**os.environ, STAGE_VARIABLE: stage.name},
            )
            self._child = child
        if self.received:  # between two stages
            child.send_signal(self.received)
        assert child.stdin is not None
        try:
            child.stdin.write(to_yaml(stage.config).encode())
            child.stdin.close()
        except BrokenPipeError:  # it died already, which its code tells
            log.debug("the process of stage %s did not read its configuration", stage.name)
        try:
            code = child.wait()
        finally:
            self._child = None
        # a rank of the pool ends well and at once when it is asked to
        return STOPPED if code == ENDED and self.received and not stage.has_ended else code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._child is not None:
            self._child.send_signal(number)

    def _say(self, stage: Stage, text: str) -> None:
        if self.is_leader:
            at = [one.name for one in self.stages].index(stage.name) + 1
            tell(f"stage {at} of {len(self.stages)}, {stage.name}: {text}")
