"""What the phases of a run compute, how long that takes, and what a search costs on how many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from opmix_dist.config import RunConfig
from opmix_dist.errors import UserError
from opmix_dist.models.flops import FlopCounts
from opmix_dist.plan.question import Question
from opmix_dist.plan.searching import CandidateMemory, groups_of_probes
from opmix_dist.pool.candidates import Method
from opmix_dist.pool.team import Crew, Team
from opmix_dist.train.ranks import check_ranks


@dataclass(frozen=True)
class Phase:
    """flops: of the model, on all ranks together. ranks: that are busy or wait."""

    name: str
    tokens: int
    flops: float
    ranks: int
    seconds: float

    @property
    def gpu_hours(self) -> float:
        return self.ranks * self.seconds / 3600


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
    total_seconds: of the whole run, with the search where training waits for it.
    waiting_gpu_hours: of trainers that wait for the search, and of the pool's ranks before and after it.
    batch_divides: whether the trainers that are left can share the global batch as it is.
    in_time: the search is done within the share that was asked for.
    """

    place: Place
    ranks: int
    search: SearchTime
    interval_share: float
    total_seconds: float
    total_gpu_hours: float
    waiting_gpu_hours: float
    batch_divides: bool
    in_time: bool


def pool_choices(
    question: Question, work: SearchWork, train_flops: float, rate: float, search_rate: float
) -> list[PoolChoice]:
    """The search on the trainer ranks themselves, and on pools of 1, 2, 4 ... of the launch's ranks, or
    devices of the pool's own.

    Args:
        train_flops: of all steps.
        rate, search_rate: FLOP/s of one rank in training and in the search.
    """
    config = question.config
    each, share = config.pool.ranks_per_model, 1 - config.search_step / config.train.steps
    found = []
    for ranks in (0, *_pool_sizes(question)):
        place: Place = "pool" if ranks else "inline"
        external = config.pool.external and ranks > 0
        trainers = question.ranks - (0 if external else ranks)
        search = search_time(work, ranks or trainers, each, search_rate)
        training = train_flops / (rate * trainers)
        waits = config.search.mode == "sync" or place == "inline"
        total = training + (search.seconds if waits else 0.0)
        waiting = trainers * search.seconds if waits and ranks else 0.0
        waiting += ranks * (total - search.seconds)
        interval = search.seconds / (training * share)
        found.append(
            PoolChoice(
                place=place,
                ranks=ranks or trainers,
                search=search,
                interval_share=interval,
                total_seconds=total,
                total_gpu_hours=(trainers + ranks) * total / 3600,
                waiting_gpu_hours=waiting / 3600,
                batch_divides=_divides(config, trainers),
                in_time=interval <= question.due_within,
            )
        )
    return found


def _divides(config: RunConfig, trainers: int) -> bool:
    try:
        check_ranks(config, trainers)
    except UserError:
        return False
    return True


def _pool_sizes(question: Question) -> Iterator[int]:
    """1, 2, 4 ... models, and as many ranks as are configured."""
    each, wanted = question.config.pool.ranks_per_model, question.pool_ranks
    most = 4 * question.ranks if question.config.pool.external else question.ranks - 1
    sizes = {wanted} if wanted else set()
    size = each
    while size <= most:
        sizes.add(size)
        size *= 2
    yield from sorted(sizes)
