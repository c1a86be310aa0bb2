"""One search from request to proposal: probes, candidates, laws, proposal.

Runs on the ranks of whichever role searches: the pool, the trainers themselves (``pool.ranks: 0``), or a
launch that does nothing else (``opmix search``). Groups of probes and of candidates are dealt out to teams of
ranks (:mod:`opmix_dist.pool.team`), which meet in files and in sums over the role's process group. What a
killed search had finished on disk is used again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.build import held_out_samples
from opmix_dist.distributed import PeerError, World
from opmix_dist.errors import UserError
from opmix_dist.exchange.history import open_domains
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import SearchRequest, SearchStage
from opmix_dist.exchange.searched_tasks import FILE as TASKS_RECORD
from opmix_dist.ledger import Ledger
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.flops import count_flops
from opmix_dist.models.loss import sample_loss_sums, uses_flash_attention
from opmix_dist.models.sharding import plain_class
from opmix_dist.pool.calibration import read_calibration
from opmix_dist.pool.early_stop import LEAST_SEEN, EarlyStop
from opmix_dist.pool.errors import AgreedError, BrokenTeamError, SearchError
from opmix_dist.pool.evaluating import Evaluating
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.loading import load, searched_source
from opmix_dist.pool.plan import chosen_kernels
from opmix_dist.pool.probe_groups import ProbeGroups
from opmix_dist.pool.records import Outcome, write_outcome
from opmix_dist.pool.requests import staying
from opmix_dist.pool.solving import (
    error_bars,
    first_candidates,
    overrated,
    sampled_losses,
    search_method,
    search_problem,
)
from opmix_dist.pool.status import StatusWriter
from opmix_dist.pool.task_metric import TaskMetric
from opmix_dist.pool.team import Crew
from opmix_dist.search.ask_tell import MixtureSearch, SearchResult
from opmix_dist.search.feasibility import require_feasible_shares
from opmix_dist.search.problem import Problem
from opmix_dist.stopping import StopRequested, StopSignals

log = logging.getLogger(__name__)

# Failures whose message is for the user; any other exception is logged with its traceback too.
EXPECTED = (SearchError, UserError, ValueError, OSError)
_STOPPED = "asked to stop"


class Searcher:
    """Answers requests. Every method is collective over the ranks of ``world``, and so is making one.

    Args:
        stop: signals that end a search on the trainers' own ranks; a pool's workers are just killed.
        on_beat: called after each piece of work.

    Raises:
        UserError: the ranks cannot be divided into teams.
    """

    def __init__(
        self,
        run: RunDir,
        config: SharedConfig,
        world: World,
        *,
        stop: StopSignals | None = None,
        on_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.config, self.world = run, config, world
        self.crew = Crew.of(world, config.pool.ranks_per_model)
        self._stop, self._working, self.can_stop = stop, False, True
        self._on_beat = on_beat

    def answer(self, search: SearchDir) -> None:
        """Write proposal.json and status ``proposed``, or status ``failed`` with the reason.

        Raises:
            StopRequested: on all ranks, as soon as those that were asked have met the others. What is done is
                on disk; the next attempt goes on from it.
            BrokenTeamError: this rank cannot go on, and others wait for it: its process is to end.
        """
        status = StatusWriter(search, writes=self.world.is_leader, on_beat=self._after_a_piece)
        self.can_stop = True
        try:
            _Search(self, search, status).run()
        except PeerError as error:
            log.warning("search %s failed: %s", search.name, error)
            status.enter(SearchStage.FAILED, reason=str(error))
        finally:
            gc.collect()  # adapters and layers refer to each other; a model's memory must not wait for that
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _together(self, work: Callable[[], None]) -> None:
        """Run ``work``, which communicates within teams only; if it fails on one rank, raise PeerError on
        all. Whatever can fail on one rank only runs in here.

        Any exception counts: a search never takes its rank down, but where a team is in the midst of what it
        does in step. A rank that is killed does not get here; its peers fail in ``agree``, and the
        supervisors start all workers again.
        """
        failure = None
        try:
            self._working = True
            work()
        except AgreedError as error:
            # those that failed themselves tell
            failure = _STOPPED if isinstance(error.__cause__, StopRequested) else str(error) or None
        except StopRequested:
            failure = _STOPPED
        except EXPECTED as error:
            failure = str(error) or type(error).__name__
        except BrokenTeamError:
            log.exception(
                "%s rank %d fails in the midst of its team's work", self.world.role, self.world.rank
            )
            raise
        except Exception as error:
            log.exception("search failed on %s rank %d", self.world.role, self.world.rank)
            failure = f"{type(error).__name__}: {error}"
        finally:
            self._working = False
        try:
            self.world.agree(failure)
        except PeerError as error:
            if str(error).endswith(_STOPPED):
                raise StopRequested from None
            raise

    def _after_a_piece(self) -> None:
        """A stop is for where all ranks can leave together; elsewhere the others would wait."""
        self._on_beat()
        if self._working and self.can_stop and self._stop is not None and self._stop.received:
            raise StopRequested


class _Search:
    def __init__(self, searcher: Searcher, search: SearchDir, status: StatusWriter) -> None:
        self.searcher = searcher
        self.run_dir, self.config, self.world = searcher.run, searcher.config, searcher.world
        self.crew = searcher.crew
        self.search, self.status = search, status
        self.ledger = Ledger(self.world.size)
        self.together = searcher._together

    def run(self) -> None:
        self.together(self._open)
        if self.config.data.mask_documents:
            self.together(self._require_documents_apart)
        self._probe()
        # probes meet at every step; a pass of a sharded model would wait for a rank that has left
        self.searcher.can_stop = not self.crew.team.sharded
        self.together(self._load_probes)
        self.evaluating = Evaluating(
            self.search,
            self.request,
            self.config,
            self.adapters,
            self.heldout,
            self.flops,
            tasks=self.tasks,
            kernels=self.kernels,
            snapshot=self._snapshot,
            world=self.world,
            crew=self.crew,
            together=self.together,
            ledger=self.ledger,
            on_progress=self.status.add,
        )
        with self.evaluating.planned():
            measured = self._evaluate_all()
        self.status.enter(SearchStage.FITTING)
        self._on_leader(lambda: self._conclude(*measured))
        self.status.enter(SearchStage.PROPOSED)

    def _open(self) -> None:
        """Read the request, the held-out samples and the snapshot."""
        self.status.enter(SearchStage.PROBING, total=self.config.search.probes.steps)
        self.request: SearchRequest = self.search.request()
        settings = self.config.search
        # impossible shares are known before any probe is trained; the losses now are not
        unknown = np.ones(len(self.request.domains))
        require_feasible_shares(search_problem(self.request, settings.proposal, unknown))
        self.calibration = read_calibration(
            settings.calibration, self.request.domains, settings.candidates.interpolation
        )
        self.catalogue = open_domains(self.config, self.request.domains)
        self.heldout = held_out_samples(
            self.config.data,
            self.catalogue,
            samples_per_domain=settings.candidates.samples_per_domain,
            seed=self.config.seed,
        )
        self._tell_few_samples()
        self.tasks = self._take_tasks()
        with self.ledger.timed("load snapshot"):
            self.model = self._load_model()
        self.status.advance(0)
        per_model = self.config.pool.ranks_per_model
        self.kernels = chosen_kernels(settings.kernels, self.world.device, per_model)
        self.flops = count_flops(self.model, self.catalogue.sequence_length, settings.probes.rank)
        self.probes = ProbeGroups(
            self.search,
            self.request,
            self.config,
            self.catalogue,
            self.world,
            self.crew,
            kernels=self.kernels,
        )

    def _tell_few_samples(self) -> None:
        wanted = self.config.search.candidates.samples_per_domain
        counts = np.bincount(self.heldout.domain_ids.numpy(), minlength=len(self.request.domains))
        few = [f"{name} {n}" for name, n in zip(self.request.domains, counts, strict=True) if n < wanted]
        if few and self.world.is_leader:
            log.warning(
                "search.candidates.samples_per_domain is %d, but some domains have fewer held-out samples: "
                "%s. Errors are larger for it; prepare with more --eval-documents",
                wanted,
                ", ".join(few),
            )

    def _take_tasks(self) -> TaskMetric | None:
        """In place of the held-out samples of domains that have some, where error rates are compared."""
        if self.config.search.metric == "loss":
            return None
        if self.crew.team.sharded:
            raise SearchError("search.metric tasks needs whole models: set pool.ranks_per_model to 1")
        self.heldout, tasks = TaskMetric.instead(
            self.heldout,
            self.catalogue,
            self.config.search.tasks,
            mask=self.config.data.mask_documents,
            seed=self.config.seed,
        )
        if self.world.is_leader:
            write_record(self.search.path / TASKS_RECORD, tasks.record)
        return tasks

    @property
    def _snapshot(self) -> Path:
        """Folder of the base's files; of a checkpoint on the hub there is none."""
        return self.run_dir.path / self.request.snapshot

    def _load_model(self) -> PreTrainedModel:
        """Whole, or this rank's shards; does not communicate."""
        device, team = self.world.device, self.crew.team
        source = searched_source(self.run_dir.path, self.request, self.config, self.catalogue, device)
        return load(source, device, team.mesh(device) if team.sharded else None)

    def _require_documents_apart(self) -> None:
        """A pool may have another GPU and transformers than the trainers; all ranks of a team find the
        same."""
        model = self._module
        with self.crew.team.in_step(), self._evaluation_dtype(self.model):
            try:
                require_documents_apart(
                    lambda batch: sample_loss_sums(model, batch, 1),
                    vocab_size=self.model.config.get_text_config().vocab_size,
                    sequence_length=self.catalogue.sequence_length,
                    architecture=plain_class(model).__name__,
                    attention=self.config.model.attention,
                )
            except UserError as error:
                raise SearchError(str(error)) from None

    def _evaluation_dtype(self, model: PreTrainedModel) -> AbstractContextManager[object]:
        """Candidates differ by little, hence float32; but flash attention's kernels take none."""
        if not uses_flash_attention(cast(torch.nn.Module, model)):
            return nullcontext()
        return torch.autocast(self.world.device.type, getattr(torch, self.config.engine.param_dtype))

    def _probe(self) -> None:
        """Train what is missing of the probes. FLOPs and tokens are those of all, seconds of earlier attempts
        as they noted them."""
        missing = self.probes.missing()
        with self.ledger.timed("probes"):
            self.together(lambda: self.probes.train(self.model, missing, self.status.advance))
        tokens = len(self.request.components) * self.probes.tokens_each
        self.ledger.add("probes", flops=tokens * self.flops.probe(), tokens=tokens)
        self.together(lambda: self.ledger.add("probes", seconds=self.probes.earlier_seconds(missing)))

    def _load_probes(self) -> None:
        self.adapters = self.probes.load(self.model)

    def _evaluate_all(self) -> list[Evaluations]:
        """Collective. The search, and what its proposal is compared with: staying alone, staying like the
        proposal, the proposal. Begun again with smaller passes where memory runs out in spite of the plan:
        candidates that are compared are computed alike."""
        while True:
            try:
                self.evaluating.open()
                self.status.enter(SearchStage.EVALUATING, total=self._planned())
                self.base = self.evaluating.evaluate(np.zeros((1, len(self.request.components))))
                self._search()
                u = self._proposed()
                points = (staying(self.request), staying(self.request, like=u), u)
                return [self._evaluate(point[None]) for point in points]
            except PeerError:
                if not self.evaluating.shrink():
                    raise

    @property
    def _module(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self.model)

    def _on_leader(self, work: Callable[[], None]) -> None:
        """Collective. A failure of the leader is one of all ranks."""
        self.together(lambda: work() if self.world.is_leader else None)

    def _planned(self) -> int:
        """Samples of candidates that this rank's team may expect: base, all asks, staying twice, proposal;
        and before them what early stopping compares with."""
        settings, teams = self.config.search, self.crew.team.count
        if settings.method == "gradient":
            asked = settings.gradient.max_evaluations
        else:
            first = len(first_candidates(self.request, settings.candidates))
            rounds = settings.refinement.rounds
            asked = -(-first // teams) + rounds * -(-settings.refinement.count // teams)
        compared = settings.candidates.early_stop is not None and not settings.wants_gradients
        return (asked + 4 + compared) * len(self.heldout.batch)

    def _search(self) -> None:
        """The leader asks and is told; all ranks evaluate. Leaves the result on the leader."""
        settings, reference = self.config.search, self.base.losses.loss[0]
        self.problem: Problem = search_problem(self.request, settings.proposal, reference)
        started: list[MixtureSearch] = []
        self._on_leader(lambda: started.append(search_method(self.problem, self.request, settings)))
        method = started[0] if started else None
        wants = self.world.share(None if method is None else [float(method.wants_gradients)])
        gradients, parts = bool(wants[0]), []
        stopping = None if gradients else self._early_stop()
        while (U := self._asked(method)) is not None:
            found = self._evaluate(U, gradients=gradients, stopping=stopping)
            parts.append(found)
            with self.ledger.timed("fit"):
                self._on_leader(partial(self._tell, method, found))
        self._on_leader(lambda: self._keep(method, parts))
        self._tell_stopped(parts)

    def _early_stop(self) -> EarlyStop | None:
        """Collective. All candidates are compared with staying, which is evaluated first and in full; where
        it is a candidate itself, it is found evaluated."""
        confidence = self.config.search.candidates.early_stop
        if confidence is None:
            return None
        reference = self._evaluate(staying(self.request)[None])
        rule = EarlyStop(
            problem=self.problem,
            reference=reference.sums[0],
            targets=reference.targets,
            domain_ids=reference.domain_ids,
            num_domains=reference.num_domains,
            order=self.evaluating.order,
            confidence=confidence,
        )
        plan = self.evaluating.plan
        if self.world.is_leader and not rule.looks(plan.batch_size):
            log.warning(
                "search.candidates.early_stop stops nothing: of %d held-out samples, %d in a pass, no first "
                "half ends with a pass and has %d of every domain; lower search.candidates.batch_size, or "
                "raise search.candidates.samples_per_domain",
                len(reference.targets),
                plan.batch_size,
                LEAST_SEEN,
            )
        return rule

    def _tell_stopped(self, parts: Sequence[Evaluations]) -> None:
        stopped = sum(int(part.stopped.sum()) for part in parts)
        if stopped and self.world.is_leader:
            seen = np.concatenate([part.samples_seen for part in parts])
            log.info(
                "%d of %d candidates were stopped early; %.0f%% of all samples were evaluated",
                stopped,
                len(seen),
                100 * seen.mean(),
            )

    def _keep(self, method: MixtureSearch | None, parts: Sequence[Evaluations]) -> None:
        assert method is not None
        self.result: SearchResult = method.result()
        self.observations = method.observations
        self.measured = Evaluations.joined(parts)

    def _asked(self, method: MixtureSearch | None) -> np.ndarray | None:
        """Collective. U [m, K] of the leader's method on every rank, None when it is done."""
        found: list[np.ndarray | None] = []
        self._on_leader(lambda: found.append(method.ask() if method else None))
        numbers = None
        if self.world.is_leader:
            numbers = [] if found[0] is None else found[0].ravel().tolist()
        shared = self.world.share(numbers)
        return np.array(shared).reshape(-1, len(self.request.components)) if shared else None

    def _tell(self, method: MixtureSearch | None, found: Evaluations) -> None:
        """With errors of the changes from the snapshot: all candidates see the same samples, and what makes
        these hard for each of them says nothing about the law."""
        assert method is not None
        method.tell(found.losses.loss, found.changes_from(self.base).stderr, found.gradients)

    def _proposed(self) -> np.ndarray:
        """Collective. The proposal's coefficients u [K] on every rank."""
        return np.array(self.world.share(self.result.proposal.u.tolist() if self.world.is_leader else None))

    def _evaluate(
        self, U: np.ndarray, *, gradients: bool = False, stopping: EarlyStop | None = None
    ) -> Evaluations:
        """Collective. Losses of all rows of U on every rank, corrected where ``search.calibration`` says."""
        found = self.evaluating.evaluate(U, gradients=gradients, stopping=stopping)
        if self.calibration is None:
            return found
        return self.calibration.applied(found, U, self.base, self.request.domains)

    def _conclude(self, alone: Evaluations, stay: Evaluations, landed: Evaluations) -> None:
        """Error bars and decision; everything a reader needs is there before the status says so."""
        settings = self.config.search.proposal
        with self.ledger.timed("fit"):
            sampled = sampled_losses(self.result, self.request, settings, self.measured)
            bars = error_bars(self.result, self.problem, self.request, settings, sampled)
            optimism = overrated(self.result, self.problem, self.request, sampled)
        outcome = Outcome(
            request=self.request,
            settings=settings,
            problem=self.problem,
            result=self.result,
            observations=self.observations,
            measured=self.measured,
            base=self.base,
            alone=alone,
            stay=stay,
            landed=landed,
            sampled=sampled,
            bars=bars,
            optimism=optimism,
            horizon_tokens=self.probes.tokens_each,
            costs=self.ledger.costs,
            error_rates=() if self.tasks is None else list(self.tasks.by_domain),
        )
        write_outcome(self.search, outcome)
