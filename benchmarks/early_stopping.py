"""What stopping clearly bad candidates early saves, and what it costs.

    python -m benchmarks.early_stopping [--quick] [--out benchmarks/results/early_stopping.md]

The default search (`old`, 11 Sobol points, laws, 2 rounds of 4), with its candidates evaluated in full and
stopped early. Regret is the objective (mean loss + 0.05 KL to the uniform mixture, nats per token) at the
proposal, less the least there is; all of it on the held-out samples themselves, so that a search that sees
all of them has no noise, and what differs comes of stopping. Samples evaluated are those that the candidates
of a search saw, over what they would have seen in full; ``old`` is among the candidates.

1. Synthetic samples: 6 domains of 64 samples. A sample's loss is its domain's, plus how hard it is (0.5
   nats), plus a random slope in u of its own (``SPREAD`` nats between two components).
2. Real probes: those of ``benchmarks.search_methods``, with 32 held-out samples per domain.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from benchmarks.machine import describe, mean_and_deviation, table
from benchmarks.simulated import SimulatedLosses
from opmix_dist.config import DataConfig
from opmix_dist.data.build import held_out_samples
from opmix_dist.models.loss import losses_by_domain
from opmix_dist.pool.candidates import simulate_sums, simulate_with_gradients
from opmix_dist.pool.early_stop import EarlyStop
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.stream import stratified_order
from opmix_dist.search.methods import LawSearch
from opmix_dist.search.problem import Problem
from opmix_dist.search.simplex import sobol_candidates
from tests.search.truths import PowerTruth, Truth, least_total, log_linear_truth, rebalance

ROOT = Path(__file__).parent.parent
DOMAINS, SAMPLES, REAL_SAMPLES, REAL_SEEDS = 6, 64, 32, 3
HARDNESS, SPREAD = 0.5, 0.1
BATCH = 4
"""Samples in a pass; looks are at ends of passes."""
CONFIDENCES = (None, 0.9, 0.99, 0.999)


class Samples(Protocol):
    """Held-out samples of one target each, and the sums of any candidates on them."""

    domain_ids: np.ndarray
    targets: np.ndarray
    num_domains: int

    def sums(self, candidates: np.ndarray) -> np.ndarray:
        """[M, N] at U [M, K]."""


@dataclass
class SyntheticSamples:
    """Whose means by domain are exactly the truth's losses."""

    truth: Truth
    num_components: int
    seed: int
    num_domains: int = DOMAINS

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 4])
        self.domain_ids = np.repeat(np.arange(self.num_domains), SAMPLES)
        self.targets = np.ones(len(self.domain_ids), dtype=np.int64)
        self.hardness = self._centred(HARDNESS * rng.standard_normal((len(self.targets), 1)))[:, 0]
        slopes = SPREAD / np.sqrt(2) * rng.standard_normal((len(self.targets), self.num_components))
        self.slopes = self._centred(slopes)

    def _centred(self, values: np.ndarray) -> np.ndarray:
        by_domain = values.reshape(self.num_domains, SAMPLES, -1)
        return (by_domain - by_domain.mean(axis=1, keepdims=True)).reshape(values.shape)

    def sums(self, candidates: np.ndarray) -> np.ndarray:
        losses = self.truth.predict(candidates)[:, self.domain_ids]
        return losses + self.hardness + candidates @ self.slopes.T


@dataclass
class RealSamples:
    """Of the simulated models of real probes; what was simulated is kept."""

    losses: SimulatedLosses
    root: Path
    found: dict[bytes, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heldout = held_out_samples(
            DataConfig(root=str(self.root)), self.losses.catalogue, samples_per_domain=REAL_SAMPLES, seed=1
        )
        self.domain_ids = self.heldout.domain_ids.numpy()
        self.targets = self.heldout.batch.targets.numpy()
        self.num_domains = len(self.losses.domains)

    def sums(self, candidates: np.ndarray) -> np.ndarray:
        for u in candidates:
            if u.tobytes() not in self.found:
                one = simulate_sums(
                    self.losses.adapters, u[None], self.heldout.batch, method="merge", batch_size=16
                )
                self.found[u.tobytes()] = one.sums[0]
        return np.stack([self.found[u.tobytes()] for u in candidates])

    def predict(self, candidates: np.ndarray) -> np.ndarray:
        return losses_by_domain(self.sums(candidates), self.targets, self.domain_ids, self.num_domains).loss

    def gradient(self, u: np.ndarray) -> np.ndarray:
        batch, ids = self.heldout.batch, self.heldout.domain_ids
        found = simulate_with_gradients(
            self.losses.adapters, u[None], batch, ids, self.num_domains, batch_size=16
        )
        return found.gradients[0]


@dataclass(frozen=True)
class Case:
    problem: Problem
    samples: Samples
    least: float


@dataclass(frozen=True)
class Searched:
    """u: of the proposal; stopped, asked: candidates; evaluated: share of the samples; best_stopped: whether
    the best of all candidates was one that was stopped."""

    u: np.ndarray
    stopped: int
    asked: int
    evaluated: float
    best_stopped: bool


def search(case: Case, seed: int, confidence: float | None) -> Searched:
    """As ``opmix_dist.pool.run_search`` does, but that the samples' losses are known before."""
    problem, samples = case.problem, case.samples
    count = len(problem.composition)
    old = np.eye(count)[0]
    base = _measured(samples, np.zeros((1, count)))
    reference = _measured(samples, old[None])
    rule = None
    if confidence is not None:
        rule = EarlyStop(
            problem=problem,
            reference=reference.sums[0],
            targets=samples.targets,
            domain_ids=samples.domain_ids,
            num_domains=samples.num_domains,
            order=stratified_order(samples.domain_ids),
            confidence=confidence,
        )
    method = LawSearch(
        problem,
        np.vstack([old, sobol_candidates(count, 11, seed=seed)]),
        seed=seed,
        refine_rounds=2,
        refine_count=4,
    )
    parts, asked = [], []
    while (U := method.ask()) is not None:
        found = _measured(samples, U, rule)
        method.tell(found.losses.loss, found.changes_from(base).stderr)
        parts.append(found)
        asked.append(U)
    seen = np.concatenate([part.samples_seen for part in parts])
    stopped = np.concatenate([part.stopped for part in parts])
    candidates = np.concatenate(asked)
    in_full = _measured(samples, candidates)
    best = problem.totals(in_full.losses.loss, candidates).argmin()
    return Searched(
        u=method.result().proposal.u,
        stopped=int(stopped.sum()),
        asked=len(stopped),
        evaluated=float(seen.mean()),
        best_stopped=bool(stopped[best]),
    )


def _measured(samples: Samples, U: np.ndarray, rule: EarlyStop | None = None) -> Evaluations:
    sums = samples.sums(U)
    seen = np.full(sums.shape, True)
    looks = rule.looks(BATCH) if rule else []
    alive = np.arange(len(U))
    for look in looks:
        assert rule is not None
        so_far = np.zeros(sums.shape[1], dtype=bool)
        so_far[rule.order[:look]] = True
        part = np.broadcast_to(so_far, (len(alive), len(so_far)))
        keeps = rule.keeps(np.where(part, sums[alive], 0.0), part, len(looks))
        seen[alive[~keeps]] = so_far
        alive = alive[keeps]
        if not alive.size:
            break
    return Evaluations(
        np.where(seen, sums, 0.0),
        None,
        samples.targets,
        samples.domain_ids,
        samples.num_domains,
        None if seen.all() else seen,
        None if rule is None else rule.reference,
    )


def rows(cases: Sequence[Case], seeds: Sequence[int]) -> list[list[str]]:
    found = []
    for confidence in CONFIDENCES:
        results = [search(case, seed, confidence) for case, seed in zip(cases, seeds, strict=True)]
        regrets = [1e3 * (_total(case, one.u) - case.least) for case, one in zip(cases, results, strict=True)]
        found.append(
            [
                "all samples" if confidence is None else f"stopped at {confidence}",
                f"{statistics.mean(one.stopped for one in results):.1f} of "
                f"{statistics.mean(one.asked for one in results):.1f}",
                f"{100 * statistics.mean(one.evaluated for one in results):.0f}%",
                f"{sum(one.best_stopped for one in results)} of {len(results)}",
                mean_and_deviation(regrets, 3),
            ]
        )
    return found


def _total(case: Case, u: np.ndarray) -> float:
    return case.problem.total(_measured(case.samples, u[None]).losses.loss[0], u)


def synthetic(seeds: int) -> dict[str, list[Case]]:
    problem = rebalance(DOMAINS)
    found = {"Log-linear losses": [_case(problem, log_linear_truth(problem, i), i) for i in range(seeds)]}
    for words, gain in (("with", 0.05), ("without", 0.0)):
        truths = [PowerTruth.draw(problem, seed, averaging=gain) for seed in range(seeds)]
        title = f"Losses in no family, {words} a gain from averaging probes"
        found[title] = [_case(problem, truth, seed) for seed, truth in enumerate(truths)]
    return found


def _case(problem: Problem, truth: Truth, seed: int) -> Case:
    samples = SyntheticSamples(truth, len(problem.composition), seed)
    return Case(problem, samples, least_total(truth, problem))


def real(folder: Path, seeds: int) -> list[Case]:
    """The least objective is that of anything any of the searches came upon."""
    samples = RealSamples(SimulatedLosses(folder), folder / "data")
    count = samples.num_domains
    problem = Problem(
        samples.losses.components.matrix, np.full(count, 1 / count), domains=samples.losses.domains
    )
    trial = Case(problem, samples, 0.0)
    for seed in range(seeds):
        for confidence in CONFIDENCES:
            samples.sums(search(trial, seed, confidence).u[None])
    U = np.stack([np.frombuffer(key) for key in samples.found])
    on_simplex = np.isclose(U.sum(axis=1), 1)
    least = problem.totals(samples.predict(U[on_simplex]), U[on_simplex]).min()
    return [Case(problem, samples, float(least))] * seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few seeds, synthetic samples only")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "search_methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = 2 if arguments.quick else arguments.seeds
    head = ["evaluation", "candidates stopped", "samples evaluated", "best stopped", "regret, 1e-3 nats"]
    lines = ["# Stopping candidates early", "", "`python -m benchmarks.early_stopping`: " + describe("torch")]
    counts = f"{seeds} seeds, {REAL_SEEDS} of the real probes, {BATCH} samples in a pass."
    lines += ["", f"Mean ± standard deviation over {counts}", ""]
    sections = synthetic(seeds)
    for title, cases in sections.items():
        lines += [f"## {title}", "", table(head, rows(cases, range(seeds))), ""]
        print(*lines[-4:], sep="\n", flush=True)
    if not arguments.quick:
        cases = real(arguments.folder, REAL_SEEDS)
        lines += ["## Real probes", "", table(head, rows(cases, range(REAL_SEEDS))), ""]
        print(*lines[-4:], sep="\n", flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
