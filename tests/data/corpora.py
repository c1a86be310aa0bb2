"""Small corpora, and what ``opmix prepare`` made of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opmix_dist.data.catalogue import Catalogue, Split
from opmix_dist.data.ingest import PrepareConfig
from opmix_dist.data.mds import import_streaming
from opmix_dist.data.samples import Sample
from opmix_dist.data.tokenizer import END_OF_TEXT

T = 16
SILENT = Console(file=io.StringIO())
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def make_texts(seed: int, count: int, words: int = 60) -> list[str]:
    """Distinct documents with odd white space and characters of one to four bytes."""
    rng = np.random.default_rng(seed)
    vocabulary = ["alpha", "bêta", "γάμμα", "delta\n", "  eps", "😀", "7", "zeta", END_OF_TEXT]
    return [f"{seed}.{number} " + " ".join(rng.choice(vocabulary, words).tolist()) for number in range(count)]


def chat(question: str, *answers: str) -> dict[str, list[dict[str, str]]]:
    turns = [turn for answer in answers for turn in (("user", question), ("assistant", answer))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_texts(folder: Path, texts: Sequence[str]) -> str:
    """One file for each text."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05}.txt").write_text(text, encoding="utf-8", newline="")
    return str(folder)


def write_lines(folder: Path, rows: Sequence[Any], files: int) -> str:
    """JSON lines, a chunk in each of ``files`` files; a text becomes the field ``text``."""
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        lines = [json.dumps({"text": rows[i]} if isinstance(rows[i], str) else rows[i]) for i in part]
        (folder / f"{number:03}.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def config(out: Path, domains: dict[str, list[str]], **settings: Any) -> PrepareConfig:
    plain = {"vocab_size": 300, "sequence_length": T, "eval_fraction": 0.2, "workers": 1}
    return PrepareConfig(out=out, domains=domains, **{**plain, **settings})


def read_samples(catalogue: Catalogue, name: str, split: Split) -> list[Sample]:
    """All samples of a split, through streaming's own reader."""
    import_streaming()
    from streaming.base.format import reader_from_json

    folder = catalogue.root / name / split
    index = json.loads((folder / "index.json").read_text())
    shards = [reader_from_json(str(folder.parent), folder.name, shard) for shard in index["shards"]]
    return [Sample.from_row(shard[i]) for shard in shards for i in range(shard.samples)]


def read_documents(catalogue: Catalogue, name: str, split: Split) -> list[list[int]]:
    """Token ids of each document, by the samples' ends."""
    documents: list[list[int]] = [[]]
    for sample in read_samples(catalogue, name, split):
        begin = 0
        for end in sample.ends.tolist():
            documents[-1] += sample.tokens[begin:end].tolist()
            documents.append([])
            begin = end
        documents[-1] += sample.tokens[begin:].tolist()
    assert documents.pop() == [], "the last document has no end"
    return documents


def digests(root: Path) -> dict[str, str]:
    """Every file's path and hash, hidden ones included."""
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
