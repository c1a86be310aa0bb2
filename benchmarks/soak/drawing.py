"""Which faults a soak has: drawn from a seed, so that the same command has the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opmix_dist.faults.plan import Fault

STEPS, SEARCH_STEP, PROBE_STEPS = 12, 4, 10
DOMAINS = ("json", "prose", "python")
OUTSIDE = "outside"
"""Phase of the signals that come from outside of the job."""


@dataclass(frozen=True)
class Spot:
    """A point with what may be varied there.

    searching: on the ranks that search, which are the pool's, or the trainers'.
    leader: only the first rank comes here.
    steps: the fault is at one of these.
    """

    point: str
    details: tuple[str, ...] = ("",)
    steps: tuple[int, int] = (0, 1)
    searching: bool = False
    leader: bool = False


def _model(detail: str) -> tuple[Spot, ...]:
    return (
        Spot("model.begin", (detail,), leader=True),
        Spot("model.write", (detail,)),
        Spot("model.complete", (detail,), leader=True),
    )


PHASES: dict[str, tuple[Spot, ...]] = {
    "training": (
        Spot("train.step", steps=(0, STEPS)),
        Spot("train.evaluate"),
        Spot("train.gradient", steps=(SEARCH_STEP + 1, STEPS)),
    ),
    "checkpoint": (
        Spot("checkpoint.begin", steps=(0, STEPS), leader=True),
        Spot("checkpoint.write"),
        Spot("checkpoint.complete", steps=(0, STEPS), leader=True),
    ),
    "snapshot": (*_model("snapshots"), Spot("search.request", leader=True)),
    "probe": (
        Spot("search.probing", steps=(0, PROBE_STEPS), searching=True),
        Spot("probe.save", ("old", *DOMAINS), searching=True),
    ),
    "evaluation": (Spot("search.evaluating", steps=(0, 60), searching=True),),
    "fit": (Spot("search.fitting", searching=True),),
    "proposal": (Spot("search.proposed", searching=True),),
    "switch": (
        Spot("mixture.record", steps=(SEARCH_STEP, SEARCH_STEP + 1)),
        Spot("mixture.switch", steps=(SEARCH_STEP, SEARCH_STEP + 1)),
    ),
    "export": (*_model("export"), Spot("job.summary", leader=True)),
}
SEARCH_PHASES = ("snapshot", "probe", "evaluation", "fit", "proposal")
FAILING_PHASES = SEARCH_PHASES[:3]
"""Where an error, unlike a death, fails the search for good."""
ORDER = (
    "probe", "training", "switch", "checkpoint", "fit", "export", OUTSIDE, "snapshot", "training",
    "checkpoint", "proposal", "export", "switch", "evaluation", "probe", OUTSIDE,
)  # fmt: skip
"""Jobs take their phases from here in turn."""
INGEST = (Spot("ingest.read"), Spot("ingest.write"), Spot("ingest.publish"))
KINDS = ("crash",) * 3 + ("exception",) * 2 + ("oserror",) * 2 + ("exit", "slow", "hang")
VICTIMS = ("launcher", "trainer", "pool worker")


@dataclass(frozen=True)
class Outside:
    """SIGKILL, from outside, to a process of the launch once it has finished ``step`` steps."""

    id: str
    victim: str
    step: int


@dataclass(frozen=True)
class Episode:
    """A job and its faults.

    trainers, pool: ranks; 0 of the pool: the trainer searches itself.
    """

    number: int
    trainers: int
    pool: int
    faults: tuple[Fault, ...]
    phases: dict[str, str]
    """Of each fault, by its id."""
    outside: tuple[Outside, ...] = ()

    @property
    def ids(self) -> list[str]:
        return [fault.id for fault in (*self.faults, *self.outside)]


def draw_job(seed: int, number: int, faults: int) -> Episode:
    """Every third job has one process."""
    rng = np.random.default_rng([seed, number])
    trainers, pool = (1, 0) if number % 3 == 2 else (2, 1)
    chosen = [ORDER[(number * faults + i) % len(ORDER)] for i in range(faults)]
    alone = sum(phase in SEARCH_PHASES for phase in chosen) == 1
    drawn, outside, phases = [], [], {}
    for i, phase in enumerate(chosen):
        name = f"e{number}-{i}-{phase}"
        phases[name] = phase
        if phase == OUTSIDE:
            victims = VICTIMS if pool else VICTIMS[:2]
            outside.append(Outside(name, str(rng.choice(victims)), int(rng.integers(1, STEPS - 1))))
        else:
            spot = PHASES[phase][rng.integers(len(PHASES[phase]))]
            may_fail = alone or phase not in FAILING_PHASES
            drawn.append(_draw(rng, name, spot, trainers, pool, may_fail_search=may_fail))
    return Episode(number, trainers, pool, tuple(drawn), phases, tuple(outside))


def _draw(
    rng: np.random.Generator, name: str, spot: Spot, trainers: int, pool: int, *, may_fail_search: bool
) -> Fault:
    """``may_fail_search``: else a search that fails would hide faults that come after it."""
    kinds: Sequence[str] = ("nan",) if spot.point == "train.gradient" else KINDS
    if not may_fail_search:
        kinds = [kind for kind in kinds if kind not in ("exception", "oserror")]
    if trainers == 1:  # nobody is there to notice
        kinds = [kind for kind in kinds if kind != "hang"]
    in_pool = spot.searching and pool > 0
    return Fault.model_validate(
        {
            "id": name,
            "point": spot.point,
            "kind": str(rng.choice(list(kinds))),
            "role": "pool" if in_pool else "trainer",
            "rank": 0 if spot.leader or in_pool else int(rng.integers(trainers)),
            "step": int(rng.integers(*spot.steps)),
            "detail": str(rng.choice(list(spot.details))),
            "seconds": 2.0,
        }
    )


def draw_ingest(seed: int, number: int) -> Episode:
    """One fault at each point of ``opmix prepare``."""
    rng = np.random.default_rng([seed, number, 1])
    kinds = [kind for kind in KINDS if kind != "hang"]
    faults, phases = [], {}
    for i, spot in enumerate(INGEST):
        name = f"i{number}-{i}-ingest"
        phases[name] = "ingest"
        fault = {"id": name, "point": spot.point, "kind": str(rng.choice(kinds)), "role": "ingest"}
        faults.append(Fault.model_validate(fault | {"seconds": 2.0}))
    return Episode(number, 0, 0, tuple(faults), phases)
