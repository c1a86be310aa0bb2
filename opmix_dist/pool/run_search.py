"""One search from request to proposal: probes, candidates, laws, proposal.

Runs on the ranks of whichever role searches: the pool, the trainers themselves (``pool.ranks: 0``), or a
launch that does nothing else (``opmix search``). Probes are divided over the ranks by component and
candidates by row; ranks meet in files and in sums over the role's process group. What a killed search had
finished on disk is used again.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.build import held_out_samples, open_data
from opmix_dist.distributed import PeerError, World
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir
from opmix_dist.exchange.schemas import SearchRequest, SearchStage
from opmix_dist.ledger import Ledger
from opmix_dist.models.build import build_model, load_snapshot
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.flops import count_flops
from opmix_dist.models.lora import ADAPTER_FILE, require_adaptable
from opmix_dist.models.loss import sample_loss_sums, uses_flash_attention
from opmix_dist.pool.candidates import Method, cheaper_method, simulate_sums, simulate_with_gradients
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.evaluations import Evaluations, Evaluator, identity_of
from opmix_dist.pool.probe_groups import ProbeGroups
from opmix_dist.pool.records import Outcome, write_outcome
from opmix_dist.pool.requests import staying
from opmix_dist.pool.solving import error_bars, overrated, sampled_losses, search_method, search_problem
from opmix_dist.pool.status import StatusWriter
from opmix_dist.search.ask_tell import MixtureSearch, SearchResult
from opmix_dist.search.feasibility import require_feasible_shares
from opmix_dist.search.problem import Problem

log = logging.getLogger(__name__)

# Failures whose message is for the user; any other exception is logged with its traceback too.
EXPECTED = (SearchError, UserError, ValueError, OSError)


class Searcher:
    """Answers requests. Every method is collective over the ranks of ``world``."""

    def __init__(self, run: RunDir, config: SharedConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world

    def answer(self, search: SearchDir) -> None:
        """Write proposal.json and status ``proposed``, or status ``failed`` with the reason."""
        status = StatusWriter(search, writes=self.world.is_leader)
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
        """Run ``work``, which must not communicate; if it fails on one rank, raise PeerError on all. Whatever
        can fail on one rank only runs in here.

        Any exception counts: a search never takes its rank down. A rank that is killed does not get here;
        its peers fail in ``agree``, and the supervisors start all workers again.
        """
        failure = None
        try:
            work()
        except EXPECTED as error:
            failure = str(error) or type(error).__name__
        except Exception as error:
            log.exception("search failed on %s rank %d", self.world.role, self.world.rank)
            failure = f"{type(error).__name__}: {error}"
        self.world.agree(failure)


class _Search:
    def __init__(self, searcher: Searcher, search: SearchDir, status: StatusWriter) -> None:
        self.run_dir, self.config, self.world = searcher.run, searcher.config, searcher.world
        self.search, self.status = search, status
        self.ledger = Ledger(self.world.size)
        self.together = searcher._together

    def run(self) -> None:
        self.together(self._open)
        self._probe()
        self.together(self._load_probes)
        self._open_evaluations()
        self.status.enter(SearchStage.EVALUATING, total=self._planned())
        self.base = self._evaluate(np.zeros((1, len(self.request.components))))
        self._search()
        u = self._proposed()
        points = (staying(self.request), staying(self.request, like=u), u)
        measured = [self._evaluate(point[None]) for point in points]
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
        self.catalogue = open_data(self.config.data, self.request.domains)
        self.heldout = held_out_samples(
            self.config.data,
            self.catalogue,
            samples_per_domain=settings.candidates.samples_per_domain,
            seed=self.config.seed,
        )
        self._tell_few_samples()
        with self.ledger.timed("load snapshot"):
            self.model = self._load_model()
        self.status.advance(0)
        self.flops = count_flops(self.model, self.catalogue.sequence_length, settings.probes.rank)
        self.probes = ProbeGroups(self.search, self.request, self.config, self.catalogue, self.world)

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

    @property
    def _snapshot(self) -> Path:
        """Folder of the base's files; of a checkpoint on the hub there is none."""
        return self.run_dir.path / self.request.snapshot

    def _load_model(self) -> PreTrainedModel:
        if self.request.is_checkpoint:
            vocabulary = self.catalogue.vocab_size
            model = build_model(self.config.model, vocab_size=vocabulary, token_ids={}, seed=self.config.seed)
            require_adaptable(model)
        else:
            files.require_complete(self._snapshot, "snapshot")
            model = load_snapshot(
                self._snapshot,
                attention=self.config.model.attention,
                trust_remote_code=self.config.model.trust_remote_code,
            )
        cast(torch.nn.Module, model).to(self.world.device).eval()
        if self.config.data.mask_documents:  # a pool may have another GPU and transformers than the trainers
            with self._evaluation_dtype(model):
                require_documents_apart(
                    lambda batch: sample_loss_sums(model, batch, 1),
                    vocab_size=model.config.get_text_config().vocab_size,
                    sequence_length=self.catalogue.sequence_length,
                    architecture=type(model).__name__,
                    attention=self.config.model.attention,
                )
        return model

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

    def _open_evaluations(self) -> None:
        """Collective."""
        found: list[str] = []
        self._on_leader(lambda: found.append(self._identity()))
        identity = self.world.share_text(found[0] if found else None)
        self.evaluator = Evaluator(
            self.search.evaluations,
            identity,
            self.heldout,
            len(self.request.domains),
            world=self.world,
            joint=self.config.search.candidates.joint if self._method() == "lowrank" else 1,
            together=self.together,
            simulate=self._simulate,
        )

    def _identity(self) -> str:
        folder = self._snapshot if self._snapshot.is_dir() else None
        adapters = (self.search.probe(name) / ADAPTER_FILE for name in self.request.components)
        dtype = self.config.engine.param_dtype if uses_flash_attention(self._module) else "float32"
        attention = self.config.model.attention
        return identity_of(
            self.request.snapshot, folder, adapters, self.heldout, self._method(), dtype, attention
        )

    @property
    def _module(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self.model)

    def _on_leader(self, work: Callable[[], None]) -> None:
        """Collective. A failure of the leader is one of all ranks."""
        self.together(lambda: work() if self.world.is_leader else None)

    def _planned(self) -> int:
        """Evaluations that this rank may expect: the base, all asks, staying twice, the proposal."""
        settings = self.config.search
        asked = settings.candidates.count + settings.refinement.rounds * settings.refinement.count
        if settings.method == "gradient":
            return settings.gradient.max_evaluations + 4
        return -(-asked // self.world.size) + 4

    def _search(self) -> None:
        """The leader asks and is told; all ranks evaluate. Leaves the result on the leader."""
        settings, reference = self.config.search, self.base.losses.loss[0]
        self.problem: Problem = search_problem(self.request, settings.proposal, reference)
        started: list[MixtureSearch] = []
        self._on_leader(lambda: started.append(search_method(self.problem, self.request, settings)))
        method = started[0] if started else None
        wants = self.world.share(None if method is None else [float(method.wants_gradients)])
        gradients, parts = bool(wants[0]), []
        while (U := self._asked(method)) is not None:
            found = self._evaluate(U, gradients=gradients)
            parts.append(found.sums)
            with self.ledger.timed("fit"):
                self._on_leader(partial(self._tell, method, found))
        self._on_leader(lambda: self._keep(method, parts))

    def _keep(self, method: MixtureSearch | None, sums: list[np.ndarray]) -> None:
        assert method is not None
        self.result: SearchResult = method.result()
        self.observations = method.observations
        self.measured = dataclasses.replace(self.base, sums=np.concatenate(sums))

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

    def _evaluate(self, U: np.ndarray, *, gradients: bool = False) -> Evaluations:
        """Collective. Losses of all rows of U on every rank."""
        earlier = self.evaluator.earlier_seconds
        with self.ledger.timed("evaluation"):
            found = self.evaluator.evaluate(U, gradients=gradients)
        self.ledger.add("evaluation", seconds=self.evaluator.earlier_seconds - earlier)
        self._count_evaluation(self.evaluator.new(U), gradients)
        return found

    def _simulate(self, U: np.ndarray, gradients: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Sums [m, N] and gradients [m, D, K] of the rows of U."""
        settings = self.config.search.candidates
        with self._evaluation_dtype(self.model):
            if gradients:
                found = simulate_with_gradients(
                    self.adapters,
                    U,
                    self.heldout.batch,
                    self.heldout.domain_ids,
                    len(self.request.domains),
                    batch_size=settings.batch_size,
                    on_progress=self.status.advance,
                )
                return found.sums, found.gradients
            sums = simulate_sums(
                self.adapters,
                U,
                self.heldout.batch,
                method=self._method(),
                batch_size=settings.batch_size,
                joint=settings.joint,
                on_progress=self.status.advance,
            )
            return sums, None

    def _method(self) -> Method:
        chosen = self.config.search.candidates.method
        if chosen != "auto":
            return chosen
        return cheaper_method(self.flops, len(self.request.components), self.heldout.batch.tokens.numel())

    def _count_evaluation(self, candidates: int, gradients: bool) -> None:
        components, tokens = len(self.request.components), candidates * self.heldout.batch.tokens.numel()
        if (
            gradients
        ):  # a backward pass to activations costs a forward pass, and the adapters' three of theirs
            flops = tokens * (2 * self.flops.forward + 3 * components * self.flops.lora_per_adapter)
        elif self._method() == "lowrank":
            flops = tokens * self.flops.lowrank_candidate(components)
        else:
            flops = tokens * self.flops.forward + candidates * components * self.flops.merge_per_adapter
        self.ledger.add("evaluation", flops=flops, tokens=tokens)

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
        )
        write_outcome(self.search, outcome)
