"""How exact simulated losses are, and their differences between candidates, by the arithmetic of the model.

    python -m benchmarks.candidate_precision [--out benchmarks/results/candidate_precision.md]

A small Llama with LoRA probes (benchmarks/simulated.py; on the CPU) simulates candidates in float64, in
float32 and in several ways in bfloat16. Told of each, against float64: the error of the mean loss, that of
its paired differences to `old`, and the rank correlation over candidates, for candidates over the whole
simplex and for such that lie close together, where differences are small. The JSON file holds what the table
does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import describe, table
from benchmarks.simulated import SimulatedLosses
from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.compute import Compute
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import losses_by_domain, sample_losses
from opmix_dist.search.simplex import sobol_candidates

ROOT = Path(__file__).parent.parent
SPREAD, CLOSE = 32, 16
"""Candidates over the simplex, and close to its centre."""
STEP = 0.02
"""How far the close ones are from the centre, as a part of the way to a point of the simplex."""
BATCH = 16
BFLOAT16 = torch.bfloat16

Simulate = Callable[[JointAdapters, Tensor, TokenBatch], Tensor]
"""Summed losses [N] of one candidate's model."""


def losses(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    return torch.cat([sample_losses(model, part) for part in batch.split(BATCH)]).double()


def low_rank(adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
    with adapters.simulating(u[None]):
        return losses(adapters.model, batch)


def merged(adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
    with adapters.merged(u):
        return losses(adapters.model, batch)


def float32_logits(adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
    """Merged, hidden states in the model's dtype, the head's products summed and kept in float32."""
    model, found = adapters.model, []
    with adapters.merged(u):
        for part in batch.split(BATCH):
            hidden = model.model(input_ids=part.tokens, use_cache=False).last_hidden_state[:, :-1]
            logits = hidden.float() @ model.lm_head.weight.float().T
            targets = torch.where(part.loss_mask, part.tokens, -100)[:, 1:]
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            found.append(each.view(targets.shape).sum(1))
    return torch.cat(found).double()


def autocast(adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
    with torch.autocast("cpu", BFLOAT16):
        return low_rank(adapters, u, batch)


def in_bfloat16(simulate: Simulate) -> Simulate:
    """Products in bfloat16, float32 residual stream and logits."""

    def run(adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
        with adapters.computing(Compute(BFLOAT16)):
            return simulate(adapters, u, batch)

    return run


PATHS: tuple[tuple[str, torch.dtype, Simulate], ...] = (
    ("float32, low rank", torch.float32, low_rank),
    ("float32, merged", torch.float32, merged),
    ("bfloat16 throughout, low rank", BFLOAT16, low_rank),
    ("bfloat16 throughout, merged", BFLOAT16, merged),
    ("bfloat16 throughout but float32 logits, merged", BFLOAT16, float32_logits),
    ("autocast: float32 residual, bfloat16 logits, low rank", torch.float32, autocast),
    ("bfloat16 products, float32 residual and logits, low rank", torch.float32, in_bfloat16(low_rank)),
    ("bfloat16 products, float32 residual and logits, merged", torch.float32, in_bfloat16(merged)),
)
"""Name, dtype of the model's weights, how. Weights and adapters are rounded from their float32 values."""


@contextmanager
def weights_in(adapters: JointAdapters, dtype: torch.dtype) -> Iterator[None]:
    """The model's parameters in this dtype inside, and exactly as they were again after."""
    parameters = [*adapters.model.parameters()]
    kept = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


@torch.no_grad()
def mean_losses(
    simulated: SimulatedLosses, dtype: torch.dtype, simulate: Simulate, U: np.ndarray
) -> np.ndarray:
    """Mean over the domains of each candidate's loss, nats per token, [M]."""
    batch = simulated.heldout.batch
    simulated.adapters.model.eval()
    with weights_in(simulated.adapters, dtype):
        sums = torch.stack([simulate(simulated.adapters, u, batch) for u in torch.from_numpy(U)])
    by_domain = losses_by_domain(
        sums.numpy(), batch.targets.numpy(), simulated.heldout.domain_ids.numpy(), len(simulated.domains)
    )
    return by_domain.loss.mean(axis=1)


def errors(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of losses [M], the first that of `old`: RMS and mean error, RMS of the differences to `old`, ranks."""
    wrong = found - exact
    return {
        "rms": float(np.sqrt((wrong**2).mean())),
        "mean": float(wrong.mean()),
        "differences": float(np.sqrt(((wrong[1:] - wrong[0]) ** 2).mean())),
        "scatter": float(wrong[1:].std(ddof=1)),
        "spearman": float(spearmanr(found[1:], exact[1:]).statistic),
    }


def designs(num_components: int) -> dict[str, np.ndarray]:
    """`old` first in each."""
    old, spread = np.eye(num_components)[:1], sobol_candidates(num_components, SPREAD, seed=0)
    centre = np.full(num_components, 1 / num_components)
    close = (1 - STEP) * centre + STEP * sobol_candidates(num_components, CLOSE, seed=1)
    return {
        f"{SPREAD} candidates over the simplex": np.vstack([old, spread]),
        f"{CLOSE} candidates {STEP:.0%} of the way from its centre": np.vstack([old, close]),
    }


@torch.no_grad()
def unchanged_weights(adapters: JointAdapters) -> list[list[str]]:
    """Share of weights that merging leaves as they were, in bfloat16, by the size of the delta."""
    generator = torch.Generator().manual_seed(0)
    weight, delta = (torch.randn(1 << 22, generator=generator) for _ in range(2))
    rows = []
    for size in (1e-1, 1e-2, 1e-3):
        base = weight.to(BFLOAT16)
        same = (base.float() + size * delta).to(BFLOAT16) == base
        rows.append([f"normal numbers, delta {size:g} of the weight", f"{same.float().mean():.0%}"])
    u = torch.full((len(adapters.names),), 1 / len(adapters.names))
    kept = total = 0
    moved = size = 0.0
    for layer in adapters.layers.values():
        change = adapters.scale * layer.delta(u)
        base = layer.base.weight.to(BFLOAT16)
        kept += int(((base.float() + change).to(BFLOAT16) == base).sum())
        total += base.numel()
        moved, size = moved + float(change.square().sum()), size + float(layer.base.weight.square().sum())
    name = f"the probes here, all alike: delta {(moved / size) ** 0.5:.3f} of the weight (RMS)"
    return [*rows, [name, f"{kept / total:.0%}"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write, and JSON beside it")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "candidate_precision", help="kept probes"
    )
    arguments = parser.parse_args()
    simulated = SimulatedLosses(arguments.folder)
    machine = describe("torch", "transformers")
    lines = ["# Precision of simulated losses", "", f"`python -m benchmarks.candidate_precision`: {machine}"]
    lines += ["", f"{simulated.describe()}.", "", *_READING]
    results = {"machine": machine, "model": simulated.describe(), "designs": {}}
    for title, U in designs(len(simulated.adapters.names)).items():
        exact = mean_losses(simulated, torch.float64, merged, U)
        found = {
            name: errors(mean_losses(simulated, dtype, simulate, U), exact) for name, dtype, simulate in PATHS
        }
        spread = float(exact[1:].std(ddof=1))
        results["designs"][title] = {"spread": spread, "paths": found}
        lines += [
            "",
            f"## {title.capitalize()}",
            "",
            f"Their losses differ by {spread:.1e} nats (deviation).",
            "",
        ]
        lines += [table(_HEAD, [[name, *_cells(error)] for name, error in found.items()])]
        print(*lines[-4:], sep="\n", flush=True)
    results["unchanged"] = unchanged_weights(simulated.adapters)
    lines += ["", "## Weights that merging into bfloat16 leaves as they were", ""]
    lines += [table(["what", "unchanged"], results["unchanged"])]
    print(lines[-1])
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


_HEAD = [
    "path",
    "error of losses (RMS)",
    "its mean",
    "error of differences to `old` (RMS)",
    "scatter between candidates",
    "rank correlation",
]
_READING = [
    "Nats per token, of the mean over domains, against float64 (norms and rotary embeddings are "
    "transformers' own and compute in float32). What all candidates share of an error does no harm to their "
    "order: the scatter is the deviation of the error between candidates, `old` left out, and the rank "
    "correlation is Spearman's."
]


def _cells(error: dict[str, float]) -> list[str]:
    numbers = (error["rms"], error["mean"], error["differences"], error["scatter"])
    return [*(f"{number:.1e}" for number in numbers), f"{error['spearman']:.3f}"]


if __name__ == "__main__":
    main()
