"""Do a search's intervals hold the truth as often as they say, and does its decision move for nothing?

    python -m benchmarks.search_coverage [--quick] [--out benchmarks/results/search_coverage.md]

Whole searches on losses that are known: candidates from a Dirichlet distribution, measured with noise, a law,
a proposal with KL 0.05, a bootstrap of 100. The truth of the weights is the optimum of the known losses.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import describe, table
from tests.search.coverage import Case, Outcome, covered, search

WELL_SPECIFIED = [
    Case(2, 9, 0.005),
    Case(3, 9, 0.01),
    Case(3, 12, 0.002),
    Case(3, 12, 0.01),
    Case(3, 20, 0.005),
    Case(6, 12, 0.005),
    Case(6, 20, 0.002),
    Case(6, 20, 0.01),
    Case(6, 40, 0.01),
    Case(12, 40, 0.005),
    Case(6, 12, 0.002, gradients=True),
]
OTHERS = [
    Case(6, 8, 0.005),
    Case(6, 20, 0.002, bend=0.005),
    Case(6, 20, 0.005, bend=0.01),
    Case(6, 40, 0.005, bend=0.01),
    Case(6, 12, 0.002, bend=0.01, gradients=True),
    Case(6, 40, 0.005, family="power"),
    Case(6, 40, 0.005, family="quadratic"),
    Case(6, 40, 0.005, family="gaussian_process"),
]
FLAT = [
    Case(3, 12, 0.005, effect=0.0),
    Case(6, 12, 0.005, effect=0.0),
    Case(6, 20, 0.005, effect=0.0),
]
COVERAGE_HEAD = (
    "domains",
    "candidates",
    "noise, nats",
    "law and data",
    "weights, %",
    "of probes in use, %",
    "losses at mixtures, %",
    "losses at probes, %",
    "width of a weight",
)


def coverage(cases: Sequence[tuple[Case, list[Outcome]]]) -> str:
    rows = []
    for case, outcomes in cases:
        kinds = ("weights", "inner", "mixtures", "probes")
        percent = [f"{100 * covered(outcomes, kind):.0f}" for kind in kinds]
        width = np.mean([outcome.width for outcome in outcomes])
        rows.append((case.domains, case.candidates, case.noise, _words(case), *percent, f"{width:.3f}"))
    return table(COVERAGE_HEAD, rows)


def decisions(cases: Sequence[tuple[Case, list[Outcome]]]) -> str:
    rows = []
    for case, outcomes in cases:
        moved = np.array([outcome.moved for outcome in outcomes])
        gain = np.array([outcome.gain for outcome in outcomes])
        row = (case.domains, case.candidates, case.noise, _words(case), f"{100 * moved.mean():.0f}")
        worse = 100 * (moved & (gain < 0)).mean()
        rows.append((*row, f"{worse:.0f}", f"{gain.mean():.4f}", f"{(gain * moved).mean():.4f}"))
    head = ("domains", "candidates", "noise, nats", "law and data", "searches that move, %")
    return table([*head, "to something worse, %", "mean gain of proposals", "of what was done"], rows)


def seconds(cases: Sequence[tuple[Case, list[Outcome]]]) -> str:
    rows = []
    for case, outcomes in cases:
        median = np.median([outcome.seconds for outcome in outcomes], axis=0)
        rows.append((case.domains, case.candidates, _words(case), *(f"{value:.2f}" for value in median)))
    return table(("domains", "candidates", "law and data", "fit, s", "proposal, s", "bootstrap, s"), rows)


def _words(case: Case) -> str:
    words = [case.family.replace("_", "-")]
    if case.gradients:
        words.append("with gradients")
    if case.bend:
        words.append(f"waves of {case.bend:g} nats on the truth")
    if not case.effect:
        words.append("the same losses everywhere")
    return ", ".join(words)


def report(truths: int) -> str:
    done = {
        case: [search(case, number) for number in range(truths)] for case in WELL_SPECIFIED + OTHERS + FLAT
    }
    well, others, flat = ([(c, done[c]) for c in part] for part in (WELL_SPECIFIED, OTHERS, FLAT))
    machine = describe("numpy", "scipy", "cvxpy", "clarabel")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return f"""# Coverage of a search's intervals

`python -m benchmarks.search_coverage --truths {truths}`: {machine}, OMP_NUM_THREADS {threads}.

{truths} truths a row, each with a search of its own. A probe for each domain (90% of it) and one for `old`,
KL 0.05 to `old`, bootstrap of 100, intervals of 90%. Weights are those of the best mixture; one within 0.001
of its interval counts as held. Losses are those expected at 10 mixtures drawn at random, and at the probes,
which candidates of a Dirichlet distribution hardly come near to.

## Truths that the law can hold

{coverage(well)}

## Too few candidates, and truths that no law of the family holds

What a law gets wrong at all candidates alike is in no residual: intervals are too narrow there, and the
decision should rest on the proposal's own evaluation.

{coverage(others)}

## Decisions

By the gain that the law predicts, less its optimism, one-sided at 90%. Gains are true ones, in nats of the
mean loss. Where losses are the same everywhere each move is one for nothing, and 10% of them would be as
promised.

{decisions(flat + well)}

## Seconds

Processor time of a search, medians.

{seconds(well + others)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few truths, to see that it runs")
    parser.add_argument("--truths", type=int, default=60, help="searches a row")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    text = report(2 if arguments.quick else arguments.truths)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
