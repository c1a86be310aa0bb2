"""What was measured of candidates, and the work of it: each is simulated once, by one team of ranks.

Sums of single samples are kept, not only losses of domains: differences between candidates have paired
standard errors.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from opmix_dist.data.loader import EvalSet
from opmix_dist.distributed import World
from opmix_dist.models.loss import DomainLosses, losses_by_domain
from opmix_dist.pool.early_stop import EarlyStop
from opmix_dist.pool.evaluation_files import EvaluationFiles, Measured
from opmix_dist.pool.partial import estimated_losses
from opmix_dist.pool.team import Crew, Team

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluations:
    """What was measured of M candidates.

    sums: of the losses of each sample's targets [M, N], nats; gradients: dL_i / du_k [M, D, K], None where
    they were not asked for; targets, domain_ids: of the samples [N].

    seen: the samples of each candidate [M, N] bool where some were stopped early, None: all samples of all.
    What a stopped one lacks is taken from ``reference``, sums [N] (:mod:`opmix_dist.pool.partial`).
    """

    sums: np.ndarray
    gradients: np.ndarray | None
    targets: np.ndarray
    domain_ids: np.ndarray
    num_domains: int
    seen: np.ndarray | None = None
    reference: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[Evaluations]) -> Evaluations:
        """Candidates of one search, one behind the other, without gradients."""
        seen = None
        if any(part.seen is not None for part in parts):
            seen = np.concatenate([part.samples_seen for part in parts])
        references = [part.reference for part in parts if part.reference is not None]
        return dataclasses.replace(
            parts[0],
            sums=np.concatenate([part.sums for part in parts]),
            gradients=None,
            seen=seen,
            reference=references[0] if references else None,
        )

    def clustered(self, clusters: np.ndarray) -> Evaluations:
        """Samples of one cluster put together to one, so that all errors, and resampling, are of clusters:
        their samples need not be independent (ratio of the clusters' sums, as of samples').

        Args:
            clusters: of each sample int64 [N], from 0, each of one domain.

        Raises:
            ValueError: candidates were stopped early, or have gradients.
        """
        if self.seen is not None or self.gradients is not None:
            raise ValueError("clusters are of candidates that saw all samples, without gradients")
        count = int(clusters.max()) + 1
        sums, targets = np.zeros((len(self.sums), count)), np.zeros(count, dtype=self.targets.dtype)
        np.add.at(sums.T, clusters, self.sums.T)
        np.add.at(targets, clusters, self.targets)
        domain_ids = np.zeros(count, dtype=self.domain_ids.dtype)
        domain_ids[clusters] = self.domain_ids
        return dataclasses.replace(self, sums=sums, targets=targets, domain_ids=domain_ids)

    @property
    def samples_seen(self) -> np.ndarray:
        """[M, N] bool."""
        return np.full(self.sums.shape, True) if self.seen is None else self.seen

    @property
    def targets_seen(self) -> np.ndarray:
        """Targets that each candidate was evaluated on, by domain [M, D] int64."""
        found = np.zeros((len(self.sums), self.num_domains), dtype=np.int64)
        np.add.at(found.T, self.domain_ids, np.where(self.samples_seen, self.targets, 0).T)
        return found

    @property
    def stopped(self) -> np.ndarray:
        """Which candidates did not see all samples [M] bool."""
        return ~self.samples_seen.all(axis=1)

    @property
    def losses(self) -> DomainLosses:
        """By domain [M, D]."""
        return self._losses(0.0)

    def changes_from(self, base: Evaluations) -> DomainLosses:
        """Losses minus those of the one candidate ``base`` [M, D], with the errors of such differences: what
        makes a sample hard for both drops out."""
        return self._losses(base.sums)

    def _losses(self, less: np.ndarray | float) -> DomainLosses:
        """Of sums that are lower by ``less`` [1, N]."""
        found = losses_by_domain(self.sums - less, self.targets, self.domain_ids, self.num_domains)
        rows = np.flatnonzero(self.stopped)
        if rows.size:
            assert self.reference is not None
            estimated = estimated_losses(
                (self.sums - less)[rows],
                self.samples_seen[rows],
                np.ravel(self.reference - less),
                self.targets,
                self.domain_ids,
                self.num_domains,
            )
            found.loss[rows], found.stderr[rows] = estimated.loss, estimated.stderr
        return found

    def resampled(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Losses [count, M, D] on samples drawn with replacement, as many of each domain as it has with
        targets; the same samples for all candidates. The change of a stopped one from the reference is that
        on what it saw of the draw, and where that is nothing, on what it saw."""
        found = np.zeros((count, len(self.sums), self.num_domains))
        for d in range(self.num_domains):
            rows = np.flatnonzero((self.domain_ids == d) & (self.targets > 0))
            if rows.size:
                drawn = rng.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=count)
                found[..., d] = self._drawn(rows, drawn)
        return found

    def _drawn(self, rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Losses [count, M] of one domain, of its samples ``rows`` as often as ``drawn`` [count, n] says."""
        targets = self.targets[rows]
        totals = (drawn @ targets)[:, None]
        found = drawn @ self.sums[:, rows].T / totals
        stopped = np.flatnonzero(self.stopped)
        if stopped.size:
            assert self.reference is not None
            seen, reference = self.samples_seen[np.ix_(stopped, rows)], self.reference[rows]
            changes = np.where(seen, self.sums[np.ix_(stopped, rows)] - reference, 0.0)
            weights = np.where((drawn @ seen.T)[..., None] > 0, drawn[:, None], 1)  # [count, m, n]
            change = (weights * changes).sum(axis=2) / (weights * seen * targets).sum(axis=2)
            found[:, stopped] = (drawn @ reference)[:, None] / totals + change
        return found


Measurement = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""Of m candidates: sums [m, N]; seen [m, N] bool, None: all; gradients [m, D, K], None: not asked for."""
Simulate = Callable[[np.ndarray, bool, EarlyStop | None, Team], Measurement]
"""U [m, K], whether to take gradients, which candidates to stop early, and the team all of whose ranks call
it, to what is measured of them."""


@dataclass
class Work:
    """What was simulated, by this process or an attempt before it, each candidate once."""

    candidates: int = 0
    samples: int = 0


class Evaluator:
    """Simulates candidates, each once, divided over the teams of ``crew``.

    Args:
        folder: of the files.
        identity: digest of all that the losses depend on besides the coefficients; the same on all ranks.
        joint: candidates that are simulated together, at most.
        passes: of a group of them, without or with gradients.
        together: runs what may fail on one rank, and raises on all ranks then.
        simulate: communicates within the team that it is given only.
        on_progress: told the samples of candidates that were read, and need not be simulated.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        heldout: EvalSet,
        num_domains: int,
        *,
        world: World,
        crew: Crew,
        joint: int,
        passes: Callable[[bool], int],
        together: Callable[[Callable[[], None]], None],
        simulate: Simulate,
        on_progress: Callable[[int], None] = lambda samples: None,
    ) -> None:
        self.world, self.crew, self.joint, self.passes = world, crew, joint, passes
        self.together, self.simulate = together, simulate
        self.on_progress = on_progress
        self.targets, self.domain_ids = heldout.batch.targets.numpy(), heldout.domain_ids.numpy()
        self.num_domains = num_domains
        self.files = EvaluationFiles(folder, identity, self.targets)
        self.told_idle: set[tuple[int, int]] = set()
        self.asked: set[str] = set()
        self.counted: set[tuple[str, bool]] = set()
        self.work = {False: Work(), True: Work()}
        """Without and with gradients."""
        self.earlier_seconds = 0.0

    def evaluate(
        self, U: np.ndarray, *, gradients: bool = False, stopping: EarlyStop | None = None
    ) -> Evaluations:
        """Collective. Measure the rows of U [M, K], or read them where they were measured.

        A group of candidates that are simulated together is simulated again as a whole: the shapes of its
        products, and with them the last digits of its losses, do not depend on where an attempt was killed.
        What this process was asked before is in no group: the asks of a search come in the same order in
        every attempt.

        Args:
            stopping: which candidates need not see all samples. Without it they have to: those that were
                stopped before are simulated again, and both are kept, so that each ask finds its own.
        """
        groups = self._groups(U, gradients)
        here: dict[int, Measured] = {}
        self.together(
            lambda: here.update(self._read(U, gradients, stopping)) if self.world.is_leader else None
        )
        plan = ",".join(str(i) for i, group in enumerate(groups) if not here.keys() >= set(group))
        text = self.world.share_text(plan if self.world.is_leader else None)  # one view of the file system
        missing = [groups[int(i)] for i in text.split(",") if i]
        for group in missing:
            for row in group:
                here.pop(row, None)
        self.on_progress(len(here) * len(self.targets) // self.crew.team.count)
        self._count_earlier(here.values())
        passes = self.passes(gradients)
        self._tell_idle(len(missing), passes)
        alone, shared = self.crew.deal(missing, passes)
        for team, mine in ((self.crew.team, alone), (self.crew.everyone, shared)):
            self.together(partial(self._simulate, U, mine, gradients, stopping, team, here))
        self.asked.update(self.files.key(u) for u in U)
        found = self._put_together(here, U, gradients, stopping)
        self._count(U, found, stopping)
        return found

    def _groups(self, U: np.ndarray, gradients: bool) -> list[list[int]]:
        """Rows that are simulated together: as few groups as there can be, of equal size to within one. No
        number of ranks decides: in groups of other sizes the last digits would be others."""
        again = [row for row, u in enumerate(U) if self.files.key(u) in self.asked]
        fresh = [row for row in range(len(U)) if row not in again]
        count = len(fresh) if gradients else -(-len(fresh) // self.joint)
        parts = np.array_split(np.array(fresh), count) if count else []
        return [part.tolist() for part in parts] + [[row] for row in again]

    def _tell_idle(self, groups: int, passes: int) -> None:
        """In the log, once each."""
        idle = self.crew.idle(groups, passes)
        if not idle or (groups, passes) in self.told_idle or not self.world.is_leader:
            return
        self.told_idle.add((groups, passes))
        log.info(
            "%d of %d ranks have no work of their own in the last round of %d group(s) of candidates, %d "
            "pass(es) each: a smaller search.candidates.joint makes more groups, a smaller "
            "search.candidates.batch_size more passes",
            idle,
            self.world.size,
            groups,
            passes,
        )

    def _read(self, U: np.ndarray, gradients: bool, stopping: EarlyStop | None) -> dict[int, Measured]:
        found = {row: self.files.read(u, stopping) for row, u in enumerate(U)}
        return {row: m for row, m in found.items() if m and (not gradients or m.gradients is not None)}

    def _count_earlier(self, found: Iterable[Measured]) -> None:
        """Wall time that earlier attempts spent on what this one reads; on the leader, which reads."""
        for measured in found:
            if measured.key not in self.asked:
                self.earlier_seconds += measured.seconds / self.crew.team.count

    def _count(self, U: np.ndarray, found: Evaluations, stopping: EarlyStop | None) -> None:
        """Once each, whichever attempt simulated it; with gradients is another work than without."""
        gradients = found.gradients is not None
        for u, seen, stopped in zip(U, found.samples_seen, found.stopped, strict=True):
            key = self.files.key(u, stopping if stopped else None)
            if (key, gradients) not in self.counted and (key, True) not in self.counted:
                self.counted.add((key, gradients))
                self.work[gradients].candidates += 1
                self.work[gradients].samples += int(seen.sum())

    def _simulate(
        self,
        U: np.ndarray,
        groups: list[list[int]],
        gradients: bool,
        stopping: EarlyStop | None,
        team: Team,
        found: dict[int, Measured],
    ) -> None:
        """Of each team, the leader keeps what was found, and writes it."""
        for group in groups:
            with team.in_step():
                start = time.perf_counter()
                measurement = self.simulate(U[group], gradients, stopping, team)
                seconds = (time.perf_counter() - start) / len(group)
                of_group = partial(self._measured, U, group, measurement, stopping, seconds)
                found.update(team.together(of_group if team.leads else dict))

    def _measured(
        self,
        U: np.ndarray,
        group: list[int],
        measurement: Measurement,
        stopping: EarlyStop | None,
        seconds: float,
    ) -> dict[int, Measured]:
        """Of each row of a group, as it is written."""
        found = {}
        sums, seen, slopes = measurement
        for i, row in enumerate(group):
            part = None if seen is None or seen[i].all() else seen[i]
            key = self.files.key(U[row], None if part is None else stopping)
            found[row] = Measured(key, sums[i], part, None if slopes is None else slopes[i], seconds)
            self.files.write(U[row], found[row])
        return found

    def _put_together(
        self, mine: dict[int, Measured], U: np.ndarray, gradients: bool, stopping: EarlyStop | None
    ) -> Evaluations:
        """Collective. Every row lies on exactly one rank; a sum over ranks brings it to all."""
        count, samples = len(U), len(self.targets)
        sums, seen = torch.zeros(2, count, samples, dtype=torch.float64)
        slopes = torch.zeros(count, self.num_domains, U.shape[1] if gradients else 0, dtype=torch.float64)
        for row, measured in mine.items():
            sums[row] = torch.from_numpy(measured.sums)
            seen[row] = 1.0 if measured.seen is None else torch.from_numpy(measured.seen).double()
            if gradients:
                assert measured.gradients is not None
                slopes[row] = torch.from_numpy(measured.gradients)
        shared = self.world.sum(torch.cat([sums, seen, slopes.flatten(1)], dim=1)).numpy()
        everywhere = shared[:, samples : 2 * samples] > 0
        return Evaluations(
            shared[:, :samples].copy(),
            shared[:, 2 * samples :].reshape(slopes.shape) if gradients else None,
            self.targets,
            self.domain_ids,
            self.num_domains,
            None if everywhere.all() else everywhere,
            stopping.reference if stopping else None,
        )
