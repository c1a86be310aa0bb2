"""How long low-rank terms and merging take, measured once per shape and kept for later searches."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import read_record, write_record
from opmix_dist.exchange.schemas import Record
from opmix_dist.pool.candidates import Method
from opmix_dist.pool.trials import Trials

log = logging.getLogger(__name__)


class MethodTimes(Record):
    """Seconds; linear in the number of samples, so that they serve any."""

    measured_for: dict[str, str | int]
    """The shape."""
    lowrank_per_sample: float = Field(gt=0, allow_inf_nan=False)
    """Of one candidate, in a group."""
    merged_per_sample: float = Field(gt=0, allow_inf_nan=False)
    """Of one candidate whose deltas are merged."""
    merge: float = Field(gt=0, allow_inf_nan=False)
    """All deltas into all weights, once for each candidate."""

    def faster(self, samples: int) -> Method:
        """For ``samples`` held-out samples per candidate."""
        merging = self.merge + samples * self.merged_per_sample
        return "merge" if merging < samples * self.lowrank_per_sample else "lowrank"


def cache_folder() -> Path:
    """Of this user: XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "opmix" / "method_times"


def method_times(
    trials: Trials,
    shape: Mapping[str, str | int],
    *,
    lowrank: tuple[int, int],
    merged: int,
    folder: Path,
) -> MethodTimes:
    """Those that were kept for this very shape, or else measured now and kept.

    Args:
        shape: all that the times depend on: device, versions, sizes of model, adapters and passes.
        lowrank: candidates and samples of each in a pass; merged: samples in a pass.
        folder: a file per shape, so that searches that measure at the same time do not write one another's.
    """
    shape = {**shape, "joint": lowrank[0], "lowrank_batch": lowrank[1], "merged_batch": merged}
    path = folder / f"{hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:32]}.json"
    kept = _read(path, shape)
    if kept is not None:
        return kept
    joint, batch = lowrank
    found = MethodTimes(
        measured_for=shape,
        lowrank_per_sample=trials.seconds(lambda: trials.run("lowrank", joint, batch)) / (joint * batch),
        merge=(merge := trials.seconds(trials.merge)),
        merged_per_sample=max(trials.seconds(lambda: trials.run("merge", 1, merged)) - merge, 1e-9) / merged,
    )
    try:
        write_record(path, found)
    except OSError as error:  # a home that cannot be written to: the next search measures again
        log.warning("measured times cannot be kept in %s: %s", path, error)
    return found


def _read(path: Path, shape: Mapping[str, str | int]) -> MethodTimes | None:
    try:
        if not path.exists():
            return None
        found = read_record(path, MethodTimes)
    except (UserError, OSError) as error:
        log.warning("%s: measured again", error)
        return None
    return found if found.measured_for == shape else None
