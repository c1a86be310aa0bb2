"""Evaluated candidates on disk: what a killed search has simulated is not simulated again.

Each candidate is one small safetensors file, named by a digest of its coefficients and of everything else
that its losses depend on, and written by the rank that simulated it. Sums of single samples are kept, not
only losses of domains: differences between candidates have paired standard errors.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opmix_dist.data.loader import EvalSet
from opmix_dist.distributed import World
from opmix_dist.exchange import files
from opmix_dist.models.loss import DomainLosses, losses_by_domain

log = logging.getLogger(__name__)
HASHED_BYTES = 1 << 20
"""Read of both ends of each file of a snapshot for its identity: all of it may be hundreds of GB."""


@dataclass(frozen=True)
class Evaluations:
    """What was measured of M candidates.

    sums: of the losses of each sample's targets [M, N], nats; gradients: dL_i / du_k [M, D, K], None where
    they were not asked for; targets, domain_ids: of the samples [N].
    """

    sums: np.ndarray
    gradients: np.ndarray | None
    targets: np.ndarray
    domain_ids: np.ndarray
    num_domains: int

    @property
    def losses(self) -> DomainLosses:
        """By domain [M, D]."""
        return losses_by_domain(self.sums, self.targets, self.domain_ids, self.num_domains)

    def resampled(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Losses [count, M, D] on samples drawn with replacement, as many of each domain as it has with
        targets; the same samples for all candidates."""
        found = np.zeros((count, len(self.sums), self.num_domains))
        for d in range(self.num_domains):
            rows = np.flatnonzero((self.domain_ids == d) & (self.targets > 0))
            if rows.size:
                drawn = rng.multinomial(rows.size, np.full(rows.size, 1 / rows.size), size=count)
                found[..., d] = drawn @ self.sums[:, rows].T / (drawn @ self.targets[rows])[:, None]
        return found

    def changes_from(self, base: Evaluations) -> DomainLosses:
        """Losses minus those of the one candidate ``base`` [M, D], with the errors of such differences: what
        makes a sample hard for both drops out."""
        return losses_by_domain(self.sums - base.sums, self.targets, self.domain_ids, self.num_domains)


Simulate = Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray | None]]
"""U [m, K] and whether to take gradients, to sums [m, N] and gradients [m, D, K] or None."""


class Evaluator:
    """Simulates candidates, each once, divided over the ranks of ``world``.

    Args:
        folder: of the files.
        identity: digest of all that the losses depend on besides the coefficients; the same on all ranks.
        joint: candidates that are simulated together.
        together: runs what may fail on one rank, and raises on all ranks then.
        simulate: does not communicate.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        heldout: EvalSet,
        num_domains: int,
        *,
        world: World,
        joint: int,
        together: Callable[[Callable[[], None]], None],
        simulate: Simulate,
    ) -> None:
        self.world, self.joint, self.together, self.simulate = world, joint, together, simulate
        self.targets, self.domain_ids = heldout.batch.targets.numpy(), heldout.domain_ids.numpy()
        self.num_domains = num_domains
        self.files = EvaluationFiles(folder, identity, self.targets)
        self.counted: set[str] = set()
        self.earlier_seconds = 0.0

    def evaluate(self, U: np.ndarray, *, gradients: bool = False) -> Evaluations:
        """Collective. Measure the rows of U [M, K], or read them where they were measured.

        A group of candidates that are simulated together is simulated again as a whole: the shapes of its
        products, and with them the last digits of its losses, do not depend on where an attempt was killed.
        """
        per_group = 1 if gradients else max(1, min(self.joint, -(-len(U) // self.world.size)))
        groups = [range(i, min(i + per_group, len(U))) for i in range(0, len(U), per_group)]
        here: dict[int, _Measured] = {}
        self.together(lambda: here.update(self._read(U, gradients)) if self.world.is_leader else None)
        plan = ",".join(str(i) for i, group in enumerate(groups) if not here.keys() >= set(group))
        text = self.world.share_text(plan if self.world.is_leader else None)  # one view of the file system
        missing = [groups[int(i)] for i in text.split(",") if i]
        for group in missing:
            for row in group:
                here.pop(row, None)
        mine = missing[self.world.rank :: self.world.size]
        self._count_earlier(here.values())
        self.together(lambda: here.update(self._simulate(U, mine, gradients)))
        return self._put_together(here, U, gradients)

    def new(self, U: np.ndarray) -> int:
        """How many rows of U were not asked for before by this process: for the ledger, once each."""
        keys = {self.files.key(u) for u in U} - self.counted
        self.counted |= keys
        return len(keys)

    def _read(self, U: np.ndarray, gradients: bool) -> dict[int, _Measured]:
        found = ((row, self.files.read(u)) for row, u in enumerate(U))
        return {row: m for row, m in found if m is not None and (not gradients or m.gradients is not None)}

    def _count_earlier(self, found: Iterable[_Measured]) -> None:
        """Wall time that earlier attempts spent on what this one reads; on the leader, which reads."""
        for measured in found:
            if measured.key not in self.counted:
                self.earlier_seconds += measured.seconds / self.world.size

    def _simulate(self, U: np.ndarray, groups: list[range], gradients: bool) -> dict[int, _Measured]:
        found = {}
        for group in groups:
            start = time.perf_counter()
            sums, slopes = self.simulate(U[list(group)], gradients)
            seconds = (time.perf_counter() - start) / len(group)
            for i, row in enumerate(group):
                key = self.files.key(U[row])
                found[row] = _Measured(key, sums[i], None if slopes is None else slopes[i], seconds)
                self.files.write(U[row], found[row])
        return found

    def _put_together(self, mine: dict[int, _Measured], U: np.ndarray, gradients: bool) -> Evaluations:
        """Collective. Every row lies on exactly one rank; a sum over ranks brings it to all."""
        count, samples = len(U), len(self.targets)
        width = self.num_domains * U.shape[1] if gradients else 0
        shared = torch.zeros(count, samples + width, dtype=torch.float64)
        for row, measured in mine.items():
            shared[row, :samples] = torch.from_numpy(measured.sums)
            if gradients:
                assert measured.gradients is not None
                shared[row, samples:] = torch.from_numpy(measured.gradients).flatten()
        values = self.world.sum(shared).numpy()
        sums = values[:, :samples].copy()
        slopes = values[:, samples:].reshape(count, self.num_domains, U.shape[1]) if gradients else None
        return Evaluations(sums, slopes, self.targets, self.domain_ids, self.num_domains)


@dataclass(frozen=True)
class _Measured:
    """One candidate: sums [N] and gradients [D, K] or None; the seconds that it took."""

    key: str
    sums: np.ndarray
    gradients: np.ndarray | None
    seconds: float


class EvaluationFiles:
    """The folder ``evaluations`` of a search. Whatever is not a whole file of this very evaluation is as
    good as absent."""

    def __init__(self, folder: Path, identity: str, targets: np.ndarray) -> None:
        self.folder, self.identity, self.targets = folder, identity, targets.astype(np.int64)

    def key(self, u: np.ndarray) -> str:
        """Name of a candidate's file."""
        return hashlib.sha256(self.identity.encode() + _bytes(u)).hexdigest()[:32]

    def path(self, u: np.ndarray) -> Path:
        return self.folder / f"{self.key(u)}.safetensors"

    def write(self, u: np.ndarray, measured: _Measured) -> None:
        content = {"u": np.asarray(u, dtype=np.float64), "sums": measured.sums, "targets": self.targets}
        if measured.gradients is not None:
            content["gradients"] = measured.gradients
        content["seconds"] = np.array([measured.seconds])
        content["digest"] = self._digest(content)
        files.write_bytes(self.path(u), save({name: np.ascontiguousarray(a) for name, a in content.items()}))

    def read(self, u: np.ndarray) -> _Measured | None:
        """None where the file is absent, damaged, or another candidate's."""
        path = self.path(u)
        try:
            content = load(path.read_bytes())
            sound = (
                np.array_equal(content["u"], u)
                and np.array_equal(content["targets"], self.targets)
                and content["sums"].shape == self.targets.shape
                and np.array_equal(content.pop("digest"), self._digest(content))
            )
            if sound:
                seconds = float(content["seconds"][0])
                return _Measured(self.key(u), content["sums"], content.get("gradients"), seconds)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            sound = False
        log.warning("%s is damaged: that candidate is evaluated again", path)
        return None

    def _digest(self, content: dict[str, np.ndarray]) -> np.ndarray:
        """SHA-256 of identity and tensors, [32] uint8."""
        found = hashlib.sha256(self.identity.encode())
        for name in sorted(content):
            found.update(name.encode() + _bytes(content[name]))
        return np.frombuffer(found.digest(), dtype=np.uint8)


def _bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def identity_of(
    snapshot: str, folder: Path | None, adapters: Iterable[Path], heldout: EvalSet, *settings: object
) -> str:
    """Digest of all that a candidate's losses depend on besides its coefficients.

    Args:
        snapshot: name of the base; folder: where its files lie, None for a model of the hub.
        adapters: files of the probes' weights, hashed whole; of the base's files, names, sizes and ends are.
        settings: of the evaluation that change the numbers.
    """
    found = hashlib.sha256(repr((snapshot, settings)).encode())
    for path in adapters:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        found.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as file:
            found.update(file.read(HASHED_BYTES))
            file.seek(-min(HASHED_BYTES, path.stat().st_size), 2)
            found.update(file.read())
    batch = heldout.batch
    for tensor in (batch.tokens, batch.loss_mask, batch.position_ids, heldout.domain_ids):
        if tensor is not None:
            found.update(_bytes(tensor.numpy()))
    return found.hexdigest()
