"""OP-Mix against the uniform mixture on the built-in corpus: equal training tokens, three seeds.

    make evidence-small

Trains the model of configs/demo.yaml twice per seed (weights, data order, probes and candidates follow the
seed, and so does the choice among the held-out samples; the corpus and its split stay the same), prints a
table of means and standard deviations over seeds with paired differences, and writes it to
benchmarks/results/evidence_small.{md,json}. A run that was finished before is not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from opmix_dist.exchange.rundir import RunDir
from opmix_dist.report.tables import perplexity, total_cost

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POLICIES = {
    "uniform": (2, ["--mixture.policy", "static", "--pool.ranks", "0"]),
    "opmix": (3, []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence_small")
    arguments, overrides = parser.parse_known_args()
    prepare()
    runs = {
        policy: [train(policy, seed, arguments.runs, overrides) for seed in arguments.seeds]
        for policy in POLICIES
    }
    rows = summarise(runs)
    text = "\n".join(table(rows, runs, arguments.seeds, overrides))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evidence_small.md").write_text(text + "\n")
    (RESULTS / "evidence_small.json").write_text(json.dumps(rows, indent=1) + "\n")


def prepare() -> None:
    command = [sys.executable, "-m", "opmix_dist.cli", "prepare", "--builtin", "--eval-fraction", "0.1"]
    command += ["--vocab-size", "2048"]
    subprocess.run([*command, "--out", str(ROOT / "data" / "builtin")], check=True, cwd=ROOT)


def train(policy: str, seed: int, folder: Path, overrides: Sequence[str]) -> RunDir:
    """One run; ``opmix train`` itself sees that one is finished, and refuses one with other settings."""
    run = RunDir(folder / f"seed{seed}" / policy)
    ranks, settings = POLICIES[policy]
    print(f"--- {policy}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "opmix_dist.cli", "train", "configs/demo.yaml", "--run_dir", str(run.path)]
    command += ["--seed", str(seed), "--train.eval_interval_steps", "0"]
    command += ["--train.eval_samples_per_domain", "42", "--train.log_interval_steps", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings, *overrides], check=True, cwd=ROOT, env=environment)
    return run


def summarise(runs: dict[str, list[RunDir]]) -> list[dict]:
    """Per quantity: its values per policy and seed, and OP-Mix less uniform, paired by seed."""
    losses = {policy: [run.summary().final_loss for run in found] for policy, found in runs.items()}
    quantities = {f"loss {domain}": lambda loss, d=domain: loss[d] for domain in losses["uniform"][0]}
    quantities["average loss"] = lambda loss: statistics.fmean(loss.values())
    quantities["average perplexity"] = lambda loss: statistics.fmean(map(perplexity, loss.values()))
    rows = []
    for name, value in quantities.items():
        found = {policy: [value(loss) for loss in seeds] for policy, seeds in losses.items()}
        difference = [b - a for a, b in zip(found["uniform"], found["opmix"], strict=True)]
        rows.append({"quantity": name, **found, "difference": difference})
    relative = [100 * d / a for d, a in zip(rows[-1]["difference"], rows[-1]["uniform"], strict=True)]
    rows.append({"quantity": "average perplexity, change in %", "difference": relative})
    return rows


def table(
    rows: list[dict], runs: dict[str, list[RunDir]], seeds: Sequence[int], overrides: Sequence[str]
) -> list[str]:
    """Markdown."""
    one = runs["opmix"][0]
    lines = [
        "# OP-Mix against uniform, built-in corpus",
        "",
        f"`make evidence-small`{' with ' + ' '.join(overrides) if overrides else ''}, "
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"torch {torch.__version__}. "
        f"{one.summary().parameters:,} parameters, {one.summary().tokens:,} training tokens per run, "
        f"seeds {', '.join(map(str, seeds))}. Mean ± standard deviation over seeds (n - 1); differences are "
        "paired by seed; negative is better for OP-Mix. The average perplexity is the mean over domains of "
        "exp(loss).",
        "",
        "| | uniform | OP-Mix | difference |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [spread(row[key]) if key in row else "" for key in ("uniform", "opmix", "difference")]
        lines.append(f"| {row['quantity']} | {' | '.join(cells)} |")
    lines += ["", "Mixtures that the searches chose:", ""]
    for seed, run in zip(seeds, runs["opmix"], strict=True):
        decided = run.mixtures()[-1]
        shares = ", ".join(f"{name} {weight:.1%}" for name, weight in decided.weights.items())
        lines.append(f"- seed {seed}: {shares}{'' if decided.changed else ' (kept: ' + decided.why + ')'}")
    lines += ["", f"The search cost {spread(search_shares(runs['opmix']))} % of the training FLOPs on top."]
    return lines


def search_shares(runs: list[RunDir]) -> list[float]:
    """FLOPs of each run's search in per cent of its training's; failed searches left no costs."""
    answered = [run for run in runs if run.search("0001").proposal_file.exists()]
    search = [total_cost(run.search("0001").proposal().costs.values()).flops for run in answered]
    training = [run.summary().costs["train"].flops for run in answered]
    return [100 * s / t for s, t in zip(search, training, strict=True)]


def spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


if __name__ == "__main__":
    main()
