"""Mixture policies: who decides, at each step boundary, what the trainers read next."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from opmix_dist.config import RunConfig
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import GROUPS, chosen_mixture
from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import MixtureRecord, Proposal, SearchRequest, SearchStage, SearchStatus
from opmix_dist.faults.points import point
from opmix_dist.ledger import Ledger
from opmix_dist.pool.requests import search_request
from opmix_dist.pool.run_search import Searcher
from opmix_dist.stopping import StopSignals
from opmix_dist.train.model_writer import ModelWriter
from opmix_dist.train.state import TrainerState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What a policy may see and use."""

    run: RunDir
    config: RunConfig
    world: World
    writer: ModelWriter
    catalogue: Catalogue
    ledger: Ledger
    on_search: Callable[[str, SearchStatus | None], None]
    """Told the search's name and status while its answer is awaited; on the leader."""
    stop: StopSignals
    history: Mapping[str, int] = field(default_factory=dict)
    """Tokens that the model had read of each domain before this run."""


class MixturePolicy(ABC):
    """Decides at step boundaries. What was decided once, and recorded, is replayed by a resumed run."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around

    def decide(self, state: TrainerState, recorded: Mapping[int, MixtureRecord]) -> MixtureRecord | None:
        """Collective over the trainer ranks, before each step.

        Returns:
            The decision that takes effect before step ``state.step`` on every rank, or None for no decision.
        """
        known = recorded.get(state.step)
        if known is not None and not self.still_open(known):
            return known
        return self._decide(state, recorded) or known

    def still_open(self, known: MixtureRecord) -> bool:
        """Whether another decision may follow ``known`` at its step."""
        return False

    @abstractmethod
    def _decide(self, state: TrainerState, recorded: Mapping[int, MixtureRecord]) -> MixtureRecord | None: ...

    def end(self, recorded: Mapping[int, MixtureRecord]) -> None:  # noqa: B027  (most have nothing open)
        """Collective, after the last step: nothing that is still open can be of use to this run."""

    def close(self) -> None:  # noqa: B027  (most policies hold nothing)
        """Called once after the last step."""


class StaticPolicy(MixturePolicy):
    """The initial mixture, and those of ``mixture.schedule`` from their steps on."""

    WHY = "mixture.schedule"

    def _decide(self, state: TrainerState, recorded: Mapping[int, MixtureRecord]) -> MixtureRecord | None:
        chosen = self.around.config.mixture.schedule.get(state.step)
        if chosen is None:
            return None
        return MixtureRecord(
            version=state.mixture_version + 1,
            step=state.step,
            weights=chosen_mixture(
                chosen, self.around.catalogue, f"mixture.schedule.{state.step}", self.around.history
            ),
            why=self.WHY,
        )


def check_schedule(config: RunConfig, recorded: Mapping[int, MixtureRecord], step: int) -> None:
    """Refuse a ``mixture.schedule`` that rewrites what the run has done.

    Args:
        recorded: decisions by their step.
        step: the one that comes next.

    Raises:
        UserError: another mixture, or none, at a step that was decided; or one at a step that has passed.
    """
    schedule = config.mixture.schedule
    for at in sorted({*schedule, *(at for at, record in recorded.items() if record.why == StaticPolicy.WHY)}):
        if at not in recorded and at < step:
            raise UserError(
                f"mixture.schedule.{at} lies before step {step}, where the run is: name a later one"
            )
        if at in recorded and at not in schedule:
            raise UserError(f"mixture.schedule.{at} is missing, which the run has acted on: put it back")
        chosen = schedule.get(at)
        if at in recorded and isinstance(chosen, dict) and not chosen.keys() & GROUPS:
            taken = {name: weight for name, weight in recorded[at].weights.items() if weight}
            if taken != {name: weight for name, weight in chosen.items() if weight}:
                raise UserError(f"mixture.schedule.{at} is not what the run took there: put {taken} back")


class OpMixPolicy(MixturePolicy):
    """One search after the prefix (OP-Mix, arXiv 2605.15220, section 3): snapshot, request, wait or train
    on, switch. A search that fails, hangs or answers nonsense leaves the mixture as it is."""

    SEARCH = "0001"

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        self.search: SearchDir = around.run.search(self.SEARCH)
        self.start = around.config.search_step
        self._asked = False
        self._failure = ""
        self._asked_at: TrainerState | None = None
        """As it was when a snapshot was begun that is not complete yet; on every rank."""

    def still_open(self, known: MixtureRecord) -> bool:
        """A search before the first step follows the initial mixture, and takes its place."""
        return self.start == known.step == 0 and known.search is None

    def _decide(self, state: TrainerState, recorded: Mapping[int, MixtureRecord]) -> MixtureRecord | None:
        if state.step < self.start or any(r.search == self.SEARCH for r in recorded.values()):
            return None
        if not self._asked:
            self._ask(state)
        if self._inline:
            self._search_here()
        with self.around.ledger.timed("waiting for the search"):
            return self._answer(state)

    def _answer(self, state: TrainerState) -> MixtureRecord | None:
        """The decision once it is there; ``async`` looks once, ``sync`` waits for it. Collective.

        Raises:
            StopRequested: the run was asked to stop meanwhile; a resumed one goes on waiting.
        """
        config, world = self.around.config, self.around.world
        while True:
            self._follow_snapshot()
            text = world.share_text(self._look(state) if world.is_leader else None)
            if text:
                return MixtureRecord.model_validate_json(text)
            if config.search.mode == "async":
                return None
            time.sleep(config.pool.poll_interval_s)
            self.around.stop.stop_if_agreed(world)

    def _ask(self, state: TrainerState) -> None:
        """Begin the snapshot, unless an earlier attempt at this run has asked. Collective."""
        self._asked = True
        around = self.around
        self.pulse = Pulse(around.config.pool.heartbeat_timeout_s)
        asked = [float(self.search.request_file.exists())] if around.world.is_leader else None
        if around.world.share(asked)[0]:
            return  # the request stands, and its answer may be there already
        start = time.perf_counter()
        with around.ledger.timed("snapshots"):
            self._failure = around.writer.begin(
                around.run.snapshot(state.step),
                dtype=getattr(torch, around.config.engine.snapshot_dtype),
                marker={"step": state.step, "tokens": state.tokens},
            )
        if not self._failure:
            self._asked_at = state.model_copy(deep=True)
            self._tell_stall(time.perf_counter() - start, state.step)

    def _tell_stall(self, seconds: float, steps: int) -> None:
        """How long the copy of the parameters has held up training, which goes on while it is written."""
        trained = self.around.ledger.costs.get("train")
        if self.around.world.is_leader and trained is not None and trained.seconds:
            mean = trained.seconds / steps
            log.info(
                "search %s: its snapshot held training up for %.3f s (a step takes %.3f s)",
                self.SEARCH, seconds, mean,
            )  # fmt: skip

    def _search_here(self) -> None:
        """Wait for the snapshot and search on the trainer ranks, unless that has been done. Collective."""
        around = self.around
        with around.ledger.timed("waiting for the search"):
            while self._asked_at is not None:
                time.sleep(around.config.pool.poll_interval_s)
                self._follow_snapshot()
        if not self._failure and not self._answered():
            with around.ledger.aside():  # proposal.json has its costs
                around.world.enter(f"search {self.SEARCH}", around.config.search_step)
                Searcher(
                    around.run,
                    around.config,
                    around.world,
                    stop=around.stop,
                    on_beat=around.world.progress,
                ).answer(self.search)

    def _follow_snapshot(self) -> None:
        """Request the search once all ranks have written. Collective."""
        if self._asked_at is None:
            return
        failure = self.around.writer.poll()
        if failure is None:
            return
        asked_at, self._asked_at, self._failure = self._asked_at, None, failure
        if self.around.world.is_leader and not failure:
            point("search.request", step=asked_at.step)
            write_record(self.search.request_file, self._request(asked_at))

    def _answered(self) -> bool:
        """Collective. Whether an earlier attempt at this run has finished the search."""
        status = self.search.status() if self.around.world.is_leader else None
        final = [float(status is not None and status.stage.final)] if self.around.world.is_leader else None
        return bool(self.around.world.share(final)[0])

    def end(self, recorded: Mapping[int, MixtureRecord]) -> None:
        """``async``: no search is requested any more, since no step could follow its answer. A snapshot that
        is being written will be complete nevertheless: the export waits for it."""
        if not self._asked or any(r.search == self.SEARCH for r in recorded.values()):
            return
        if self.around.world.is_leader:
            writing = self._asked_at is not None
            log.warning(
                "search %s has changed nothing: the run has ended before %s; lower search.start_fraction, or "
                "set search.mode to sync",
                self.SEARCH,
                "its snapshot was written" if writing else "its answer was there",
            )

    @property
    def _inline(self) -> bool:
        pool = self.around.config.pool
        return pool.ranks == 0 and not pool.external

    def _request(self, state: TrainerState) -> SearchRequest:
        config, catalogue = self.around.config, self.around.catalogue
        left = (config.train.steps - state.step) * config.train.global_batch_size * catalogue.sequence_length
        return search_request(
            config,
            catalogue,
            self.SEARCH,
            step=state.step,
            snapshot=str(self.around.run.snapshot(state.step).relative_to(self.around.run.path)),
            current=state.weights,
            tokens_read=state.domain_tokens,
            tokens_to_train=left,
            history=self.around.history,
        )

    def _look(self, state: TrainerState) -> str:
        """On the leader: the decision as JSON, or "" while the search is under way."""
        if self._failure:
            return self._kept(state, f"the snapshot could not be written: {self._failure}")
        if self._asked_at is not None:
            self.pulse.restart()  # there is nothing to answer yet
            return ""
        try:
            status = self.search.status()
            if status is not None and status.stage is SearchStage.PROPOSED:
                return self._proposed(state)
        except UserError as error:  # half a file is impossible, so this is nonsense
            return self._kept(state, str(error))
        except OSError as error:  # could not ask: nothing new is known
            log.warning("cannot look at search %s (%s): trying again", self.SEARCH, error)
            status = self.pulse.last
        if status is not None and status.stage is SearchStage.FAILED:
            return self._kept(state, status.reason)
        self.around.on_search(self.SEARCH, status)
        silent = self.pulse.silence(status)
        return self._kept(state, f"the pool gave no sign of life for {silent:.0f} s") if silent else ""

    def _proposed(self, state: TrainerState) -> str:
        proposal, request = self.search.proposal(), self.search.request()
        if (proposal.search, proposal.step) != (request.search, request.step):
            return self._kept(state, f"{self.search.proposal_file} answers another request")
        if set(proposal.weights) != set(state.weights):
            return self._kept(state, f"{self.search.proposal_file} names other domains than the run's")
        if proposal.decision is not None and not proposal.decision.move:
            return self._record(
                state,
                weights=None,
                why=f"search {self.SEARCH} keeps the mixture: {proposal.decision.reason}",
                requested_step=request.step,
            )
        return self._record(
            state,
            weights={name: proposal.weights[name] for name in state.weights},
            why=f"search {self.SEARCH}: {proposal.decision.reason if proposal.decision else _gain(proposal)}",
            requested_step=request.step,
        )

    def _kept(self, state: TrainerState, reason: str) -> str:
        log.warning("search %s failed, the mixture stays: %s", self.SEARCH, reason)
        return self._record(state, weights=None, why=f"search {self.SEARCH} failed: {reason}")

    def _record(
        self,
        state: TrainerState,
        *,
        weights: dict[str, float] | None,
        why: str,
        requested_step: int | None = None,
    ) -> str:
        return MixtureRecord(
            version=state.mixture_version + (weights is not None),
            step=state.step,
            weights=weights or state.weights,
            why=why,
            search=self.SEARCH,
            changed=weights is not None,
            requested_step=requested_step,
        ).model_dump_json()


def _gain(proposal: Proposal) -> str:
    gain = np.mean([proposal.simulated_current[d] - proposal.simulated[d] for d in proposal.weights])
    return f"simulated mean loss {gain:.4f} below staying on the mixture"


class Pulse:
    """Notices a pool that went silent. Compares contents, so that no clocks need to agree."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.last: SearchStatus | None = None
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._since = time.monotonic()

    def silence(self, status: SearchStatus | None) -> float:
        """Seconds without a change of the status once they exceed the timeout, else 0."""
        now = time.monotonic()
        if status != self.last:
            self.last, self._since = status, now
        silent = now - self._since
        return silent if silent > self.timeout_s else 0.0


POLICIES: dict[str, type[MixturePolicy]] = {"static": StaticPolicy, "opmix": OpMixPolicy}
