"""Real simulated losses to search on: a small Llama on the built-in corpus, its probes, held-out tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from opmix_dist.config import DataConfig, ModelConfig
from opmix_dist.data.build import held_out_samples, open_data
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.models.build import build_model, snapshot_source
from opmix_dist.models.flops import num_parameters
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from opmix_dist.pool.candidates import evaluate_candidates, simulate_with_gradients
from opmix_dist.pool.probes import save_probe, train_probes
from opmix_dist.search.simplex import Components
from opmix_dist.search_config import ProbeConfig
from opmix_dist.seeds import derive_seed

SEQUENCE_LENGTH = 128
LEARNING_RATE = 3e-3
STEPS, BATCH = 120, 16  # of pretraining on the uniform mixture
PROBES = ProbeConfig(steps=40, batch_size=8)
HELD_OUT = 8  # samples per domain
BETAS = (0.9, 0.95)
MODEL = ModelConfig(
    config={
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "tie_word_embeddings": True,
    }
)


class SimulatedLosses:
    """Losses [M, D] and gradients [M, D, K] of a snapshot's simulated models; evaluated points are kept.

    folder: holds corpus, snapshot, probes and points; what is there from an earlier run is used again. Remove
    it after a change of the settings above.
    """

    def __init__(self, folder: Path) -> None:
        data = folder / "data"
        _prepare(data)
        self.catalogue = open_data(DataConfig(root=str(data)))
        self.domains = self.catalogue.names
        uniform = np.full(len(self.domains), 1 / len(self.domains))
        self.components = Components.for_rebalance(self.domains, uniform)
        model = _snapshot(self.catalogue, folder / "snapshot")
        self.adapters = _probes(model, self.catalogue, self.components, folder / "probes")
        self.heldout = held_out_samples(
            DataConfig(root=str(data)), self.catalogue, samples_per_domain=HELD_OUT, seed=0
        )
        self._kept = folder / "points.npz"
        self._losses: dict[bytes, np.ndarray] = {}
        self._gradients: dict[bytes, np.ndarray] = {}
        if self._kept.exists():
            with np.load(self._kept) as found:
                for name, points in (("losses", self._losses), ("gradients", self._gradients)):
                    pairs = zip(found[f"{name}_at"], found[name], strict=True)
                    points.update((u.tobytes(), values) for u, values in pairs)

    def save(self) -> None:
        """Keep the points for the next run."""
        arrays = {}
        for name, points in (("losses", self._losses), ("gradients", self._gradients)):
            arrays[f"{name}_at"] = np.stack([np.frombuffer(key) for key in points])
            arrays[name] = np.stack([*points.values()])
        np.savez(self._kept, **arrays)

    def predict(self, candidates: np.ndarray) -> np.ndarray:
        """Losses [M, D] at U [M, K]."""
        for u in candidates:
            if u.tobytes() not in self._losses:
                found = evaluate_candidates(
                    self.adapters, u[None], *self._held_out(), method="merge", batch_size=16
                )
                self._losses[u.tobytes()] = found.loss[0]
        return np.stack([self._losses[u.tobytes()] for u in candidates])

    def gradient(self, u: np.ndarray) -> np.ndarray:
        """dL_i / du_k [D, K] at u [K]."""
        if u.tobytes() not in self._gradients:
            found = simulate_with_gradients(self.adapters, u[None], *self._held_out(), batch_size=16)
            self._gradients[u.tobytes()] = found.gradients[0]
        return self._gradients[u.tobytes()]

    def _held_out(self) -> tuple:
        return self.heldout.batch, self.heldout.domain_ids, len(self.domains)

    def describe(self) -> str:
        """The sizes that matter, in words."""
        return (
            f"{num_parameters(self.adapters.model):,} parameters, probes among them, {STEPS} steps of "
            f"{BATCH} x {SEQUENCE_LENGTH} tokens, probes of {PROBES.steps} steps of {PROBES.batch_size}, "
            f"{HELD_OUT} held-out samples per domain"
        )

    @property
    def evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        """U [M, K] and losses [M, D] of every point so far."""
        return np.stack([np.frombuffer(key) for key in self._losses]), np.stack([*self._losses.values()])


def _prepare(data: Path) -> None:
    command = [sys.executable, "-m", "opmix_dist.cli", "prepare", "--builtin", "--eval-fraction", "0.1"]
    command += ["--vocab-size", "2048", "--sequence-length", str(SEQUENCE_LENGTH), "--out", str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _snapshot(catalogue: Catalogue, folder: Path) -> PreTrainedModel:
    """A short pretraining on the uniform mixture."""
    if not (folder / "model.safetensors").exists():
        model = build_model(MODEL, vocab_size=catalogue.vocab_size, token_ids={}, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.1)
        batches = _loader(catalogue, np.ones(len(catalogue.names)), BATCH, "pretraining")
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20)
            batch = next(batches)
            loss = sample_losses(model, batch).sum() / batch.targets.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return snapshot_source(folder, attention="sdpa", trust_remote_code=False).whole()


def _probes(
    model: PreTrainedModel, catalogue: Catalogue, components: Components, folder: Path
) -> JointAdapters:
    names = components.names
    if all((folder / name).exists() for name in names):
        adapters = JointAdapters(model, names, rank=PROBES.rank, alpha=PROBES.alpha, seeds=[0] * len(names))
        for index, name in enumerate(names):
            adapters.load_peft(index, folder / name)
        return adapters
    batches = {
        name: _loader(catalogue, row, PROBES.batch_size, name)
        for name, row in zip(names, components.matrix, strict=True)
    }
    seeds = {name: derive_seed(0, "probe", name) for name in names}
    adapters, curves = train_probes(model, batches, PROBES, base_lr=LEARNING_RATE, betas=BETAS, seeds=seeds)
    for name in names:
        save_probe(adapters, name, curves[name], folder / name, "snapshot", 0.0)
    return adapters


def _loader(catalogue: Catalogue, weights: np.ndarray, batch: int, name: str):
    shares = dict(zip(catalogue.names, weights / weights.sum(), strict=True))
    loader = MixtureLoader(
        catalogue, shares, global_batch_size=batch, rank=0, world_size=1, seed=derive_seed(0, name)
    )
    return (loaded.batch for loaded in loader)
