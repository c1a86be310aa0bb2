"""The candidates of one search: planned once, simulated on all ranks, counted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from opmix_dist.config import SharedConfig
from opmix_dist.data.loader import EvalSet
from opmix_dist.distributed import World
from opmix_dist.exchange.rundir import SearchDir, write_record
from opmix_dist.exchange.schemas import EvaluationPlan, SearchRequest
from opmix_dist.ledger import Ledger
from opmix_dist.models.compute import Compute
from opmix_dist.models.flops import FlopCounts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.peft_files import ADAPTER_FILE
from opmix_dist.pool.candidates import simulate_sums, simulate_with_gradients
from opmix_dist.pool.early_stop import EarlyStop
from opmix_dist.pool.errors import AgreedError, BrokenTeamError, SearchError
from opmix_dist.pool.evaluation_files import identity_of
from opmix_dist.pool.evaluations import Evaluations, Evaluator, Measurement, Work
from opmix_dist.pool.interpolation import Interpolation
from opmix_dist.pool.plan import Planner, chosen_dtype, halved
from opmix_dist.pool.stream import stratified_order
from opmix_dist.pool.task_metric import TaskMetric
from opmix_dist.pool.team import Crew, Team
from opmix_dist.pool.trials import Trials

log = logging.getLogger(__name__)


class Evaluating:
    """Evaluates what it is asked within :meth:`planned`, after :meth:`open`.

    Args:
        tasks: those that are rows of ``heldout``, if there are any.
        kernels: whether Triton kernels compute.
        snapshot: folder of the base's files, if there is one.
        together: runs what may fail on one rank, and raises PeerError on all ranks then.
        on_progress: told how many samples of candidates are done.
    """

    def __init__(
        self,
        search: SearchDir,
        request: SearchRequest,
        config: SharedConfig,
        adapters: JointAdapters,
        heldout: EvalSet,
        flops: FlopCounts,
        *,
        tasks: TaskMetric | None = None,
        kernels: bool,
        snapshot: Path,
        world: World,
        crew: Crew,
        together: Callable[[Callable[[], None]], None],
        ledger: Ledger,
        on_progress: Callable[[int], None],
    ) -> None:
        self.search, self.request, self.config = search, request, config
        self.adapters, self.heldout, self.flops, self.tasks = adapters, heldout, flops, tasks
        self.kernels, self.snapshot = kernels, snapshot
        self.world, self.crew, self.together, self.ledger = world, crew, together, ledger
        self.on_progress = on_progress
        self.order = stratified_order(heldout.domain_ids.numpy())
        self.plan: EvaluationPlan
        self.evaluator: Evaluator
        self.interpolation: Interpolation
        self.out_of_memory = False

    @contextmanager
    def planned(self) -> Iterator[None]:
        """Collective. Inside, the model computes as the search's plan says."""
        with ExitStack() as stack:
            entered: list[str] = []

            def enter() -> None:
                dtype = chosen_dtype(self.config, self.world.device, self.adapters.model)
                stack.enter_context(self.adapters.computing(Compute(getattr(torch, dtype), self.kernels)))
                entered.append(dtype)

            self.together(enter)
            with self.ledger.timed("trials"):
                text = self._on_leader(lambda: self._decide(entered[0]).model_dump_json())
            self.plan = EvaluationPlan.model_validate_json(text)
            self.together(lambda: self._require_alike(entered[0]))
            yield

    def _require_alike(self, dtype: str) -> None:
        """Ranks that computed in another way would give other digits."""
        if (self.plan.dtype, self.plan.kernels) != (dtype, self.kernels):
            raise SearchError(
                f"this rank computes in {dtype} {'with' if self.kernels else 'without'} Triton kernels, the "
                "first one does not: set search.kernels and search.candidates.dtype"
            )

    def _decide(self, dtype: str) -> EvaluationPlan:
        trials = Trials(self.adapters, self.heldout, self.flops, on_run=lambda: self.on_progress(0))
        settings = self.config.search
        planner = Planner(
            self.search.plan_file,
            trials,
            self.flops,
            settings.candidates,
            dtype=dtype,
            kernels=self.kernels,
            sharded=self.crew.team.sharded,
        )
        plan = planner.decide(gradients=settings.wants_gradients)
        self.ledger.add("trials", flops=trials.flops, tokens=trials.tokens)
        return plan

    def open(self) -> None:
        """Collective. What was evaluated by this plan before is found again."""
        self.out_of_memory = False
        self.interpolation = Interpolation.of(self.config.search.candidates.interpolation, self.adapters)
        self.evaluator = Evaluator(
            self.search.evaluations,
            self._on_leader(self._identity),
            self.heldout,
            len(self.request.domains),
            world=self.world,
            crew=self.crew,
            joint=self.plan.joint,
            passes=self._passes,
            together=self.together,
            simulate=self._simulate,
            on_progress=self.on_progress,
        )

    def _passes(self, gradients: bool) -> int:
        """Of a group of candidates."""
        size = self.plan.gradient_batch_size if gradients else self.plan.batch_size
        assert size is not None
        return -(-len(self.heldout.batch) // size)

    def _identity(self) -> str:
        plan, names = self.plan, self.request.components
        return identity_of(
            self.request.snapshot,
            self.snapshot if self.snapshot.is_dir() else None,
            (self.search.probe(name) / ADAPTER_FILE for name in names),
            self.heldout,
            (plan.method, plan.joint, plan.batch_size, plan.dtype, plan.kernels),
            self.config.model.attention,
            *(() if self.interpolation.gram is None else ("norm",)),
            *(() if self.tasks is None else (self.tasks.fingerprint,)),
        )

    def _on_leader(self, work: Callable[[], str]) -> str:
        """Collective. The leader's text on every rank; a failure of the leader is one of all ranks."""
        found: list[str] = []
        self.together(lambda: found.append(work()) if self.world.is_leader else None)
        return self.world.share_text(found[0] if found else None)

    def shrink(self) -> bool:
        """Collective, after a failure. Whether memory ran out on a rank and the plan has smaller passes now;
        what is evaluated by it is evaluated anew."""
        ran_out = bool(self.world.sum(torch.tensor([float(self.out_of_memory)])).item())
        smaller = halved(self.plan) if ran_out else None
        if smaller is None:
            return False
        self.plan = smaller
        if self.world.is_leader:
            log.warning(
                "out of memory: the evaluation begins again with %d candidates of %d samples in a pass",
                smaller.joint,
                smaller.batch_size,
            )
        self.together(lambda: write_record(self.search.plan_file, smaller) if self.world.is_leader else None)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def evaluate(
        self, U: np.ndarray, *, gradients: bool = False, stopping: EarlyStop | None = None
    ) -> Evaluations:
        """Collective. Losses of the rows of U [M, K] on every rank; as ``Evaluator.evaluate``."""
        evaluator = self.evaluator
        earlier, before = evaluator.earlier_seconds, copy.copy(evaluator.work[gradients])
        with self.ledger.timed("evaluation"):
            found = evaluator.evaluate(U, gradients=gradients, stopping=stopping)
        self.ledger.add("evaluation", seconds=evaluator.earlier_seconds - earlier)
        self._count(before, evaluator.work[gradients], gradients)
        return found if self.tasks is None else found.clustered(self.tasks.clusters)

    def _simulate(
        self, U: np.ndarray, gradients: bool, stopping: EarlyStop | None, team: Team
    ) -> Measurement:
        """Of the rows of U."""
        try:
            return self._differentiated(U, team) if gradients else self._simulated(U, stopping, team)
        except (torch.OutOfMemoryError, AgreedError) as error:
            if torch.OutOfMemoryError not in (type(error), type(error.__cause__)):
                raise
            self.out_of_memory = True
            if team.sharded:
                self._leave_a_smaller_plan()
            raise SearchError(
                f"out of memory with {self.plan.joint} candidates of {self.plan.batch_size} samples in a pass"
            ) from None

    def _leave_a_smaller_plan(self) -> None:
        """The other ranks of the team wait in the midst of a pass, and this one has to end: what is started
        again in its place goes on with the half. All ranks that run out write the same."""
        smaller = halved(self.plan)
        if smaller is not None:
            write_record(self.search.plan_file, smaller)
        raise BrokenTeamError("out of memory")

    def _differentiated(self, U: np.ndarray, team: Team) -> Measurement:
        assert self.plan.gradient_batch_size is not None
        found = simulate_with_gradients(
            self.adapters,
            self.interpolation.coefficients(U),
            self.heldout.batch,
            self.heldout.domain_ids,
            len(self.request.domains),
            batch_size=self.plan.gradient_batch_size,
            team=team,
            on_progress=self.on_progress,
        )
        return found.sums, None, self.interpolation.gradients(U, found.gradients)

    def _simulated(self, U: np.ndarray, stopping: EarlyStop | None, team: Team) -> Measurement:
        coefficients = self.interpolation.coefficients(U)
        if self.tasks is not None:
            sums = self.tasks.sums(
                self.adapters,
                coefficients,
                self.heldout.batch,
                batch_size=self.plan.batch_size,
                on_progress=self.on_progress,
            )
            return sums, None, None
        found = simulate_sums(
            self.adapters,
            coefficients,
            self.heldout.batch,
            method=self.plan.method,
            batch_size=self.plan.batch_size,
            joint=self.plan.joint,
            order=self.order,
            stopping=stopping,
            team=team,
            on_progress=self.on_progress,
        )
        return found.sums, found.seen, None

    def _count(self, before: Work, after: Work, gradients: bool) -> None:
        """Collective. What was evaluated in between, in tokens and FLOPs, to the ledger."""
        components = len(self.request.components)
        candidates = after.candidates - before.candidates
        tokens = (after.samples - before.samples) * self.heldout.batch.sequence_length
        if self.tasks is not None:
            tokens = candidates * len(self.tasks.loss_rows) * self.heldout.batch.sequence_length
            tokens += int(self.world.sum(torch.tensor([self.tasks.take_tokens()])))
            flops = tokens * self.flops.forward + candidates * components * self.flops.merge_per_adapter
        elif gradients:
            flops = tokens * self.flops.candidate_gradients(components)
        elif self.plan.method == "lowrank":
            flops = tokens * self.flops.lowrank_candidate(components)
        else:
            flops = tokens * self.flops.forward + candidates * components * self.flops.merge_per_adapter
        self.ledger.add("evaluation", flops=flops, tokens=tokens)
