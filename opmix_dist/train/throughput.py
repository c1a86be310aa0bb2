"""Speed and memory of a training step, over all trainer ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opmix_dist.engines.base import Engine
from opmix_dist.engines.held import HeldBytes
from opmix_dist.exchange.schemas import MemoryUse
from opmix_dist.ledger import Ledger

_HELD = ("parameters", "gradients", "optimizer", "offloaded")
_MEMORY = (*_HELD, "peak", "reserved")


class Throughput:
    """Times the steps, and puts what ranks tell of them into one line of the log.

    A rank's own numbers travel in the sum of the step's losses (:meth:`readings`), so that no collective and
    no wait is there for them alone.
    """

    def __init__(self, engine: Engine, ledger: Ledger, *, peak_flops: float | None, memory_interval: int):
        """
        Args:
            ledger: its phases are no part of a step.
            peak_flops: FLOP/s of a rank's device at most; None: not known.
            memory_interval: steps between lines with memory.
        """
        self.engine, self.ledger = engine, ledger
        self.peak_flops, self.memory_interval = peak_flops, memory_interval
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self._end, self._elsewhere = time.perf_counter(), self.ledger.elsewhere

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the loader of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited = time.perf_counter() - start

    def readings(self, step: int) -> Tensor:
        """This rank's numbers [R] float64: seconds that it waited for data and, every ``memory_interval``
        steps, its memory. R is the same on all ranks."""
        found = [self._waited]
        if step % self.memory_interval == 0:
            memory = measure_memory(self.engine.held_bytes(), self.engine.world.device)
            found += [float(memory[name]) for name in _MEMORY]
        return torch.tensor(found, dtype=torch.float64)

    def lap(self) -> float:
        """Seconds since the end of the step before, without those of the ledger's other phases. To be called
        at a step's end."""
        now, elsewhere = time.perf_counter(), self.ledger.elsewhere
        seconds = now - self._end - (elsewhere - self._elsewhere)
        self._end, self._elsewhere = now, elsewhere
        return seconds

    def describe(
        self, readings: Tensor, *, tokens: int, tokens_per_pass: int, seconds: float
    ) -> dict[str, Any]:
        """Fields of a :class:`~opmix_dist.exchange.schemas.TrainLine`.

        Args:
            readings: of all W ranks, [W, R].
            tokens: of the step, over all ranks.
            tokens_per_pass: of a micro-batch.
        """
        ranks = len(readings)
        each = tokens / seconds / ranks
        flops = self.engine.train_flops
        hardware = flops + self.engine.recomputed_flops(tokens_per_pass)
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": each,
            "seconds": seconds,
            "data_seconds": float(readings[:, 0].max()),
            "mfu": None if self.peak_flops is None else each * flops / self.peak_flops,
            "hfu": None if self.peak_flops is None else each * hardware / self.peak_flops,
            "memory": _worst(readings[:, 1:], self.engine.world.device) if readings.shape[1] > 1 else None,
        }


def measure_memory(held: HeldBytes, device: torch.device) -> dict[str, int]:
    """Bytes by the names of ``_MEMORY``. A GPU's peak is that since the call before; a CPU's, which the
    kernel does not let a process reset, that of the process (``reserved`` is 0)."""
    found = {name: getattr(held, name) for name in _HELD}
    if device.type == "cuda":
        found |= {
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
        return found
    return found | {"peak": peak_resident_bytes(), "reserved": 0}


def peak_resident_bytes() -> int:
    """Most of this process that was in physical memory. Not getrusage's, which a process inherits from the
    one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM")


def _worst(memory: Tensor, device: torch.device) -> MemoryUse:
    """Of the rank with the highest peak, from all ranks' [W, M]."""
    rank = int(memory[:, _MEMORY.index("peak")].argmax())
    found = {name: int(value) for name, value in zip(_MEMORY, memory[rank].tolist(), strict=True)}
    on_device = found["parameters"] + found["gradients"] + found["optimizer"]
    return MemoryUse(
        rank=rank,
        activations_and_others=max(0, found["peak"] - on_device),
        measured="allocated" if device.type == "cuda" else "resident",
        **found | {"reserved": found["reserved"] or None},
    )
