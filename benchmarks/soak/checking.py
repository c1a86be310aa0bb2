"""What must be true of a run that had faults: it is the run that had none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.soak.drawing import DOMAINS
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, damage
from opmix_dist.exchange.rundir import RunDir, read_record


def curve(run: RunDir) -> list[tuple[Any, ...]]:
    """All of the training log that must not depend on faults."""
    return [(x.step, x.loss, x.grad_norm, x.lr, x.domain_loss, x.tokens) for x in run.train_lines()]


def problems(run: RunDir, moved: RunDir, kept: Callable[[], RunDir], tokens_per_step: int) -> list[str]:
    """What is wrong with a run that has ended.

    Args:
        moved: the same job without faults.
        kept: gives the same job without a search: what training is where the search has failed.
        tokens_per_step: of a global batch.
    """
    found = []
    records = run.mixtures()
    if [record.step for record in records] != [record.step for record in moved.mixtures()]:
        found.append(f"decisions at steps {[record.step for record in records]}")
    changed = len(records) > 1 and records[1].changed
    if changed and records[1].weights != moved.mixtures()[1].weights:
        found.append(f"another mixture: {records[1].weights}")
    if not changed and not any("failed: " in record.why for record in records):
        found.append("the mixture stayed, and nothing says why")
    reference = moved if changed else kept()
    found += _same_training(run, reference, tokens_per_step)
    for step in run.complete_checkpoints():
        folder = run.checkpoint(step)
        marker = read_record(folder / files.COMPLETE, CheckpointMarker)
        if harm := damage(folder, marker.files or {}, checksums=True):
            found.append(f"the checkpoint of step {step}: {harm}")
    if run.damaged_checkpoints():
        found.append(f"damaged checkpoints: {run.damaged_checkpoints()}")
    return found


def _same_training(run: RunDir, reference: RunDir, tokens_per_step: int) -> list[str]:
    """Bit for bit; behind a batch that was left out, the same number of samples in the same proportions."""
    left_out = run.bad_steps()
    until = min((bad.step for bad in left_out), default=len(reference.train_lines()))
    ours, theirs = curve(run), curve(reference)
    found = []
    if len(ours) != len(theirs) or ours[:until] != theirs[:until]:
        first = next(
            (a[0] for a, b in zip(ours, theirs, strict=False) if a != b), min(len(ours), len(theirs))
        )
        found.append(f"{len(ours)} steps of {len(theirs)}, other losses from step {first} on")
    if not left_out:
        if run.summary().domain_tokens != reference.summary().domain_tokens:
            found.append(f"other data: {run.summary().domain_tokens}")
        if run.eval_lines() != reference.eval_lines():
            found.append("other held-out losses")
        if weights(run) != weights(reference):
            found.append("the exported model differs")
    elif run.summary().tokens != reference.summary().tokens + len(left_out) * tokens_per_step:
        found.append(f"{run.summary().tokens} tokens with {len(left_out)} batches left out")
    return found + _export(run)


def _export(run: RunDir) -> list[str]:
    from transformers import AutoModelForCausalLM

    files.require_complete(run.export, "export")
    model = AutoModelForCausalLM.from_pretrained(run.export)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = run.summary().parameters
    return [] if parameters == expected else [f"the export has {parameters} parameters of {expected}"]


def weights(run: RunDir) -> dict[str, str]:
    """Hashes of the exported model's files."""
    return _hashes(run.export, "*.safetensors")


def data_problems(made: Path, reference: Path) -> list[str]:
    """How domains that were prepared with faults differ from those without."""
    found = []
    for name in DOMAINS:
        ours, theirs = (_hashes(root / name, "*.mds") for root in (made, reference))
        if not theirs or ours != theirs:
            found.append(f"domain {name} has other bytes")
    return found


def _hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
    }
