"""Evaluated candidates on disk: what a killed search has simulated is not simulated again.

Each candidate is one small safetensors file, named by a digest of its coefficients and of everything else
that its losses depend on, and written by the rank that simulated it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opmix_dist.bounded import read_bounded
from opmix_dist.data.loader import EvalSet
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.pool.early_stop import EarlyStop

log = logging.getLogger(__name__)
MAX_FILE_BYTES = 256 << 20
"""Of one candidate: some numbers for each held-out sample."""
HASHED_BYTES = 1 << 20
"""Read of both ends of each file of a snapshot for its identity: all of it may be hundreds of GB."""


@dataclass(frozen=True)
class Measured:
    """One candidate: sums [N]; seen [N] bool where it was stopped early; gradients [D, K] or None; the
    seconds that it took."""

    key: str
    sums: np.ndarray
    seen: np.ndarray | None
    gradients: np.ndarray | None
    seconds: float


class EvaluationFiles:
    """The folder ``evaluations`` of a search. Whatever is not a whole file of this very evaluation is as
    good as absent."""

    def __init__(self, folder: Path, identity: str, targets: np.ndarray) -> None:
        self.folder, self.identity, self.targets = folder, identity, targets.astype(np.int64)

    def key(self, u: np.ndarray, stopping: EarlyStop | None = None) -> str:
        """Name of a candidate's file; with ``stopping``, of what is known of it where that stopped it."""
        rule = stopping.tag if stopping else ""
        return hashlib.sha256((self.identity + rule).encode() + _bytes(u)).hexdigest()[:32]

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def write(self, u: np.ndarray, measured: Measured) -> None:
        content = {"u": np.asarray(u, dtype=np.float64), "sums": measured.sums, "targets": self.targets}
        if measured.seen is not None:
            content["seen"] = measured.seen
        if measured.gradients is not None:
            content["gradients"] = measured.gradients
        content["seconds"] = np.array([measured.seconds])
        content["digest"] = self._digest(measured.key, content)
        plain = {name: np.ascontiguousarray(values) for name, values in content.items()}
        files.write_bytes(self.path(measured.key), save(plain))

    def read(self, u: np.ndarray, stopping: EarlyStop | None = None) -> Measured | None:
        """What ``stopping`` left of it, or else all of it. None where the files are absent, damaged, or of
        another candidate."""
        part = self._read(u, self.key(u, stopping)) if stopping else None
        return part or self._read(u, self.key(u))

    def _read(self, u: np.ndarray, key: str) -> Measured | None:
        path = self.path(key)
        try:
            content = load(read_bounded(path, MAX_FILE_BYTES))
            sound = (
                np.array_equal(content["u"], u)
                and np.array_equal(content["targets"], self.targets)
                and content["sums"].shape == self.targets.shape
                and np.array_equal(content.pop("digest"), self._digest(key, content))
            )
            if sound:
                seconds = float(content["seconds"][0])
                return Measured(key, content["sums"], content.get("seen"), content.get("gradients"), seconds)
        except FileNotFoundError:
            return None
        except (SafetensorError, UserError, OSError, KeyError, ValueError, IndexError):
            sound = False
        log.warning("%s is damaged: that candidate is evaluated again", path)
        return None

    def _digest(self, key: str, content: dict[str, np.ndarray]) -> np.ndarray:
        """SHA-256 of the file's name, which stands for the identity, and its tensors, [32] uint8."""
        found = hashlib.sha256(key.encode())
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
