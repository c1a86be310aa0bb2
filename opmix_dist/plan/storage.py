"""What a run leaves on disk, and what it copies into the host's memory on the way there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opmix_dist.config import RunConfig
from opmix_dist.engines.single import DTYPES

CHECKPOINT_BYTES = 12
"""Of each parameter: float32, and AdamW's two moments of it."""


@dataclass(frozen=True)
class Storage:
    """Bytes.

    checkpoint: one of them. checkpoints: as many as ``checkpoint.keep``, and the one that is being written.
    written: of all checkpoints of the run, one after the other.
    snapshot, export, probes: what the search starts from, the final model, all adapters.
    host_snapshot, host_checkpoint: on each node, copies that are written while training goes on.
    """

    checkpoint: int
    checkpoints: int
    written: int
    snapshot: int
    export: int
    probes: int
    host_snapshot: int
    host_checkpoint: int

    @property
    def at_once(self) -> int:
        return self.checkpoints + self.snapshot + self.export + self.probes


def storage(
    config: RunConfig, *, parameters: int, adapters: int, trainers: int, ranks_per_node: int
) -> Storage:
    """
    Args:
        adapters: numbers in all probes of the search.
    """
    interval, steps = config.checkpoint.interval_steps, config.train.steps
    count = math.ceil(steps / interval) if interval else 1
    one = CHECKPOINT_BYTES * parameters
    searches = config.mixture.policy == "opmix"
    snapshot = parameters * DTYPES[config.engine.snapshot_dtype].itemsize if searches else 0
    here = min(1.0, ranks_per_node / trainers)
    return Storage(
        checkpoint=one,
        checkpoints=one * min(count, config.checkpoint.keep + 1),
        written=one * count,
        snapshot=snapshot,
        export=4 * parameters,
        probes=4 * adapters,
        host_snapshot=round(snapshot * here),
        host_checkpoint=round(one * here) if config.checkpoint.asynchronous else 0,
    )
