"""Tasks that searches have chosen mixtures by: on these, what came of it looks better than it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from opmix_dist.errors import UserError
from opmix_dist.exchange.history import start_run
from opmix_dist.exchange.lifecycles import is_lifecycle, runs_in
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.exchange.searched_tasks import FILE, SearchedTasks
from opmix_dist.tasks.records import Task


def searched_digests(places: Iterable[Path]) -> set[str]:
    """Digests of all tasks that searches chose by, in runs or stages of lifecycles, and in all runs that
    these go on from (``start.run``).

    Raises:
        UserError: a folder is neither, or a run that one goes on from is not there; or a search of error
            rates does not tell its tasks.
    """
    found: set[str] = set()
    for run in _with_earlier(places):
        for search in run.search_dirs():
            if (search.path / FILE).exists():
                record = read_record(search.path / FILE, SearchedTasks)
                found.update(*record.digests.values())
            elif search.proposal_file.exists() and search.proposal().error_rates:
                raise UserError(f"{search.path} has no {FILE}: nothing tells by which tasks it chose")
    return found


def _with_earlier(places: Iterable[Path]) -> Iterator[RunDir]:
    """Each once."""
    waiting = [run for place in places for run in _runs(place)]
    met: set[Path] = set()
    while waiting:
        run = waiting.pop()
        if (path := run.path.resolve()) in met:
            continue
        met.add(path)
        earlier = start_run(run.any_config())
        if earlier is not None and not earlier.config_file.is_file():
            raise UserError(
                f"{run.path} goes on from {earlier.path}, which is no run directory: put it there, since "
                "its searches may have chosen by tasks too"
            )
        waiting += [] if earlier is None else [earlier]
        yield run


def _runs(place: Path) -> list[RunDir]:
    """Of a lifecycle, those that have begun."""
    runs = runs_in(place)
    return [run for run in runs if run.config_file.is_file()] if is_lifecycle(place) else runs


@dataclass(frozen=True)
class Unseen:
    """What is left of a file's tasks: numbers of the lines, from 1, and the tasks; left_out: how many others
    there are."""

    numbers: list[int]
    tasks: list[Task]
    left_out: int

    @classmethod
    def of(cls, file: str, tasks: Sequence[Task], seen: AbstractSet[str]) -> Unseen:
        """Those whose digest is not in ``seen``; UserError where none is left."""
        kept = [(number, task) for number, task in enumerate(tasks, 1) if task.digest not in seen]
        if not kept:
            raise UserError(
                f"searches chose by all {len(tasks):,} tasks of {file}, so none is left to score: add tasks, "
                "or lower search.tasks.per_domain and search again"
            )
        return cls([number for number, _ in kept], [task for _, task in kept], len(tasks) - len(kept))

    def first(self, count: int | None) -> Unseen:
        """At most so many of them; None: all."""
        return Unseen(self.numbers[:count], self.tasks[:count], self.left_out)
