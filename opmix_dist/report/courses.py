"""What is compared: a course of training, which is one run or the stages of a lifecycle in their order.

Everything here is of runs that have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from opmix_dist.config import RunConfig
from opmix_dist.errors import UserError
from opmix_dist.exchange.heldout import FILE as HELD_OUT
from opmix_dist.exchange.heldout import HeldOutLosses, SampleLosses
from opmix_dist.exchange.lifecycles import is_lifecycle, stage_folders
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.exchange.schemas import MixtureRecord, PhaseCost, Summary
from opmix_dist.exchange.scores import FILE as SCORES
from opmix_dist.exchange.scores import Scores
from opmix_dist.report.compute import add_up
from opmix_dist.report.transfer import Matrix
from opmix_dist.train.state import STATE_FILE, TrainerState

LOSS, ERROR = "loss, nats per token", "task error rate"
END = "end"
"""What a run alone is called among the stages, so that its folder's name plays no part."""


@dataclass(frozen=True)
class Stage:
    """A run that has ended."""

    name: str
    run: RunDir
    config: RunConfig
    summary: Summary
    mixtures: list[MixtureRecord]
    before: dict[str, float]
    """Held-out loss by domain before the first step; empty where it was not measured."""
    costs: dict[str, PhaseCost]
    """By phase, with those of searches that proposed."""
    uncounted: list[str]
    """Searches that left no proposal, whose cost is not known."""
    samples: dict[str, SampleLosses]
    """Losses of the held-out samples at the end, by domain; empty where they were not kept."""
    errors: dict[str, float]
    """Error rate on the tasks of each domain at the end; empty where none were scored."""
    content: dict[str, str] | None
    """Hash of each domain's documents; None: no checkpoint is left that tells."""


@dataclass(frozen=True)
class Course:
    """A run, or the stages of a lifecycle."""

    path: Path
    stages: list[Stage]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def seed(self) -> int:
        return self.stages[0].config.seed

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def tokens(self) -> int:
        """Read by the model that stands at the end, also before the first stage. Where stages start anew
        (retraining), only the last one's."""
        return self.last.summary.tokens + sum(self.last.summary.history.values())

    @cached_property
    def costs(self) -> dict[str, PhaseCost]:
        """By phase over all stages, the searches' together."""
        return add_up(stage.costs for stage in self.stages)

    @property
    def uncounted(self) -> list[str]:
        """Searches whose cost is not known."""
        several = len(self.stages) > 1
        return [
            f"search {name} of {stage.name}" if several else f"search {name}"
            for stage in self.stages
            for name in stage.uncounted
        ]

    @cached_property
    def losses(self) -> Matrix:
        """Held-out losses after each stage."""
        after = [stage.summary.final_loss for stage in self.stages]
        return self._matrix(LOSS, self.stages[0].before, after)

    @cached_property
    def errors(self) -> Matrix:
        """Error rates on tasks after each stage; of no domain where none were scored."""
        return self._matrix(ERROR, {}, [stage.errors for stage in self.stages])

    def _matrix(
        self, metric: str, before: Mapping[str, float], after: Sequence[Mapping[str, float]]
    ) -> Matrix:
        tokens = [stage.summary.domain_tokens for stage in self.stages]
        names = [stage.name for stage in self.stages]
        return Matrix.of(metric, names, before, after, tokens, self.stages[0].summary.history)


def read_course(path: Path) -> Course:
    """Of a run's folder, or of a lifecycle's.

    Raises:
        UserError: neither, a run has not ended, or a file is invalid; names it.
    """
    if is_lifecycle(path):
        return Course(path, [read_stage(folder, folder.name) for folder in stage_folders(path)])
    return Course(path, [read_stage(path, END)])


def read_stage(path: Path, name: str) -> Stage:
    """Raises UserError as :func:`read_course`."""
    run = RunDir(path)
    config = run.config()
    if not run.summary_file.exists():
        raise UserError(f"{path} has not ended: leave it out, or wait for its summary.json")
    summary = run.summary()
    searches, uncounted = _search_costs(run)
    first = run.eval_lines()[:1]
    return Stage(
        name=name,
        run=run,
        config=config,
        summary=summary,
        mixtures=run.mixtures(),
        before=first[0].loss if first and first[0].step == 0 else {},
        costs=add_up([summary.costs, *searches]),
        uncounted=uncounted,
        samples=_samples(run),
        errors=_errors(run),
        content=_content(run),
    )


def _search_costs(run: RunDir) -> tuple[list[dict[str, PhaseCost]], list[str]]:
    """Ledgers of the searches that proposed, and the names of the others: what a pool wrote may be anything,
    and is no reason to compare nothing."""
    ledgers, uncounted = [], []
    for search in run.search_dirs():
        try:
            costs = search.proposal().costs
        except UserError:
            uncounted.append(search.name)
        else:
            ledgers.append({f"search: {phase}": cost for phase, cost in costs.items()})
    return ledgers, uncounted


def _samples(run: RunDir) -> dict[str, SampleLosses]:
    file = run.eval_file.with_name(HELD_OUT)
    return read_record(file, HeldOutLosses).domains if file.exists() else {}


def _errors(run: RunDir) -> dict[str, float]:
    file = run.path / SCORES
    return read_record(file, Scores).by_domain() if file.exists() else {}


def _content(run: RunDir) -> dict[str, str] | None:
    steps = run.complete_checkpoints()
    return read_record(run.checkpoint(steps[-1]) / STATE_FILE, TrainerState).content if steps else None
