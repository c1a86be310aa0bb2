"""Data that several test files share, made once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # read when kernels are defined: before anything imports them
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a machine that does other things is no failure
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

DOMAINS = ("json", "prose", "python")


@pytest.fixture(scope="session")
def streaming() -> None:
    """For tests that write or read shards: skips where the package, whose pins are old, is not installed."""
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed")


@pytest.fixture(scope="session")
def tiny_data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in domains cut to 80 kB each, samples of 64 tokens, a vocabulary of 512."""
    from opmix_dist.data.ingest import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("tiny_data")
    prepare(
        PrepareConfig(
            out=root,
            builtin=True,
            builtin_max_bytes=80_000,
            vocab_size=512,
            sequence_length=64,
            eval_fraction=0.2,
            workers=1,
        )
    )
    return root
