"""One search from request to proposal: probes, candidates, laws, proposal.

Runs on the ranks of whichever role searches: the pool, or the trainers themselves (``pool.ranks: 0``).
Probes are divided over the ranks by component and candidates by row; ranks meet in files and in sums over
the role's process group. What a killed search had finished on disk is used again.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from opmix_dist.config import RunConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.build import held_out_samples, open_data, read_options
from opmix_dist.data.loader import EvalSet, MixtureLoader
from opmix_dist.distributed import PeerError, World
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import Fit, Proposal, SearchRequest, SearchStage
from opmix_dist.ledger import Ledger
from opmix_dist.models.build import load_snapshot
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.flops import count_flops
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import DomainLosses, sample_loss_sums, uses_flash_attention
from opmix_dist.pool.candidates import Method, cheaper_method, evaluate_candidates
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.probes import save_probe, train_probes
from opmix_dist.pool.status import StatusWriter
from opmix_dist.search.laws import LawFit, LogLinearLaw, Observations, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal as Solution
from opmix_dist.search.proposal import propose
from opmix_dist.search.simplex import OLD, sample_candidates
from opmix_dist.seeds import derive_seed

log = logging.getLogger(__name__)

# Failures whose message is for the user; any other exception is logged with its traceback too.
EXPECTED = (SearchError, UserError, ValueError, OSError)


class Searcher:
    """Answers requests. Every method is collective over the ranks of ``world``."""

    def __init__(self, run: RunDir, config: RunConfig, world: World) -> None:
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
        losses = self._evaluate(self.U, SearchStage.EVALUATING)
        base = self._evaluate(np.zeros((1, len(self.request.components))))
        solution = self._solve(losses)
        landed = self._evaluate(np.stack([solution, self.stay]))
        self.together(lambda: self._write(losses, base, landed) if self.world.is_leader else None)
        self.status.enter(SearchStage.PROPOSED)

    def _open(self) -> None:
        """Read the request, the held-out samples and the snapshot."""
        self.status.enter(SearchStage.PROBING, total=self.config.search.probes.steps)
        self.request: SearchRequest = self.search.request()
        settings = self.config.search
        self.catalogue = open_data(self.config.data, self.request.domains)
        self.heldout: EvalSet = held_out_samples(
            self.config.data,
            self.catalogue,
            samples_per_domain=settings.candidates.samples_per_domain,
            seed=self.config.seed,
        )
        self.snapshot: Path = self.run_dir.path / self.request.snapshot
        files.require_complete(self.snapshot, "snapshot")
        with self.ledger.timed("load snapshot"):
            self.model = self._load_model()
        self.status.advance(0)
        self.flops = count_flops(self.model, self.catalogue.sequence_length, settings.probes.rank)
        self.U = self._candidates()

    def _candidates(self) -> np.ndarray:
        """U [M, C]. The current mixture is one of them by default: Dirichlet draws over many components lie
        far from it, and a law that has to extrapolate to it misjudges what moving gains."""
        settings, count = self.config.search.candidates, len(self.request.components)
        fixed = self.stay[None] if settings.include_current else np.zeros((0, count))
        drawn = sample_candidates(
            count,
            settings.count - len(fixed),
            seed=derive_seed(self.request.seed, "candidates"),
            alpha=settings.dirichlet_alpha,
        )
        return np.vstack([fixed, drawn])

    @property
    def stay(self) -> np.ndarray:
        """Coefficients [C] of going on as before: the component `old` alone."""
        return np.eye(len(self.request.components))[self.request.components.index(OLD)]

    def _load_model(self) -> PreTrainedModel:
        model = load_snapshot(
            self.snapshot,
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
        """Train the groups of probes that are not on disk whole, this rank its own.

        A group is trained again as a whole: the shapes of its products, and with them the last digits of
        its results, do not depend on where an earlier attempt was killed.
        """
        groups = self._groups()
        plan = ",".join(str(i) for i, names in enumerate(groups) if not self._is_trained(names))
        todo = self.world.share_text(plan if self.world.is_leader else None)  # one view of the file system
        chosen = [groups[int(i)] for i in todo.split(",") if i]
        with self.ledger.timed("probes"):
            self.together(lambda: self._train_groups(chosen))
        self.together(lambda: self._count_probes(chosen))

    def _groups(self) -> list[list[str]]:
        """Components that are trained jointly; group i belongs to rank i modulo the number of ranks."""
        size, most = self.world.size, self.config.search.probes.max_joint
        names = self.request.components
        count = size * math.ceil(len(names) / (size * most))
        return [group for i in range(count) if (group := names[i::count])]

    def _is_trained(self, names: list[str]) -> bool:
        return all(files.is_complete(self.search.probe(name)) for name in names)

    def _train_groups(self, chosen: list[list[str]]) -> None:
        for index, names in enumerate(self._groups()):
            if names in chosen and index % self.world.size == self.world.rank:
                self._train_probes(names)

    def _count_probes(self, trained: list[list[str]]) -> None:
        """FLOPs and tokens of all probes; seconds of earlier attempts as they noted them."""
        tokens = len(self.request.components) * self._probe_tokens()
        self.ledger.add("probes", flops=tokens * self.flops.probe(), tokens=tokens)
        for names in self._groups():
            if names not in trained:
                noted = files.require_complete(self.search.probe(names[0]), "probe")
                self.ledger.add("probes", seconds=float(noted["group_seconds"]))

    def _train_probes(self, names: list[str]) -> None:
        start = time.perf_counter()
        dtype = self.config.engine.param_dtype
        adapters, curves = train_probes(
            self.model,
            {name: self._batches(name) for name in names},
            self.config.search.probes,
            base_lr=self.request.base_lr,
            betas=self.config.optimizer.betas,
            seeds={name: derive_seed(self.request.seed, "probe", name) for name in names},
            on_step=self.status.advance,
            autocast_dtype=None if dtype == "float32" else getattr(torch, dtype),
        )
        seconds = time.perf_counter() - start
        for name in names:
            save_probe(adapters, name, curves[name], self.search.probe(name), self.request.snapshot, seconds)
        adapters.remove()

    def _batches(self, component: str) -> Iterator[TokenBatch]:
        """Training samples in the component's proportions, in an order of the component's own."""
        row = self.request.composition[self.request.components.index(component)]
        loader = MixtureLoader(
            self.catalogue,
            dict(zip(self.request.domains, row, strict=True)),
            global_batch_size=self.config.search.probes.batch_size,
            rank=0,
            world_size=1,
            seed=derive_seed(self.request.seed, "probe data", component),
            shuffle_block=self.config.data.shuffle_block,
            reading=read_options(self.config.data),
        )
        try:
            for loaded in loader:
                yield loaded.batch
        finally:  # when the probe is trained and nobody asks for more
            loader.close()

    def _probe_tokens(self) -> int:
        probes = self.config.search.probes
        return probes.steps * probes.batch_size * self.catalogue.sequence_length

    def _load_probes(self) -> None:
        probes = self.config.search.probes
        names = self.request.components
        self.adapters = JointAdapters(
            self.model, names, rank=probes.rank, alpha=probes.alpha, seeds=[0] * len(names)
        )
        for index, name in enumerate(names):
            self.adapters.load_peft(index, self.search.probe(name))

    def _evaluate(self, U: np.ndarray, stage: SearchStage | None = None) -> DomainLosses:
        """Losses of all rows of U on every rank; each rank simulates its share of them."""
        if stage is not None:
            self.status.enter(stage, total=len(range(0, len(U), self.world.size)))
        mine = np.arange(self.world.rank, len(U), self.world.size)
        num_domains = len(self.request.domains)
        found: list[DomainLosses] = []
        with self.ledger.timed("evaluation"):
            self.together(lambda: found.append(self._simulate(U[mine])))
            shared = torch.zeros(2, len(U), num_domains, dtype=torch.float64)
            shared[:, mine] = torch.from_numpy(np.stack([found[0].loss, found[0].stderr]))
            loss, stderr = self.world.sum(shared).numpy()
        self._count_evaluation(len(U))
        return DomainLosses(loss, stderr, found[0].targets)

    def _simulate(self, U: np.ndarray) -> DomainLosses:
        candidates = self.config.search.candidates
        with self._evaluation_dtype(self.model):
            return evaluate_candidates(
                self.adapters,
                U,
                self.heldout.batch,
                self.heldout.domain_ids,
                len(self.request.domains),
                method=self._method(),
                batch_size=candidates.batch_size,
                joint=candidates.joint,
                on_progress=self.status.advance,
            )

    def _method(self) -> Method:
        chosen = self.config.search.candidates.method
        if chosen != "auto":
            return chosen
        return cheaper_method(self.flops, len(self.request.components), self.heldout.batch.tokens.numel())

    def _count_evaluation(self, candidates: int) -> None:
        components, tokens = len(self.request.components), candidates * self.heldout.batch.tokens.numel()
        flops = (
            tokens * self.flops.lowrank_candidate(components)
            if self._method() == "lowrank"
            else tokens * self.flops.forward + candidates * components * self.flops.merge_per_adapter
        )
        self.ledger.add("evaluation", flops=flops, tokens=tokens)

    def _solve(self, losses: DomainLosses) -> np.ndarray:
        """Fit and propose on the leader; the proposal's coefficients u [C] on every rank."""
        self.status.enter(SearchStage.FITTING)
        with self.ledger.timed("fit"):
            self.together(lambda: self._fit_and_propose(losses) if self.world.is_leader else None)
        return np.array(self.world.share(self.solution.u.tolist() if self.world.is_leader else None))

    def _fit_and_propose(self, losses: DomainLosses) -> None:
        settings, request = self.config.search, self.request
        self.fit: LawFit = fit_law(
            Observations(
                self.U, losses.loss, composition=np.array(request.composition), names=request.domains
            ),
            huber_delta=settings.law.huber_delta,
            num_starts=settings.law.num_starts,
            seed=derive_seed(request.seed, "law"),
        )
        assert isinstance(self.fit.law, LogLinearLaw)
        omega = settings.proposal.omega
        self.solution: Solution = propose(
            self.fit.law,
            Problem(
                np.array(request.composition),
                prior=np.array([request.prior[d] for d in request.domains]),
                kl=settings.proposal.kl,
                omega=None if omega is None else np.array([omega[d] for d in request.domains]),
                caps=None if request.caps is None else np.array(request.caps),
                expansion=settings.proposal.expansion,
                domains=request.domains,
                losses=request.domains,
            ),
        )

    def _write(self, losses: DomainLosses, base: DomainLosses, landed: DomainLosses) -> None:
        """Everything a reader needs is there before the status says so."""
        self._write_candidates(losses, base, landed)
        write_record(self.search.fit_file, self._fit_record())
        write_record(self.search.proposal_file, self._proposal_record(base, landed))

    def _write_candidates(self, losses: DomainLosses, base: DomainLosses, landed: DomainLosses) -> None:
        """candidates.parquet: a row per candidate and domain."""
        count, components = self.U.shape
        rows: list[dict[str, object]] = []
        snapshot = np.zeros((1, components))
        for kind, numbers, U, measured in (
            ("candidate", range(count), self.U, losses),
            ("snapshot", [-1], snapshot, base),
            ("proposal", [count], self.solution.u[None], landed),
        ):
            for m, number in enumerate(numbers):
                rows += self._candidate_rows(kind, number, U[m], measured, m)
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        files.write_bytes(self.search.candidates_file, buffer.getvalue().to_pybytes())

    def _candidate_rows(
        self, kind: str, number: int, u: np.ndarray, measured: DomainLosses, m: int
    ) -> Iterator[dict[str, object]]:
        request = self.request
        x = u @ np.array(request.composition)
        common: dict[str, object] = {"candidate": number, "kind": kind}
        common |= {f"u_{name}": float(value) for name, value in zip(request.components, u, strict=True)}
        common |= {f"x_{name}": float(value) for name, value in zip(request.domains, x, strict=True)}
        for d, domain in enumerate(request.domains):
            yield common | {
                "domain": domain,
                "loss": float(measured.loss[m, d]),
                "stderr": float(measured.stderr[m, d]),
                "tokens": int(measured.targets[d]),
            }

    def _fit_record(self) -> Fit:
        fit, law = self.fit, self.fit.law
        assert isinstance(law, LogLinearLaw)
        return Fit(
            domains=self.request.domains,
            components=self.request.components,
            log_c=law.log_c.tolist(),
            t=law.t.tolist(),
            r2=_finite(fit.r2),
            spearman=_finite(fit.spearman),
            loo_error=_finite(fit.loo_error),
            warnings=list(fit.warnings),
        )

    def _proposal_record(self, base: DomainLosses, landed: DomainLosses) -> Proposal:
        request, solution = self.request, self.solution

        def by_domain(values: np.ndarray) -> dict[str, float]:
            return dict(zip(request.domains, map(float, values), strict=True))

        return Proposal(
            search=request.search,
            step=request.step,
            coefficients=dict(zip(request.components, map(float, solution.u), strict=True)),
            weights=by_domain(solution.mixture),
            current=request.current,
            predicted=by_domain(solution.predicted),
            simulated=by_domain(landed.loss[0]),
            snapshot=by_domain(base.loss[0]),
            predicted_current=by_domain(self.fit.law.predict(self.stay[None])[0]),
            simulated_current=by_domain(landed.loss[1]),
            objective=float(solution.objective),
            kl=_finite(np.array([solution.kl_divergence]))[0],
            horizon_tokens=self._probe_tokens(),
            costs=self.ledger.costs,
            warnings=list(self.fit.warnings),
        )


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
