"""The Method interface: what training may do besides descending the loss of the batch that was read.

The trainer makes one for the run, and calls its hooks on every trainer rank in step. A method never steps
parameters itself: it hands the engine other samples, another loss or changed gradients, and the engine
applies the step, or refuses it where it is bad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opmix_dist.config import RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.distributed import World
from opmix_dist.engines.base import AdjustGradients, BatchLoss, Engine
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.ledger import Ledger
from opmix_dist.models.source import ModelSource


@dataclass(frozen=True)
class MethodAround:
    """What a method may see and use.

    source: of the weights that the run started from.
    history: tokens that the model had read of each domain before this run; those above 0 are its old domains.
    """

    run: RunDir
    config: RunConfig
    world: World
    engine: Engine
    source: ModelSource
    catalogue: Catalogue
    ledger: Ledger
    history: Mapping[str, int]


@dataclass(frozen=True)
class StepWork:
    """What the engine is to do in a step.

    microbatches: as many samples as were read, in their order; of a subclass of TokenBatch, if ``loss`` needs
        more than tokens.
    loss: in place of the cross-entropy of ``microbatches``.
    adjust: changes the gradient.
    """

    microbatches: Sequence[TokenBatch]
    loss: BatchLoss | None = None
    adjust: AdjustGradients | None = None


class Method:
    """Plain training, and the hooks of others. All of them are collective over the trainer ranks.

    Whatever a method keeps from step to step either follows from the run's settings and the step's number,
    or lies in ``engine.beside``, which checkpoints hold, so that a resume and a rollback go on exactly.
    """

    def __init__(self, around: MethodAround) -> None:
        """Before a checkpoint is loaded: what belongs into ``engine.beside`` is put there."""
        self.around = around

    def begin(self, step: int) -> None:
        """Once, before the first step of this process.

        Args:
            step: finished steps; 0: the parameters are those that the run started from.
        """

    def prepare(self, step: int, microbatches: Sequence[TokenBatch]) -> StepWork:
        """Before each attempt at a step.

        Args:
            step: its number.
            microbatches: what this replica has read for it, on the CPU; the number of them is the same on
                every rank.
        """
        return StepWork(microbatches)

    def applied(self, step: int) -> None:
        """The step was applied; not called after a bad one, of which nothing was."""

    def numbers(self) -> dict[str, float]:
        """What the log is to tell of the last step, by name; the same on every rank."""
        return {}

    def close(self) -> None:
        """The loop was left, by its end or by an error. Not collective."""
