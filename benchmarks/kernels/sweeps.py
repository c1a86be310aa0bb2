"""Whole sweeps of candidates over a model, and how exact the losses of each path are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.measure import Bench
from benchmarks.kernels.models import PASS_TOKENS, Llama, Merged, Run, Sweep, adapted, peft_sweep
from benchmarks.kernels.table import Case, Prepared
from opmix_kernels.cost import Work

BASE_150M = Llama("150M", 768, 16, 2048, 12, 12, 50_304)
BASE_1B = Llama("1B", 2048, 16, 8192, 32, 8, 128_256)
TINY = Llama("tiny", 32, 1, 48, 2, 1, 64)

SWEEP = "whole sweep"
OURS_LOWRANK = "low rank, many candidates at once (ours)"
OURS_MERGE = "merged one after another (ours)"
MERGE_TORCH = "merge + dense, one after another, torch"
MERGE_GRAPH = "the same as a CUDA graph"
DISK = "merged models written to disk, loaded and evaluated"
PATHS = (OURS_LOWRANK, OURS_MERGE)
BASELINES = (MERGE_TORCH, MERGE_GRAPH, "separate shrink and expand-add, torch", "PEFT's forward")

NEEDS = ("transformers", "peft", "safetensors", "pydantic")


@dataclass(frozen=True)
class Plan:
    sweeps: Sequence[Sweep]
    disk_candidates: int
    noise: Sweep


def _sweeps(models: Sequence[Llama], tokens: Sequence[tuple[int, int]], candidates: int) -> list[Sweep]:
    return [Sweep(model, candidates, samples, length, 7) for samples, length in tokens for model in models]


REAL = Plan(
    _sweeps([BASE_150M, BASE_1B], [(1, 512), (2, 2048), (16, 2048)], 64),
    disk_candidates=2,
    noise=Sweep(BASE_150M, 8, 2, 1024, 7),
)
QUICK = Plan(_sweeps([BASE_150M], [(2, 2048)], 64), 2, REAL.noise)
DRY = Plan([Sweep(TINY, 2, 1, 8, 2)], 1, Sweep(TINY, 2, 1, 8, 2))


def cases(plan: Plan) -> Iterator[Case]:
    for sweep in plan.sweeps:
        yield from _sweep_cases(sweep, plan.disk_candidates)


def title(sweep: Sweep) -> str:
    return f"{sweep.model.name}, {sweep.candidates} x {sweep.tokens} tokens"


def _sweep_cases(sweep: Sweep, disk_candidates: int) -> Iterator[Case]:
    work = [Work(sweep.flops, 0.0)]

    def case(path: str, build: Callable[[Bench, ExitStack], Run], *, ours: bool = False, note: str = "",
             needs: tuple[str, ...] = (), count: int = sweep.candidates) -> Case:  # fmt: skip
        def prepare(bench: Bench) -> Prepared:
            stack = ExitStack()
            run = build(bench, stack)

            def error(found: Tensor) -> float:
                """Relative to what the adapters do: losses of any model near this one are nearly equal."""
                candidate, base = reference(bench, sweep)
                return abs(found[0, 0].item() - candidate) / abs(candidate - base)

            return Prepared(
                lambda: run(count),
                error,
                tolerance=0.25,
                warm=lambda: run(min(count, max(1, PASS_TOKENS // sweep.tokens))),
                times=sweep.candidates / count,
                close=stack.close,
            )

        return Case(SWEEP, title(sweep), path, ours, work, prepare, (*NEEDS, *needs), note)

    def projects(kernels: bool, method: str) -> Callable[[Bench, ExitStack], Run]:
        return lambda bench, stack: stack.enter_context(
            adapted(bench, sweep, torch.bfloat16, kernels, method)
        )

    yield case(OURS_LOWRANK, projects(True, "lowrank"), ours=True)
    yield case(OURS_MERGE, projects(True, "merge"), ours=True)
    yield case(MERGE_TORCH, lambda bench, _: Merged(bench, sweep, torch.bfloat16).one_by_one)
    yield case(
        MERGE_GRAPH, lambda bench, _: Merged(bench, sweep, torch.bfloat16).as_graph(), needs=("a GPU",)
    )
    yield case(BASELINES[2], projects(False, "lowrank"), note="this project's path without kernels")
    yield case(BASELINES[3], lambda bench, _: peft_sweep(bench, sweep))
    yield case(
        DISK,
        lambda bench, _: Merged(bench, sweep, torch.bfloat16).through_disk,
        count=disk_candidates,
        note=f"extrapolated from {disk_candidates} of {sweep.candidates} candidates; in the temporary folder",
    )


@cache
def reference(bench: Bench, sweep: Sweep) -> tuple[float, float]:
    """Summed losses of the first candidate's first sample and of the base's, in float64; norms and rotary
    embeddings are transformers' own, which compute in float32."""
    exact = Merged(bench, sweep, torch.float64)
    exact.tokens = exact.tokens[:1]
    candidate = exact.one_by_one(1).item()
    exact.U = torch.zeros_like(exact.U)
    return candidate, exact.one_by_one(1).item()


NOISE_PATHS: dict[str, Callable[[Bench, Sweep, ExitStack], Run]] = {
    "float32, merged, torch": lambda b, s, _: Merged(b, s, torch.float32).one_by_one,
    "bfloat16 throughout, merged, torch": lambda b, s, _: Merged(b, s, torch.bfloat16).one_by_one,
    "bfloat16, float32 residual and logits, low rank, torch": lambda b, s, e: e.enter_context(
        adapted(b, s, torch.bfloat16, False, "lowrank")
    ),
    "bfloat16, float32 residual and logits, low rank, kernels (ours)": lambda b, s, e: e.enter_context(
        adapted(b, s, torch.bfloat16, True, "lowrank")
    ),
    "bfloat16, float32 residual and logits, merged, kernels (ours)": lambda b, s, e: e.enter_context(
        adapted(b, s, torch.bfloat16, True, "merge")
    ),
    "float32, low rank, kernels (ours)": lambda b, s, e: e.enter_context(
        adapted(b, s, torch.float32, True, "lowrank")
    ),
}


def noise(bench: Bench, sweep: Sweep, path: str, exact: Tensor) -> dict[str, Any]:
    """Errors of a path's mean losses, and of their differences to the first candidate's, in nats."""
    with ExitStack() as stack:
        run = NOISE_PATHS[path](bench, sweep, stack)
        found = run(sweep.candidates)
    targets = sweep.samples * (sweep.length - 1)
    means, right = (losses.double().sum(1) / targets for losses in (found, exact))
    wrong = means - right
    differences = (wrong - wrong[0])[1:]
    return {
        "path": path,
        "losses": wrong.square().mean().sqrt().item(),
        "differences": differences.square().mean().sqrt().item(),
    }


def exact_losses(bench: Bench, sweep: Sweep) -> Tensor:
    """In float64, [M, N]."""
    return Merged(bench, sweep, torch.float64).one_by_one(sweep.candidates)
