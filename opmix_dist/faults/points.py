"""Named points at which a planned fault may happen. Without a plan, a point is one comparison with None."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from opmix_dist.faults.injector import Injector

PLAN_VARIABLE = "OPMIX_FAULTS"
"""Environment variable that names the plan's file."""

POINTS = {
    "ingest.read": "documents of a chunk were surveyed",
    "ingest.write": "documents of a chunk were encoded and written",
    "ingest.publish": "a domain's files are whole, its folder has not its name yet",
    "train.step": "before a step's batch is read; step: the number of finished steps",
    "train.gradient": "a number that scales the gradient, which a fault makes NaN; step as train.step",
    "train.evaluate": "before an evaluation of the held-out samples",
    "mixture.record": "a policy has decided, nothing of it is on disk",
    "mixture.switch": "a decision is on disk, nothing follows it yet",
    "checkpoint.begin": "before a checkpoint's folder is made",
    "checkpoint.write": "a rank's files of a checkpoint are written, in the background",
    "checkpoint.complete": "all ranks have written, the completion marker is not there",
    "model.begin": "before a folder is made; detail: snapshots or export",
    "model.write": "before a rank writes its file of a snapshot or an export, in the background",
    "model.complete": "all ranks have written, the completion marker is not there",
    "search.request": "a snapshot is complete, the request is not written",
    "search.probing": "work on probes; step: steps of a probe that are done",
    "probe.save": "a probe is trained, not written; detail: its component",
    "search.evaluating": "work on candidates; step: samples that are done",
    "search.fitting": "all candidates are evaluated, nothing is concluded",
    "search.proposed": "the proposal is written, the status does not say so yet",
    "job.summary": "the model is exported, summary.json is not written",
}
"""What has happened at each point, and what has not."""
SPOILABLE = ("train.gradient",)
"""Points that hold a number, and take a NaN as their fault."""

N = TypeVar("N", bound=float)
_injector: Injector | None = None


def install(role: str, rank: int) -> None:
    """Read the plan, if the environment names one, for this process.

    Raises:
        UserError: the plan cannot be read, or names a point or a kind that there is not.
    """
    global _injector
    path = os.environ.get(PLAN_VARIABLE)
    if path:
        from opmix_dist.faults.injector import Injector

        _injector = Injector.open(path, role, rank)


def point(name: str, *, step: int = 0, detail: str = "") -> None:
    """Something may go wrong here.

    Raises:
        InjectedError, OSError: the plan says so.
    """
    if _injector is not None:
        _injector.reach(name, step, detail)


def spoiled(name: str, number: N, *, step: Callable[[], int]) -> N:
    """``number``, or NaN where the plan says so.

    Args:
        step: asked where there is a plan only: it may lie on a GPU.
    """
    if _injector is not None and _injector.spoils(name, step()):
        return cast(N, float("nan"))
    return number
