"""What a search computes, how long that takes, and what it costs on how many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from opmix_dist.config import RunConfig
from opmix_dist.errors import UserError
from opmix_dist.models.flops import FlopCounts
from opmix_dist.plan.question import Question
from opmix_dist.plan.rates import Rates
from opmix_dist.plan.searching import CandidateMemory, groups_of_probes
from opmix_dist.pool.candidates import Method
from opmix_dist.pool.team import Crew, Team
from opmix_dist.train.ranks import check_ranks


@dataclass(frozen=True)
class SearchWork:
    """All that a search computes, in the groups and pieces that are dealt out to ranks.

    probes: FLOPs of each group of probes, the largest first; ``passes`` of a step are its pieces.
    candidates: for each time that is asked, the FLOPs of each group, of ``parts`` of samples.
    """

    probes: Sequence[float]
    passes: int
    candidates: Sequence[Sequence[float]]
    parts: int
    probe_tokens: int
    candidate_tokens: int

    @property
    def probe_flops(self) -> float:
        return sum(self.probes)

    @property
    def candidate_flops(self) -> float:
        return sum(sum(groups) for groups in self.candidates)


def search_work(
    question: Question, flops: FlopCounts, names: list[str], memory: CandidateMemory
) -> SearchWork:
    """Candidates are as many as are asked for at most: a search may end before, and stop some early."""
    config, data = question.config, question.data
    probes, search = config.search.probes, config.search
    tokens_each = probes.steps * probes.batch_size * data.sequence_length
    groups = [len(group) * tokens_each * flops.probe() for group in groups_of_probes(config, names)]
    samples = data.domains * search.candidates.samples_per_domain
    tokens = samples * data.sequence_length
    one = tokens * candidate_flops(flops, len(names), memory.method, tokens)
    asked: list[list[float]] = [[one]]  # the snapshot itself, and what candidates are compared with
    if search.method == "gradient":
        each = tokens * flops.candidate_gradients(len(names))
        asked += [[each]] * search.gradient.max_evaluations
    else:
        each = tokens * flops.candidate_gradients(len(names)) if memory.gradients else one
        counts = [search.candidates.count] + [search.refinement.count] * search.refinement.rounds
        asked += [_groups(count, memory.joint, each) for count in counts]
    asked += [[one]] * 3  # staying, staying like the proposal, the proposal
    asked_tokens = round(sum(sum(groups) for groups in asked) / one) * tokens if one else 0
    return SearchWork(
        probes=groups,
        passes=probes.passes,
        candidates=asked,
        parts=-(-samples // memory.samples),
        probe_tokens=len(names) * tokens_each,
        candidate_tokens=asked_tokens,
    )


def candidate_flops(flops: FlopCounts, adapters: int, method: Method, tokens: int) -> float:
    """Per token, of a candidate that is evaluated on ``tokens`` of them."""
    if method == "merge":
        return flops.forward + adapters * flops.merge_per_adapter / tokens
    return flops.lowrank_candidate(adapters)


def _groups(count: int, joint: int, each: float) -> list[float]:
    """Candidates in as few groups as there can be, of equal size to within one."""
    groups = -(-count // joint)
    return [each * (count // groups + (i < count % groups)) for i in range(groups)]


@dataclass(frozen=True)
class SearchTime:
    """Seconds on ``ranks`` ranks."""

    ranks: int
    probes: float
    candidates: float

    @property
    def seconds(self) -> float:
        return self.probes + self.candidates

    @property
    def gpu_hours(self) -> float:
        return self.ranks * self.seconds / 3600


def search_time(work: SearchWork, ranks: int, ranks_per_model: int, flops_per_second: float) -> SearchTime:
    """Of the team that has most to do.

    Args:
        ranks: a multiple of ``ranks_per_model``.
        flops_per_second: of one rank.
    """
    sharded = ranks_per_model > 1
    team = Team(0, ranks // ranks_per_model, 0, ranks_per_model, sharded)
    crew = Crew(team, Team(size=ranks, sharded=sharded))

    def seconds(groups: Sequence[float], pieces: int) -> float:
        alone, shared = crew.deal(groups, pieces)
        return sum(
            flops * who.rounds(pieces) / pieces / flops_per_second
            for who, mine in ((crew.team, alone), (crew.everyone, shared))
            for flops in mine
        )

    return SearchTime(
        ranks,
        seconds(work.probes, work.passes),
        sum(seconds(groups, work.parts) for groups in work.candidates),
    )


Place = Literal["inline", "pool"]


@dataclass(frozen=True)
class PoolChoice:
    """Searching on so many ranks.

    interval_share: of the time that training takes after the request, how much the search takes.
    delays: whether training waits for the search.
    total_seconds: of the whole run, with the search where training waits for it.
    trainer_gpu_hours, pool_gpu_hours: of all that time, of either role, whose GPUs may differ.
    trainer_waiting, pool_waiting: of these, of trainers while the search goes on, and of the pool before and
    after it.
    batch_divides: whether the trainers that are left can share the global batch as it is.
    in_time: the search is done within the share that was asked for.
    """

    place: Place
    ranks: int
    search: SearchTime
    interval_share: float
    delays: bool
    total_seconds: float
    trainer_gpu_hours: float
    pool_gpu_hours: float
    trainer_waiting: float
    pool_waiting: float
    batch_divides: bool
    in_time: bool

    @property
    def total_gpu_hours(self) -> float:
        return self.trainer_gpu_hours + self.pool_gpu_hours

    @property
    def waiting_gpu_hours(self) -> float:
        return self.trainer_waiting + self.pool_waiting


def pool_choice(
    question: Question, work: SearchWork, train_flops: float, rates: Rates, ranks: int
) -> PoolChoice:
    """A pool of so many ranks, of the launch's or its own; 0: the trainer ranks themselves.

    Args:
        train_flops: of all steps.
    """
    config = question.config
    pool = 0 if config.pool.external else ranks
    trainers = question.ranks - pool
    search = search_time(
        work, ranks or trainers, config.pool.ranks_per_model, rates.pool if ranks else rates.inline
    )
    training = train_flops / (rates.training * trainers)
    delays = config.search.mode == "sync" or not ranks
    total = training + (search.seconds if delays else 0.0)
    interval = search.seconds / (training * (1 - config.search_step / config.train.steps))
    return PoolChoice(
        place="pool" if ranks else "inline",
        ranks=ranks or trainers,
        search=search,
        interval_share=interval,
        delays=delays,
        total_seconds=total,
        trainer_gpu_hours=trainers * total / 3600,
        pool_gpu_hours=ranks * total / 3600,
        trainer_waiting=trainers * search.seconds / 3600 if delays and ranks else 0.0,
        # a search that the end of the run cuts short leaves it no time to wait
        pool_waiting=ranks * max(0.0, total - search.seconds) / 3600,
        batch_divides=_divides(config, trainers),
        in_time=interval <= question.due_within,
    )


def pool_choices(
    question: Question, work: SearchWork, train_flops: float, rates: Rates
) -> tuple[list[PoolChoice], PoolChoice | None]:
    """The search on the trainer ranks themselves, and on pools of 1, 2, 4 ... models' ranks, to the second of
    them that is in time, and of as many as are asked for; and the smallest pool that is done in time, which
    is among them. None: no pool here is.

    Twice the ranks are never slower, so it is looked for from half of the first of them that is in time.
    """
    each, wanted = question.config.pool.ranks_per_model, question.pool_ranks
    most = 4 * question.ranks if question.config.pool.external else question.ranks - 1

    def choice(ranks: int) -> PoolChoice:
        return pool_choice(question, work, train_flops, rates, ranks)

    found = {}
    late = 0
    for ranks in _doubling(each, most):
        found[ranks] = choice(ranks)
        if ranks > max(2 * late, each):
            break
        late = late if found[ranks].in_time else ranks
    between = (choice(ranks) for ranks in range(late + each, min(2 * late, most + 1), each))
    enough = next((pool for pool in between if pool.in_time), None)
    if enough is not None:
        found[enough.ranks] = enough
    if wanted:
        found[wanted] = choice(wanted)
    pools = [found[ranks] for ranks in sorted(found)]
    return [choice(0), *pools], next((pool for pool in pools if pool.in_time), None)


def _doubling(first: int, most: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= 2


def _divides(config: RunConfig, trainers: int) -> bool:
    try:
        check_ranks(config, trainers)
    except UserError:
        return False
    return True
