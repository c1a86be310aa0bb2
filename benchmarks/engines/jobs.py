"""Whole ``opmix train`` jobs: what a search adds to their time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.engines.cases import JobCase
from benchmarks.engines.results import Overhead
from opmix_dist.data.ingest import PrepareConfig, prepare
from opmix_dist.data.tokenizer import save_tokenizer, train_tokenizer
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import SearchStage

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = 64
"""In each domain; an eighth is held out."""
POLL_S = 0.02


class JobError(Exception):
    """A job ended badly, or its search did."""


def measure(case: JobCase, *, dry: bool) -> Overhead:
    """The job without a search, then with it, on the same data.

    Raises:
        JobError: with the end of what the job printed.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-engines-") as name:
        folder = Path(name)
        data = make_data(case, folder)
        without = run(case, data, folder / "without", search=False, dry=dry)
        seconds = run(case, data, folder / "with", search=True, dry=dry)
        summary = RunDir(folder / "with").summary()
        (search,) = RunDir(folder / "with").search_dirs()
        status = search.status()
        if status is None or status.stage is not SearchStage.PROPOSED:
            raise JobError(f"the search ended with {status}")
        return Overhead(
            seconds=seconds,
            seconds_without=without,
            training_seconds=summary.costs["train"].seconds,
            search_seconds=sum(cost.seconds for cost in search.proposal().costs.values()),
        )


def make_data(case: JobCase, folder: Path) -> Path:
    """Domains of random token ids, each with frequencies of its own."""
    tokenizer = train_tokenizer(["one two three four"], 300)
    save_tokenizer(tokenizer, folder / "tokenizer")
    domains = {}
    for index in range(case.domains):
        rng = np.random.default_rng(index)
        frequencies = rng.permutation(1.0 / np.arange(1, 257))
        length = max(2, case.samples_per_domain) * 6 * case.length // DOCUMENTS
        tokens = rng.choice(256, size=(DOCUMENTS, length), p=frequencies / frequencies.sum())
        tokens[:, -1] = tokenizer.eos_token_id
        file = folder / f"domain{index}.npy"
        np.save(file, tokens.astype(np.uint16).ravel())
        domains[f"domain{index}"] = [str(file)]
    prepare(
        PrepareConfig(
            out=folder / "data",
            domains=domains,
            tokenizer=str(folder / "tokenizer"),
            sequence_length=case.length,
            eval_fraction=0.5,
            workers=1,
        )
    )
    return folder / "data"


def settings(case: JobCase, data: Path, run_dir: Path, *, search: bool, dry: bool) -> dict[str, Any]:
    """A run's configuration; probes read a tenth of its steps, as in the paper."""
    sizes = case.model
    return {
        "run_dir": str(run_dir),
        "data": {"root": str(data)},
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": sizes.width, "intermediate_size": sizes.intermediate,
                "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads, "vocab_size": max(sizes.vocab, 300),
                "max_position_embeddings": case.length, "tie_word_embeddings": True,
            }
        },
        "engine": {
            "name": "single", "device": "cpu" if dry else "cuda", "param_dtype": "bfloat16",
            "compile": case.compiled, "logits_memory": None,
        },
        "train": {
            "steps": case.steps, "global_batch_size": case.batch, "micro_batch_size": case.micro,
            "eval_samples_per_domain": case.samples_per_domain, "log_interval_steps": 10,
        },
        "checkpoint": {"interval_steps": 0},
        "mixture": {"policy": "opmix" if search else "static"},
        "search": {
            "mode": "async" if case.mode == "async" else "sync",
            "probes": {"steps": max(1, case.steps // 10), "batch_size": case.probe_batch},
            "candidates": {"samples_per_domain": case.samples_per_domain},
        },
        "pool": {"external": search and case.mode != "inline", "poll_interval_s": 0.2},
    }  # fmt: skip


def run(case: JobCase, data: Path, run_dir: Path, *, search: bool, dry: bool) -> float:
    """Seconds from the first finished step to the last one; what the job compiles for its steps comes
    before."""
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings(case, data, run_dir, search=search, dry=dry)))
    with open(run_dir.with_suffix(".log"), "w+b") as log:
        pool = None
        trainer = _opmix(log, "train", str(config))
        try:
            if search and case.mode != "inline":
                pool = _opmix(log, "pool", "--run", str(run_dir))
            seconds = _watch(trainer, RunDir(run_dir).train_file, case.steps)
            if trainer.wait() != 0:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 1500))
                raise JobError(log.read().decode(errors="replace"))
        finally:
            for process in (trainer, pool):
                if process is not None and process.poll() is None:
                    process.terminate()
                    process.wait()
    return seconds


def _opmix(log: Any, *arguments: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "opmix_dist.cli", *arguments],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )


def _watch(trainer: subprocess.Popen[bytes], lines: Path, steps: int) -> float:
    """When the log's first and last line are there, to ``POLL_S``."""
    first = 0.0
    while True:
        count = lines.read_bytes().count(b"\n") if lines.exists() else 0
        now = time.perf_counter()
        if count and not first:
            first = now
        if count == steps or trainer.poll() is not None:
            return now - first
        time.sleep(POLL_S)
