"""Teams of ranks: those that hold one model between them, and all that search.

A model that fits on a rank is on every rank, and each is a team of its own. A larger one is sharded over a
team, whose ranks then do the same number of passes in step. Work comes in groups (probes that are trained
jointly, candidates that are simulated jointly), and a group in pieces (samples of a pass). What a group and a
piece are, no number of ranks decides: groups are dealt out to teams, pieces to the ranks of a team, and what
they give is put together in the pieces' order. So results are the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.pool.errors import AgreedError, BrokenTeamError, SearchError

T = TypeVar("T")


def require_whole_teams(ranks_per_model: int, ranks: int) -> None:
    """UserError where the ``ranks`` that search cannot be divided; to be asked before a run begins."""
    if ranks % ranks_per_model:
        raise UserError(
            f"pool.ranks_per_model {ranks_per_model} does not divide the {ranks} rank(s) that search: change "
            "it, or their number"
        )


@dataclass(frozen=True)
class Team:
    """Ranks that do one piece of work each.

    index, count: this team's place among all teams. rank, size: this process's place in its team.
    sharded: they hold the model between them, and each pass needs all of them.
    group: None: the default one.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    size: int = 1
    sharded: bool = False
    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes what the team has found."""
        return self.rank == 0

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of the team's ranks, to shard a model over."""
        group = self.group or dist.group.WORLD
        assert group is not None
        return DeviceMesh.from_group(group, device.type, mesh_dim_names=("team",))

    def rounds(self, pieces: int) -> int:
        """Passes that each rank makes over ``pieces`` pieces of work."""
        return math.ceil(pieces / self.size)

    def deal(self, pieces: int) -> list[int]:
        """Which pieces this rank computes, in order: one of each round, and the last piece once more where a
        round has none left for it, since a sharded model needs all ranks in every pass. What comes twice is
        to be counted once: :meth:`counts`."""
        return [min(first + self.rank, pieces - 1) for first in range(0, pieces, self.size)]

    def counts(self, turn: int, pieces: int) -> bool:
        """Whether this rank's piece in round ``turn`` is its own, no repetition."""
        return turn * self.size + self.rank < pieces

    def sum(self, values: Tensor) -> Tensor:
        """Collective over the team. Sum over its ranks in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def each(self, values: Tensor, ranks: int) -> Iterator[Tensor]:
        """Collective over the team. What its first ``ranks`` ranks passed, in their order, on every rank."""
        for rank in range(ranks):
            if self.size == 1:
                yield values
                continue
            found = values.clone() if rank == self.rank else torch.empty_like(values)
            dist.broadcast(found, group=self.group, group_src=rank)
            yield found

    def together(self, work: Callable[[], T]) -> T:
        """Collective over the team. Run ``work``, which must not communicate, on every rank.

        Raises:
            AgreedError: on all ranks, where it failed on one. A team of one rank raises what ``work`` does.
        """
        if self.size == 1:
            return work()
        found: list[T] = []
        failure: Exception | None = None
        try:
            found.append(work())
        except Exception as error:
            failure = error
        if self.sum(torch.tensor([float(failure is not None)])).item():
            text = "" if failure is None else str(failure) or type(failure).__name__
            raise AgreedError(text) from failure
        return found[0]

    def compute(self, work: Callable[[], T]) -> T:
        """Collective over the team. As :meth:`together`, for passes through the model. Where that is sharded
        they communicate themselves, and a failure cannot be agreed on: it is raised where it is."""
        return work() if self.sharded else self.together(work)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around work of the whole team.

        Raises:
            SearchError: raised by all ranks alike inside.
            BrokenTeamError: anything else failed on this rank, while others of its team may wait for it.
        """
        try:
            yield
        except (SearchError, BrokenTeamError):
            raise
        except Exception as error:
            if self.size == 1:
                raise
            raise BrokenTeamError(f"{type(error).__name__}: {error}") from error


ALONE = Team()


@dataclass(frozen=True)
class Crew:
    """All ranks that search: in teams, and together."""

    team: Team
    everyone: Team

    @classmethod
    def of(cls, world: World, ranks_per_model: int) -> Crew:
        """Collective over the ranks of ``world``.

        Raises:
            UserError: they cannot be divided into teams of ``ranks_per_model``.
        """
        size = ranks_per_model
        require_whole_teams(size, world.size)
        everyone = Team(rank=world.rank, size=world.size, sharded=size > 1)
        if size == world.size:
            return cls(everyone, everyone)
        groups: list[dist.ProcessGroup | None] = [None] * (world.size // size)
        if size > 1:  # every rank makes every group
            groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world.size, size)]
        index = world.rank // size
        team = Team(index, len(groups), world.rank % size, size, size > 1, groups[index])
        return cls(team, everyone)

    def deal(self, groups: Sequence[T], pieces: int) -> tuple[list[T], list[T]]:
        """Of groups of ``pieces`` equal pieces: those of this rank's team, and those of all ranks together.

        As many as there are teams go to one team each, and so on; what is left goes to all ranks where that
        is sooner done.
        """
        team, everyone = self.team, self.everyone
        even = len(groups) - len(groups) % team.count
        left = len(groups) - even
        if left * everyone.rounds(pieces) >= team.rounds(pieces):
            even, left = len(groups), 0
        return list(groups[:even][team.index :: team.count]), list(groups[even:])

    def idle(self, groups: int, pieces: int) -> int:
        """Ranks that have nothing to do, or what another does too, in the last round of so many groups."""
        team, everyone = self.team, self.everyone
        left = groups % team.count
        if not left:
            return 0 if not groups else (-pieces) % team.size * team.count
        if left * everyone.rounds(pieces) < team.rounds(pieces):
            return (-pieces) % everyone.size
        busy = left * (team.size - (-pieces) % team.size)
        return everyone.size - busy
