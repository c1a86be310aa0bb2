"""Time every shipped configuration of every kernel on this GPU, and write what was fastest to a tuning file.

    python -m opmix_kernels.tune --out tuning.json [--d-in 2048] [--d-out 2048] [--dtype bfloat16] ...
    OPMIX_KERNELS_TUNING=tuning.json opmix search ...

The operations run as they do for a user, forward and backward, on random tensors of the given shapes. What
each configuration computes is compared with the default's before it is timed. Times are medians of CUDA
events around a kernel's own launches; before each run the GPU is given enough to do that launches queue up,
and its L2 cache is overwritten. A configuration replaces the default if it is faster by more than 2%, so that
noise does not. A run adds to the file or replaces entries: run it once for each kind of layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from opmix_kernels import (
    gated_lowrank_linear,
    joint_lora_linear,
    linear_cross_entropy,
    merge_deltas,
    norm_shrink_gate,
    segment_sums,
)
from opmix_kernels.runtime import TUNING_FILE, Kernel, available, read_tuning, watching

GAIN = 0.98
"""A configuration must take less than this share of the default's time to replace it."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Between two configurations, relative to the largest value: twice what each may be from the truth."""

Operation = Callable[[], Sequence[Tensor]]
"""Runs once; its results are compared."""


@dataclass(frozen=True)
class Shapes:
    """Of one kind of layer and its use; all at least 1."""

    d_in: int = 2048
    d_out: int = 2048
    adapters: int = 7
    rank: int = 16
    candidates: int = 16
    tokens: int = 4096
    """Rows of each candidate, and of each adapter in joint training."""
    vocabulary: int = 128_256
    consumers: int = 3
    """Linear layers that read the same normalised input."""


def operations(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, Operation]:
    """Every public operation by name, with its gradients where it has some."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(of)

    def numbers(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    s = shapes
    weight = random(s.d_out, s.d_in, scale=s.d_in**-0.5)
    A = random(s.adapters, s.rank, s.d_in, scale=s.d_in**-0.5).requires_grad_()
    B = random(s.adapters, s.d_out, s.rank).requires_grad_()
    coefficients = random(s.candidates, s.adapters, of=torch.float32).requires_grad_()
    x = random(s.candidates, s.tokens, s.d_in).requires_grad_()
    grouped = random(s.adapters, s.tokens, s.d_in).requires_grad_()
    head = random(s.vocabulary, s.d_in, scale=s.d_in**-0.5)
    targets, seeds = numbers(s.vocabulary, s.candidates, s.tokens), numbers(2**31, s.adapters)
    losses, segments = random(s.candidates, s.tokens, of=torch.float32), numbers(8, s.tokens)

    def differentiated(y: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        # small, so that sums over all rows do not overflow in float16
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.full_like(y, 2.0**-6))]

    def merge() -> Sequence[Tensor]:
        with torch.no_grad():
            return [merge_deltas(weight, A, B, coefficients[0], scale=2.0)]

    def producer() -> Sequence[Tensor]:
        with torch.no_grad():
            stack = A[None].expand(s.consumers, -1, -1, -1)
            return [norm_shrink_gate(x, stack, coefficients, scale=2.0, norm_weight=x[0, 0], eps=1e-6)]

    return {
        "merge_deltas": merge,
        "norm_shrink_gate": producer,
        "gated_lowrank_linear": lambda: differentiated(
            gated_lowrank_linear(x, weight, A, B, coefficients, scale=2.0), x, A, B, coefficients
        ),
        "joint_lora_linear": lambda: differentiated(
            joint_lora_linear(grouped, weight, A, B, scale=2.0, dropout=0.05, seeds=seeds), grouped, A, B
        ),
        "linear_cross_entropy": lambda: differentiated(linear_cross_entropy(x, head, targets), x),
        "segment_sums": lambda: [segment_sums(losses, segments, 8)],
    }


class Stopwatch:
    """Times launches of one kernel and shape: in order on a GPU, or by the clock in the interpreter."""

    def __init__(self, device: torch.device, key: str) -> None:
        self.device, self.key = device, key
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    @contextmanager
    def watch(self, kernel: Kernel, key: str) -> Iterator[None]:
        if key != self.key:
            yield
        elif self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)

    def seconds(self) -> float:
        """Of all launches since the last call; waits for them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = sum(self._seconds) + sum(first.elapsed_time(last) for first, last in self._events) / 1e3
        self._seconds, self._events = [], []
        return took


@dataclass(frozen=True)
class Measured:
    """One configuration of one kernel at one shape."""

    config: str
    seconds: float | None = None
    """Median over repeats of an operation's launches; None if it was not timed."""
    error: float = 0.0
    """Of the operation's results, from the default's: largest difference over the largest value."""
    remark: str = ""


@dataclass
class Tuned:
    """What a tuning file holds."""

    choices: dict[str, int] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """Configurations that computed something else than the default."""


def tune(operation: Operation, tolerance: float, device: torch.device, repeats: int = 20) -> Tuned:
    """Every configuration of every kernel that ``operation`` launches, at the shapes that it launches."""
    launched: dict[str, Kernel] = {}

    @contextmanager
    def collect(kernel: Kernel, key: str) -> Iterator[None]:
        launched.setdefault(key, kernel)
        yield

    with watching(collect):
        expected = operation()
    tuned = Tuned()
    for key, kernel in launched.items():
        _, architecture, itemsize, *_ = key.split(" ")
        configs = kernel.choices(architecture, int(itemsize))
        found = [
            _measure(operation, kernel, key, index, expected, tolerance, device, repeats)
            for index in range(len(configs))
        ]
        tuned.measured[key] = found
        tuned.choices[key] = choose(found)
        tuned.wrong += [f"{key}: {m.config}: {m.remark}" for m in found if m.error > tolerance]
    return tuned


def choose(found: Sequence[Measured]) -> int:
    """Index of the fastest, if it is clearly faster than the default, which is the first."""
    timed = {index: m.seconds for index, m in enumerate(found) if m.seconds is not None}
    if not timed:
        return 0
    fastest = min(timed, key=lambda index: timed[index])
    return fastest if 0 not in timed or timed[fastest] < GAIN * timed[0] else 0


def _measure(
    operation: Operation, kernel: Kernel, key: str, index: int, expected: Sequence[Tensor], tolerance: float,
    device: torch.device, repeats: int,
) -> Measured:  # fmt: skip
    _, architecture, itemsize, *_ = key.split(" ")
    config = kernel.choices(architecture, int(itemsize))[index]
    with kernel.using(config):
        try:
            error = max(_error(x, y) for x, y in zip(operation(), expected, strict=True))
        except OutOfResources as reason:
            return Measured(str(config), remark=str(reason))
        if not error <= tolerance:
            return Measured(str(config), error=error, remark=f"relative error {error:.1e} from the default")
        stopwatch = Stopwatch(device, key)
        with watching(stopwatch.watch):
            times = []
            for _ in range(repeats):
                _occupy(device)
                operation()
                times.append(stopwatch.seconds())
    return Measured(str(config), seconds=statistics.median(times), error=error)


def _error(found: Tensor, expected: Tensor) -> float:
    """Infinite where anything is NaN."""
    difference = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    return difference / max(largest, 1e-30) if difference == difference else float("inf")


def _occupy(device: torch.device) -> None:
    """A millisecond of writing that also empties the cache: launches behind it queue up."""
    if device.type == "cuda":
        for _ in range(4):
            torch.empty(2**29, dtype=torch.int8, device=device).zero_()


def write(file: Path, tuned: Sequence[Tuned], device: torch.device) -> None:
    """Add to the tuning file, or replace its entries of the same shapes.

    Raises:
        ValueError: the file is there and is no tuning file for these kernels.
    """
    content: dict[str, Any] = {"choices": {}, "measured": {}}
    if file.exists():
        read_tuning(file)
        content.update(json.loads(file.read_text()))
    content["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    content["torch"], content["triton"] = torch.__version__, triton.__version__
    for one in tuned:
        content["choices"] |= one.choices
        content["measured"] |= {key: [asdict(m) for m in found] for key, found in one.measured.items()}
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the tuning file")
    for name, default in asdict(Shapes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--only", action="append", help="an operation's name, also several times; all if not given"
    )
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not available(device):
        raise SystemExit("tuning times kernels on a GPU, and there is none")
    shapes = Shapes(**{name: getattr(options, name) for name in asdict(Shapes())})
    dtype = getattr(torch, options.dtype)
    cases = operations(shapes, dtype, device)
    if unknown := set(options.only or ()) - set(cases):
        raise SystemExit(f"no operation is called {', '.join(sorted(unknown))}: {', '.join(cases)}")
    results = []
    for name in options.only or cases:
        results.append(tune(cases[name], TOLERANCE[dtype], device, options.repeats))
        for key, found in results[-1].measured.items():
            for index, m in enumerate(found):
                chosen = "*" if index == results[-1].choices[key] else " "
                took = m.remark if m.seconds is None else f"{m.seconds * 1e6:.1f} us"
                print(f"{chosen} {name}: {key}: {m.config}: {took}", flush=True)
        write(options.out, results, device)
    print(f"written: {options.out}; use it with {TUNING_FILE}={options.out}")
    if wrong := [line for result in results for line in result.wrong]:
        raise SystemExit("\n".join(["these configurations do not compute what the default does:", *wrong]))


if __name__ == "__main__":
    main()
