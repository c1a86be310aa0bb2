"""How close each method of search comes to the best mixture, against what it evaluates.

    python -m benchmarks.search_methods [--quick] [--out benchmarks/results/search_methods.md]

Regret is the true objective (mean loss + 0.05 KL to the uniform mixture, nats per token) at the proposal,
less the least there is. The truths are

1. log-linear losses, which the law can represent, and
2. losses that are in no family: power laws of the own share, a gain from averaging probes, waves; both over
   six domains and seven components, another truth for each seed, without noise and with independent noise on
   every loss and slope;
3. simulated losses of real probes: a small Llama pretrained for a moment on the built-in corpus, a LoRA probe
   for `old` and for each domain. The truth is the simulated objective on the held-out tokens itself, so it
   has no noise; its minimum is the least that long gradient searches from two starts, or anything else, came
   upon. Seeds change the candidates.

``--quick`` leaves 3 out. The last section tells what of the simulated gain is averaging of probes: the same
mixture x reached through different coefficients u; so does the last column of 3.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe, table
from benchmarks.simulated import SimulatedLosses
from opmix_dist.search.laws import Observations, fit_law
from opmix_dist.search.methods import GradientSearch, LawSearch, MixtureSearch
from opmix_dist.search.problem import Problem
from opmix_dist.search.simplex import coefficients_of, sample_candidates, sobol_candidates
from tests.search.truths import (
    PowerTruth,
    Truth,
    least_total,
    log_linear_truth,
    rebalance,
    run,
    total,
)

ROOT = Path(__file__).parent.parent
GRADIENT_COST = 3
"""Forward passes that an evaluation with gradients counts for: one forward, and twice that backward."""
REAL_SEEDS = 3
MIXED_MOST = "gain of its mixture over `old`'s, both mixed most, 1e-3 nats"
NOISE = (0.0, 0.002, 0.01)

Method = Callable[[Problem, int], MixtureSearch]


def by_law(
    design: Callable[..., np.ndarray],
    count: int,
    *,
    rounds: int = 0,
    each: int = 1,
    gradients: bool = False,
    averaging: bool = False,
) -> Method:
    def build(problem: Problem, seed: int) -> MixtureSearch:
        candidates = design(len(problem.composition), count, seed=seed)
        return LawSearch(
            problem,
            candidates,
            seed=seed,
            gradients=gradients,
            averaging=averaging,
            refine_rounds=rounds,
            refine_count=each,
        )

    return build


def with_old(num_components: int, count: int, *, seed: int) -> np.ndarray:
    """`old` alone and Dirichlet draws."""
    drawn = sample_candidates(num_components, count - 1, seed=seed)
    return np.vstack([np.eye(num_components)[0], drawn])


def with_old_even(num_components: int, count: int, *, seed: int) -> np.ndarray:
    """`old` alone and Sobol points: what a run evaluates first by default."""
    return np.vstack([np.eye(num_components)[0], sobol_candidates(num_components, count - 1, seed=seed)])


def with_all_alike(num_components: int, count: int, *, seed: int) -> np.ndarray:
    """The same mixture as `old`, which is uniform here, but of all probes; and Dirichlet draws."""
    drawn = sample_candidates(num_components, count - 1, seed=seed)
    return np.vstack([np.full(num_components, 1 / num_components), drawn])


def by_gradients(most: int) -> Method:
    """From `old`, component 0."""

    def build(problem: Problem, seed: int) -> MixtureSearch:
        return GradientSearch(problem, np.eye(len(problem.composition))[0], max_evaluations=most)

    return build


METHODS: dict[str, Method] = {
    "12 Dirichlet + law (the paper)": by_law(sample_candidates, 12),
    "20 Dirichlet + law (the paper)": by_law(sample_candidates, 20),
    "`old`, 19 Dirichlet + law": by_law(with_old, 20),
    "all probes alike, 19 Dirichlet + law": by_law(with_all_alike, 20),
    "12 Sobol + law": by_law(sobol_candidates, 12),
    "20 Sobol + law": by_law(sobol_candidates, 20),
    "12 Sobol + law, 4 rounds of 1": by_law(sobol_candidates, 12, rounds=4, each=1),
    "12 Sobol + law, 2 rounds of 4": by_law(sobol_candidates, 12, rounds=2, each=4),
    "`old`, 11 Dirichlet + law, 2 rounds of 4": by_law(with_old, 12, rounds=2, each=4),
    "all probes alike, 11 Dirichlet + law, 2 rounds of 4": by_law(with_all_alike, 12, rounds=2, each=4),
    "`old`, 11 Sobol + law, 2 rounds of 4 (the default)": by_law(with_old_even, 12, rounds=2, each=4),
    "the same with an averaging term": by_law(with_old_even, 12, rounds=2, each=4, averaging=True),
    "4 Sobol with gradients + law": by_law(sobol_candidates, 4, gradients=True),
    "4 Sobol with gradients + law, 2 rounds of 1": by_law(
        sobol_candidates, 4, rounds=2, each=1, gradients=True
    ),
    "`old`, 3 Sobol with gradients + law, 3 rounds of 1": by_law(
        with_old_even, 4, rounds=3, each=1, gradients=True
    ),
    "gradient search, at most 3": by_gradients(3),
    "gradient search, at most 6": by_gradients(6),
    "gradient search, at most 12": by_gradients(12),
}


@dataclass(frozen=True)
class Case:
    """A truth to search on; least: its minimum."""

    problem: Problem
    truth: Truth
    least: float
    noise: float = 0.0


def rows(cases: Sequence[Case], *, mixed_most: bool = False) -> list[list[str]]:
    """A row per method: evaluations, what they count in forward passes, regret; seed i searches case i.

    mixed_most: a last column, by how much the objective of the proposed mixture is lower than that of the
    uniform one, where both are simulated with the coefficients that mix most.
    """
    found = []
    for name, method in METHODS.items():
        counts, costs, regrets, gains = [], [], [], []
        for seed, case in enumerate(cases):
            search = method(case.problem, seed)
            result, asked = run(search, case.truth, noise=case.noise, seed=seed)
            counts.append(len(asked))
            costs.append(len(asked) * (GRADIENT_COST if search.wants_gradients else 1))
            regrets.append(total(case.truth, case.problem, result.proposal.u) - case.least)
            if mixed_most:
                gains.append(_total_mixed_most(case, case.problem.prior))
                gains[-1] -= _total_mixed_most(case, result.proposal.mixture)
        found.append([name, *(f"{statistics.mean(c):.1f}" for c in (counts, costs)), _spread(regrets)])
        if mixed_most:
            found[-1].append(_spread(gains))
    return found


def _total_mixed_most(case: Case, mixture: np.ndarray) -> float:
    return total(case.truth, case.problem, coefficients_of(mixture, case.problem.composition))


def _spread(values: Sequence[float]) -> str:
    """In thousandths of a nat."""
    return f"{1e3 * statistics.mean(values):.3f} ± {1e3 * statistics.stdev(values):.3f}"


def synthetic(seeds: int) -> list[tuple[str, list[Case]]]:
    problem = rebalance(6)
    sections = []
    for title, draw in (("Log-linear losses", log_linear_truth), ("Losses in no family", PowerTruth.draw)):
        truths = [draw(problem, seed) for seed in range(seeds)]
        least = [least_total(truth, problem) for truth in truths]
        for noise in NOISE:
            cases = [Case(problem, t, best, noise) for t, best in zip(truths, least, strict=True)]
            sections.append((f"{title}, noise {noise:g} nats", cases))
    return sections


def real(losses: SimulatedLosses, seeds: int) -> tuple[Case, list[list[str]]]:
    """The case with its minimum, and the rows; the minimum is known only after all have searched."""
    count = len(losses.domains)
    problem = Problem(losses.components.matrix, np.full(count, 1 / count), domains=losses.domains)
    for start in (np.eye(count + 1)[0], np.full(count + 1, 1 / (count + 1))):
        run(GradientSearch(problem, start, max_evaluations=20, tolerance=1e-6), losses)
    searched = Case(problem, losses, 0.0)
    rows([searched] * seeds)  # evaluates; everything is kept
    candidates, found = losses.evaluated
    case = Case(problem, losses, float(problem.totals(found, candidates).min()))
    found_rows = rows([case] * seeds, mixed_most=True)
    losses.save()
    return case, found_rows


def averaging(losses: SimulatedLosses, case: Case) -> list[str]:
    """Equal x through different u: what the simulation gains by averaging probes alone."""
    problem, matrix = case.problem, case.problem.composition
    candidates, found = losses.evaluated
    best = candidates[problem.totals(found, candidates).argmin()]
    count = len(losses.domains)

    def line(what: str, u: np.ndarray) -> list[str]:
        measured = losses.predict(u[None])
        return [what, f"{1 / (u**2).sum():.2f}", f"{problem.value(measured)[0]:.4f}"]

    old = np.eye(count + 1)[0]
    probes = (1 - old) / count
    most = coefficients_of(best @ matrix, matrix)
    least = _most_of_old(best)
    lines = [
        line("uniform mixture: `old` alone", old),
        line("uniform mixture: all domains' probes alike", probes),
        line("uniform mixture: least sum of squares", coefficients_of(np.full(count, 1 / count), matrix)),
        line("best mixture found: as found", best),
        line("best mixture found: least sum of squares", most),
        line("best mixture found: as much `old` as possible", least),
    ]
    fit = fit_law(
        Observations(candidates, found, composition=matrix, names=losses.domains), seed=0, averaging=True
    )
    single = fit.law.predict(np.stack([old, best]), averaging=False)
    with_term = fit.law.predict(np.stack([old, best]))
    ends = (losses.predict(np.stack([old, best])), with_term, single)
    measured, fitted, mixture = (float(np.diff(problem.value(pair))[0]) for pair in ends)
    return [
        table(["mixture x, coefficients u", "effective probes 1 / sum u²", "mean simulated loss"], lines),
        "",
        f"From `old` to the best point found the simulated mean loss changes by {measured:.4f} nats. "
        f"A log-linear law with an averaging term, fitted to all {len(found)} points of this benchmark, says "
        f"{fitted:.4f}, of which {mixture:.4f} without that term.",
    ]


def _most_of_old(u: np.ndarray) -> np.ndarray:
    """The same x with the most weight on `old` (component 0, uniform): as much as the least domain gives up.

    All domains' probes alike make the uniform mixture: w of each of n probes is worth n w of `old`.
    """
    least = u[1:].min()
    moved = u.copy()
    moved[1:] -= least
    moved[0] += least * (len(u) - 1)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few seeds, synthetic losses only")
    parser.add_argument("--seeds", type=int, default=5, help="of the synthetic truths")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "search_methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = ["method", "evaluations", f"forward passes (gradients: {GRADIENT_COST})", "regret, 1e-3 nats"]
    lines = [
        "# Methods of search",
        "",
        "`python -m benchmarks.search_methods`: " + describe("torch", "cvxpy"),
    ]
    seeds = 2 if arguments.quick else arguments.seeds
    lines += ["", f"Mean ± standard deviation over {seeds} seeds, {REAL_SEEDS} of the real probes.", ""]
    for title, cases in synthetic(seeds):
        lines += [f"## {title}", "", table(head, rows(cases)), ""]
        print(*lines[-4:], sep="\n", flush=True)
    if not arguments.quick:
        losses = SimulatedLosses(arguments.folder)
        case, found = real(losses, REAL_SEEDS)
        staying = total(losses, case.problem, np.eye(len(case.problem.composition))[0]) - case.least
        lines += ["## Simulated losses of real probes", ""]
        lines += [
            f"One snapshot and one set of probes: {losses.describe()}. "
            f"`old` itself has a regret of {1e3 * staying:.1f}e-3 nats.",
            "",
            table([*head, MIXED_MOST], found),
            "",
        ]
        lines += ["## Averaging of probes", "", *averaging(losses, case), ""]
        print(*lines[-16:], sep="\n", flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
