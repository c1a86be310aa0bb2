"""How long a search's mathematics takes on one core, beside a plain multi-start optimiser.

    python -m benchmarks.search_speed [--quick] [--regmix FOLDER] [--out benchmarks/results/search_speed.md]

1. Speed: all laws with their quality (left-out errors, rank correlation, calibration) and the proposal.
2. Baseline: the schedule of OP-Mix's authors (arXiv 2605.15220 and the public olmix code), written anew from
   its description: for each domain 300 starts, one at a time, 10 values of log c in [-2, 1.5] by 30 random
   slopes, each by torch's L-BFGS in float32, up to 100 times 20 iterations. What each reaches of the same
   objective, evaluated in float64.
3. Families (with --regmix): how well each family predicts RegMix's public tables. FOLDER holds the
   train_* and test_* files of sizes 1m of https://github.com/sail-sg/regmix/tree/main/data.

The process is bound to one core. Truths are log-linear laws with noise; candidates at 17 x 512 are as sparse
as RegMix's, of whose weights 45% are 0.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.machine import describe, mean_and_deviation, table
from opmix_dist.search.laws import FAMILIES, LogLinearLaw, Observations, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import propose

DELTA = 0.02
LOG_CONSTANTS = 10
SLOPES = 30


@dataclass(frozen=True)
class Case:
    """D losses at M candidates of K components."""

    name: str
    components: int
    candidates: int
    domains: int
    strength: float  # of the Dirichlet distribution, in each component
    noise: float  # nats

    def observations(self, seed: int) -> Observations:
        rng = np.random.default_rng([seed, self.components, self.candidates])
        candidates = rng.dirichlet(np.full(self.components, self.strength), self.candidates)
        candidates[candidates < 1e-3] = 0
        candidates /= candidates.sum(axis=1, keepdims=True)
        t = rng.normal(0, 0.15, (self.domains, self.components))
        t[np.arange(self.domains), np.arange(self.domains)] -= 0.4
        law = LogLinearLaw(rng.normal(0.5, 0.2, self.domains), t)
        losses = law.predict(candidates)
        return Observations(candidates, losses + self.noise * rng.normal(size=losses.shape))


SMALL = Case("3 x 12", 3, 12, 3, 1.0, 2e-3)
MIDDLE = Case("6 x 20", 6, 20, 6, 1.0, 2e-3)
LARGE = Case("17 x 512", 17, 512, 13, 0.14, 1e-2)


# --- speed ---


def speed(quick: bool) -> str:
    rows = []
    for case, repeats in ((MIDDLE, 1 if quick else 10), (LARGE, 1 if quick else 5)):
        problem = Problem(np.eye(case.components), np.full(case.components, 1 / case.components))
        measured = case.observations(0)
        propose(fit_law(measured.take(np.arange(len(measured.losses))), seed=0).law, problem)  # imports
        times = np.array([_search(case.observations(seed), problem) for seed in range(repeats)])
        columns = [mean_and_deviation(column.tolist(), 2) for column in times.T]
        rows.append([case.name, case.domains, *columns, f"{times[:, :2].sum(axis=1).max():.2f}"])
    head = [
        "components x candidates",
        "losses",
        "laws and quality, s",
        "proposal, s",
        "processor time of both, s",
        "longest of both, s",
    ]
    text = (
        "Log-linear laws from 64 starts, each candidate left out by itself at 20 candidates and in ten folds "
        "at 512, and one proposal (KL 0.05); a truth of its own for each repeat, 10 and 5 of them. Where "
        "processor time is less than the sum, other programs had the core in between."
    )
    return f"## Speed\n\n{text}\n\n{table(head, rows)}\n"


def _search(observations: Observations, problem: Problem) -> tuple[float, float, float]:
    """Seconds of the laws and of the proposal, and processor time of both."""
    began, busy = time.perf_counter(), time.process_time()
    fit = fit_law(observations, seed=0)
    fitted = time.perf_counter()
    propose(fit.law, problem)
    return fitted - began, time.perf_counter() - fitted, time.process_time() - busy


# --- the baseline ---


def huber_sum(log_c: float, t: np.ndarray, candidates: np.ndarray, losses: np.ndarray) -> float:
    """The objective of one law [K] in float64; losses [M]."""
    size = np.abs(np.exp(log_c) + np.exp(candidates @ t) - losses)
    inside = np.minimum(size, DELTA)
    return float((inside * (size - inside / 2)).sum())


def one_start(candidates: np.ndarray, losses: np.ndarray, log_c: float, slopes: np.ndarray) -> float:
    """Objective in float64 that one run of torch's L-BFGS reaches; inf where it diverges."""
    inputs, target = torch.tensor(candidates).float(), torch.tensor(losses).float()
    parameters = torch.tensor(np.append(log_c, slopes), dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [parameters], lr=0.01, history_size=10, max_iter=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        predicted = parameters[0].exp() + (inputs @ parameters[1:]).exp()
        loss = torch.nn.functional.huber_loss(predicted, target, reduction="sum", delta=DELTA)
        loss.backward()
        return loss

    before = np.inf
    for _ in range(100):
        now = optimiser.step(closure).item()
        if not np.isfinite(now) or now == before:  # as float32 sees it: nothing more comes
            break
        before = now
    found = parameters.detach().double().numpy()
    value = huber_sum(found[0], found[1:], candidates, losses)
    return value if np.isfinite(value) else np.inf


def many_starts(observations: Observations, domain: int, count: int) -> tuple[float, float]:
    """The best objective of ``count`` of the 300 starts, spread over them evenly, and their seconds."""
    rng = np.random.default_rng([7, domain])
    components = observations.candidates.shape[1]
    starts = []
    for log_c in np.linspace(-2, 1.5, LOG_CONSTANTS):
        for _ in range(SLOPES):
            slopes = 0.1 * rng.uniform(size=components)
            slopes[domain] = -rng.uniform()
            starts.append((log_c, slopes))
    chosen = [starts[i] for i in np.linspace(0, len(starts) - 1, count).round().astype(int)]
    began = time.perf_counter()
    losses = observations.losses[:, domain]
    best = min(one_start(observations.candidates, losses, *start) for start in chosen)
    return best, time.perf_counter() - began


def baseline(quick: bool) -> str:
    rows: list[list[object]] = []
    warm = SMALL.observations(1)
    one_start(warm.candidates, warm.losses[:, 0], 0.0, np.zeros(SMALL.components))  # imports
    plan = [(SMALL, 3, 3), (MIDDLE, 1, 3)] if quick else [(SMALL, 3, 300), (MIDDLE, 2, 60), (LARGE, 1, 20)]
    for case, domains, starts in plan:
        observations = case.observations(0)
        began = time.perf_counter()
        law = fit_law(observations, seed=0).law
        ours = time.perf_counter() - began
        assert isinstance(law, LogLinearLaw)
        total = 0.0
        for domain in range(domains):
            reached, seconds = many_starts(observations, domain, starts)
            total += seconds
            objective = huber_sum(
                law.log_c[domain], law.t[domain], observations.candidates, observations.losses[:, domain]
            )
            rows.append([case.name, domain, starts, f"{seconds:.1f}", f"{reached:.9g}", f"{objective:.9g}"])
        scaled = total * (case.domains / domains) * (LOG_CONSTANTS * SLOPES / starts)
        exact = domains == case.domains and starts == LOG_CONSTANTS * SLOPES
        how = "measured" if exact else "extrapolated linearly"
        rows.append([case.name, f"all {case.domains}", 300, f"{scaled:,.0f} ({how})", "", f"in {ours:.2f} s"])
    head = ["components x candidates", "loss", "starts", "baseline, s", "baseline reaches", "ours reaches"]
    text = (
        "The last row of each case is the whole of its laws: ours with their quality. Objective: sum of "
        "Huber (delta 0.02) over the candidates; the baseline's is that of its best start."
    )
    return f"## Baseline of 300 single starts\n\n{text}\n\n{table(head, rows)}\n"


# --- families ---


def regmix(folder: Path, split: str) -> Observations:
    """RegMix's public table of 1M-parameter models; its weights sum to 1 but for rounding."""
    parts = []
    for what, prefix, suffix in (
        ("mixture", "train_the_pile_", ""),
        ("pile_loss", "metric/the_pile_", "_val_loss"),
    ):
        lines = (folder / f"{split}_{what}_1m.csv").read_text().splitlines()
        names = [name.removeprefix(prefix).removesuffix(suffix) for name in lines[0].split(",")[1:]]
        parts.append((names, np.array([line.split(",")[1:] for line in lines[1:]], dtype=np.float64)))
    (components, mixtures), (names, losses) = parts
    mixtures /= mixtures.sum(axis=1, keepdims=True)
    return Observations(mixtures, losses, names=names, components=components)


def families(folder: Path) -> str:
    train, test = regmix(folder, "train"), regmix(folder, "test")
    rows = []
    for family in FAMILIES:
        began = time.perf_counter()
        fit = fit_law(train, family=family, seed=0)
        seconds = time.perf_counter() - began
        predicted = fit.law.predict(test.candidates)
        rmse = np.sqrt(((predicted - test.losses) ** 2).mean(axis=0))
        ranks = [spearmanr(a, b).statistic for a, b in zip(predicted.T, test.losses.T, strict=True)]
        error, slope = fit.loo_error.mean(), fit.calibration.mean()
        rows.append(
            [
                family,
                f"{error:.3f}",
                f"{slope:.2f}",
                f"{rmse.mean():.3f}",
                f"{np.mean(ranks):.3f}",
                f"{seconds:.1f}",
            ]
        )
    head = [
        "family",
        "cross-validated error, nats",
        "calibration",
        "error on the test mixtures, nats",
        "rank correlation there",
        "laws and quality, s",
    ]
    components, losses = train.candidates.shape[1], train.losses.shape[1]
    text = (
        f"RegMix's public tables (arXiv 2407.01492, github.com/sail-sg/regmix): {len(train.losses)} models "
        f"of 1M parameters, each trained on a mixture of {components} domains, {losses} losses, and "
        f"{len(test.losses)} test mixtures. Means over the losses. A model that is trained anew on each "
        "mixture gains most from a domain's first thousandths, which exp(t . u) cannot follow; a model "
        "simulated between probes has no such edge."
    )
    return f"## Families on RegMix's tables\n\n{text}\n\n{table(head, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few starts and repeats, to see that it runs")
    parser.add_argument("--regmix", type=Path, help="folder of RegMix's public tables")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    machine = describe("torch", "numpy", "scipy", "cvxpy", "lightgbm", "scikit-learn")
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    text = f"# Speed of the search\n\n`python -m benchmarks.search_speed`, bound to one core: {machine}.\n"
    parts: list[Callable[[], str]] = [lambda: speed(arguments.quick), lambda: baseline(arguments.quick)]
    if arguments.regmix:
        parts.append(lambda: families(arguments.regmix))
    for part in parts:
        made = part()
        print(made, flush=True)
        text += f"\n{made}"
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
