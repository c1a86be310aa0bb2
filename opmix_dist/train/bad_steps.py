"""Steps that must not be applied: which they are, what follows, and the record that a resume follows.

A bad step is one whose loss or gradient is NaN or inf, or whose loss or gradient norm is a spike. No engine
applies it, and it does not count as a step: the next batch makes another attempt at the same one, so learning
rate, AdamW's step count and the number of steps are as they would be without it.

``skip`` leaves its batch out. ``rollback`` takes parameters and moments from the newest checkpoint, and goes
on behind the bad batch: what was read since the checkpoint, and may have led there, is left out too. Both are
on disk before training goes on, by the number of the batch and by the step gone back to.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from opmix_dist.config import TrainConfig
from opmix_dist.distributed import World
from opmix_dist.engines.base import BadStepError, GradientSpikeError, LossSpikeError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import BadStep
from opmix_dist.train.state import TrainerState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """A step's loss, nats per token, and its gradient's norm are a spike above them."""

    loss: float
    grad_norm: float


class BadSteps:
    """The decisions of this run, those of earlier attempts included; the same on every trainer rank.

    left_out: numbers of the batches that are not trained on.
    """

    def __init__(self, run: RunDir, config: TrainConfig, world: World, earlier: Iterable[BadStep]) -> None:
        self.run, self.config, self.world = run, config, world
        self.left_out: set[int] = set()
        self._rollbacks: list[BadStep] = []
        self._in_a_row = 0
        for record in earlier:
            self._remember(record)

    @classmethod
    def open(cls, run: RunDir, config: TrainConfig, world: World) -> BadSteps:
        """Collective. Raises UserError when the leader cannot read the record."""
        text = None
        if world.is_leader:
            text = "\n".join(record.model_dump_json() for record in run.bad_steps())
        lines = world.share_text(text).splitlines()
        return cls(run, config, world, [BadStep.model_validate_json(line) for line in lines])

    def _remember(self, record: BadStep) -> None:
        if record.action == "skip":
            self.left_out.add(record.batch)
        elif record.action == "rollback":
            self._rollbacks.append(record)

    def jump(self, step: int) -> BadStep | None:
        """The last rollback to ``step``: the data go on where it says."""
        return next((record for record in reversed(self._rollbacks) if record.checkpoint == step), None)

    def limits(self, state: TrainerState) -> Limits:
        """Of the next step. As long as the last steps do not fill the window, nothing is a spike."""
        config = self.config
        return Limits(
            loss=_limit(state.recent_losses, config.spike_deviations, config.spike_window),
            grad_norm=_limit(state.recent_grad_norms, config.grad_norm_deviations, config.spike_window),
        )

    def note_good(self, state: TrainerState, loss: float, grad_norm: float) -> None:
        self._in_a_row = 0
        window = self.config.spike_window
        if self.config.spike_deviations is not None:
            state.recent_losses = [*state.recent_losses, loss][-window:]
        if self.config.grad_norm_deviations is not None:
            state.recent_grad_norms = [*state.recent_grad_norms, grad_norm][-window:]

    def note_left_out(self) -> None:
        """A batch was passed over, as was decided before."""
        self._in_a_row += 1

    def decide(
        self,
        error: BadStepError,
        state: TrainerState,
        batch: int,
        domain_loss: Mapping[str, float],
        newest_checkpoint: int | None,
    ) -> BadStep:
        """On every rank alike; the leader brings it to the disk.

        Args:
            state: as the run goes on from it: its loader stands behind the batch, whose tokens are counted.
            batch: its number.
            newest_checkpoint: None: there is none.

        Raises:
            OSError: on the leader; it cannot be recorded.
        """
        action, why = self.config.on_bad_step, ""
        most = self.config.max_bad_steps
        if action == "skip" and self._in_a_row >= most:
            action, why = "stop", f"; {self._in_a_row} batches before it were left out (train.max_bad_steps)"
        if action == "rollback" and newest_checkpoint is None:
            action, why = "stop", "; there is no checkpoint to go back to"
        back = [record for record in self._rollbacks if record.checkpoint == newest_checkpoint]
        if action == "rollback" and len(back) >= most:
            action, why = (
                "stop",
                f"; it went back to step {newest_checkpoint} {len(back)} times (train.max_bad_steps)",
            )
        goes_back = action == "rollback"
        record = BadStep(
            kind=_kind(error),
            action=action,
            step=state.step,
            batch=batch,
            reason=f"{error}{why}",
            domain_loss={name: loss if math.isfinite(loss) else None for name, loss in domain_loss.items()},
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            checkpoint=newest_checkpoint if goes_back else None,
            loader=state.loader if goes_back else None,
            domain_tokens=state.domain_tokens if goes_back else None,
        )
        if self.world.is_leader:
            files.append_jsonl(self.run.events_file, record.model_dump(mode="json"))
            log.warning("step %d, batch %d: %s: %s", state.step, batch, record.reason, action)
        self._remember(record)
        self._in_a_row += 1
        return record


def _limit(recent: list[float], deviations: float | None, window: int) -> float:
    """Numbers above it are a spike."""
    if deviations is None or len(recent) < window:
        return math.inf
    seen = recent[-window:]
    return statistics.fmean(seen) + deviations * statistics.pstdev(seen)


def _kind(error: BadStepError) -> Literal["nan", "spike", "gradient spike"]:
    if isinstance(error, GradientSpikeError):
        return "gradient spike"
    return "spike" if isinstance(error, LossSpikeError) else "nan"
