"""Data that several test files share, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

DOMAINS = ("json", "prose", "python")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
