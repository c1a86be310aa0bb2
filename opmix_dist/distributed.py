"""Roles and worlds: which rank of a launch is what, and each role's own default process group.

One ``torchrun`` launch holds trainers and, as its last ranks, the pool. Each role builds its own default
group, so that FSDP2 (and any other engine) sees a world of trainers only. Both roles use torchrun's own
TCPStore under a prefix: role, torchrun's restart attempt (the store outlives restarts) and, for the pool,
the generation of its workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist
from torch import Tensor

from opmix_dist.errors import UserError
from opmix_dist.hang import HangGuard
from opmix_dist.watchdog import Watchdog

STAGE_VARIABLE = "OPMIX_STAGE"
"""Name of the stage that a process trains, of a lifecycle whose launch has others before and after it."""


class Role(StrEnum):
    TRAINER = "trainer"
    POOL = "pool"


class PeerError(RuntimeError):
    """Another rank of this role failed; the message is that rank's."""


@dataclass(frozen=True)
class Placement:
    """Where this process stands: its role, and its rank among the ranks of that role."""

    role: Role
    rank: int
    size: int

    @classmethod
    def from_environment(cls, pool_ranks: int) -> Placement:
        """The last ``pool_ranks`` ranks of the launch are the pool.

        Raises:
            UserError: the pool would leave no trainer.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and not has_launcher():
            raise UserError(f"WORLD_SIZE is {world} but torchrun did not start this process: use torchrun")
        trainers = world - pool_ranks
        if trainers < 1:
            raise UserError(
                f"pool.ranks {pool_ranks} leaves no trainer in a launch of {world} rank(s): start at least "
                f"{pool_ranks + 1} ranks, or set pool.ranks to 0 to search on the trainer ranks"
            )
        if rank < trainers:
            return cls(Role.TRAINER, rank, trainers)
        return cls(Role.POOL, rank - trainers, pool_ranks)


class World:
    """The ranks of one role, joined in the default process group.

    Methods marked collective must be called by every rank of the role, in the same order; a rank that is
    missing makes the others wait until the timeout, whose error names the role.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        *,
        timeout: timedelta = timedelta(minutes=30),
        watchdog: Watchdog | None = None,
        guard: HangGuard | None = None,
    ) -> None:
        """
        Args:
            timeout: of a collective; other groups than the default one must be given it.
            guard: of this rank; it is closed with the world.
        """
        self.role, self.rank, self.size = placement.role, placement.rank, placement.size
        self.device = device
        self.is_leader = placement.rank == 0
        self.timeout, self._watchdog, self._guard = timeout, watchdog, guard

    @classmethod
    def join(
        cls,
        placement: Placement,
        *,
        device: str = "auto",
        timeout_s: float = 1800.0,
        generation: int = 0,
        guard: HangGuard | None = None,
    ) -> World:
        """Collective over the role. ``device``: auto takes this rank's GPU where there is one."""
        chosen, timeout = _device(device), timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(_prefix(placement.role, generation), launch_store()),
            rank=placement.rank,
            world_size=placement.size,
            timeout=timeout,
        )
        watchdog = None
        if placement.size > 1:
            store = dist.PrefixStore(f"places/{_prefix(placement.role, generation)}", launch_store())
            watchdog = Watchdog(placement.role, placement.rank, placement.size, store, timeout_s)
        return cls(placement, chosen, timeout=timeout, watchdog=watchdog, guard=guard)

    def enter(self, phase: str, step: int = 0) -> None:
        """A part of the work begins, on all ranks of the role: what is said when one does not come along."""
        if self._watchdog is not None:
            self._watchdog.enter(phase, step)
        if self._guard is not None:
            self._guard.enter(phase, step)

    def beside(self, what: str) -> Callable[[], object]:
        """Not collective: something begins in another thread of this rank, which must end in time. What is
        returned is to be called when it has ended."""
        return self._guard.beside(what) if self._guard is not None else lambda: None

    def progress(self) -> None:
        """Not collective: this rank gets on with a long piece of work."""
        if self._guard is not None:
            self._guard.move()

    def _move(self) -> None:
        if self._watchdog is not None:
            self._watchdog.move()
        self.progress()

    def explain(self, error: BaseException) -> None:
        """Not collective: if ``error`` is that of a collective, log which ranks did not come, and where all
        of them stand."""
        if self._watchdog is not None:
            self._watchdog.explain(error)

    def leave(self) -> None:
        """Collective. Leave in step, so that no rank tears connections down that another still needs."""
        self.barrier()
        self._end()

    def abandon(self) -> None:
        """Not collective: drop the group after an error, when the other ranks may be anywhere."""
        self._end()

    def _end(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        dist.destroy_process_group()
        if self._guard is not None:
            self._guard.close()

    def barrier(self) -> None:
        """Collective."""
        self._move()
        dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Collective. Sum over ranks in place, on whatever device ``values`` lies."""
        self._move()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Collective. The largest of the ranks' numbers, on every rank."""
        self._move()
        if self.size == 1:
            return value
        number = torch.tensor([value])
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def share(self, values: Sequence[float] | None) -> list[float]:
        """Collective. The leader's numbers on every rank; the others pass None."""
        self._move()
        if self.size == 1:
            assert values is not None
            return list(values)
        length = torch.tensor([len(values) if values is not None else 0])
        dist.broadcast(length, src=0)
        numbers = torch.zeros(int(length), dtype=torch.float64)
        if values is not None:
            numbers = torch.tensor(list(values), dtype=torch.float64)
        dist.broadcast(numbers, src=0)
        return numbers.tolist()

    def share_text(self, text: str | None) -> str:
        """Collective. The leader's text on every rank; the others pass None."""
        codes = self.share(None if text is None else [float(b) for b in text.encode()])
        return bytes(int(c) for c in codes).decode()

    def agree(self, failure: str | None) -> None:
        """Collective. Every rank passes its failure or None; all raise if any rank failed.

        Raises:
            PeerError: with the message of the first rank that failed.
        """
        self._move()
        if self.size == 1:
            if failure is not None:
                raise PeerError(failure)
            return
        first = torch.tensor([self.rank if failure is not None else self.size])
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        source = int(first)
        if source == self.size:
            return
        text = (failure or "").encode()[:4096] if self.rank == source else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, src=source)
        codes = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source:
            codes = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else codes
        dist.broadcast(codes, src=source)
        raise PeerError(f"{self.role} rank {source}: {bytes(codes.tolist()).decode(errors='replace')}")


def has_launcher() -> bool:
    """Whether torchrun started this process, or its parent did."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch_store() -> dist.Store:
    """The store of this launch: torchrun's, or one in memory for a process that was started alone."""
    if not has_launcher():
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def launch_attempt() -> str:
    """What tells our keys in the launch's store from others': it outlives torchrun's restarts of the ranks,
    and the stages of a lifecycle."""
    attempt, stage = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get(STAGE_VARIABLE)
    return f"{attempt}/{stage}" if stage else attempt


def _prefix(role: Role, generation: int) -> str:
    return f"{role}/{launch_attempt()}/{generation}"


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("engine.device is cuda but torch sees no GPU: set it to cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own, this node has {torch.cuda.device_count()}: "
            "start as many ranks per node as it has GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
