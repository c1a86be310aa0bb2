"""scores.json: error rates of a run's model on tasks, as ``opmix score --json`` prints them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from pydantic import Field

from opmix_dist.exchange.schemas import Finite, Record

FILE = "scores.json"
"""In the run's folder: ``opmix score RUN/export/hf --tasks DATA/tools --json > RUN/scores.json``."""
TASKS_FILE = "tasks.jsonl"
Rate = Annotated[float, Field(ge=0, le=1)]


class TaskScore(Record):
    """Of one kind of task in one file."""

    file: str
    kind: str
    tasks: int = Field(ge=1, le=1 << 40)
    groups: int | None = Field(None, ge=1, le=1 << 40)
    """Whose examples need not be independent; None: ``stderr`` and ``interval`` take all as independent."""
    error: Rate
    stderr: Finite
    interval: tuple[Finite, Finite]

    @property
    def domain(self) -> str:
        """The folder that a domain's tasks lie in, or a file of tasks without its ending."""
        path = PurePath(self.file)
        return path.parent.name if path.name == TASKS_FILE else path.stem


class Scores(Record):
    model: str
    rows: list[TaskScore]
    left_out: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Tasks of each file that searches had chosen by, where these were left out (``--unseen-by``)."""

    def by_domain(self) -> dict[str, float]:
        """Error rate over all tasks of a domain, whatever their kind."""
        wrong: dict[str, float] = {}
        tasks: dict[str, int] = {}
        for row in self.rows:
            wrong[row.domain] = wrong.get(row.domain, 0.0) + row.error * row.tasks
            tasks[row.domain] = tasks.get(row.domain, 0) + row.tasks
        return {name: wrong[name] / tasks[name] for name in wrong}
