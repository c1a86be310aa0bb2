"""`opmix data ls` and `inspect`: a folder's, a store's and a run's data as a user sees them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opmix_dist.cli import main
from opmix_dist.config import RunConfig
from opmix_dist.data.build import open_data, read_options
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.excerpt import choose, excerpt
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.data.printable import first_words, printable
from opmix_dist.data.samples import Sample
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import MixtureRecord
from opmix_dist.seeds import derive_seed
from opmix_dist.train.checkpoint import STATE_FILE
from opmix_dist.train.state import TrainerState
from tests.data.sound_folder import (
    change_domain,
    write_chats_domain,
    write_samples,
    write_texts_domain,
    write_tokenizer,
)
from tests.s3_server import s3_server
from tests.train.jobs import tiny_config

pytestmark = pytest.mark.usefixtures("streaming")

CHATS = [("2+2?", "4"), ("3+3?", "6"), ("1+1?", "2")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web: 41 train tokens in 3 samples, 6 of eval; chat: 2 conversations in a train sample, one of eval."""
    root = tmp_path_factory.mktemp("data")
    write_tokenizer(root)
    write_texts_domain(root, "web", ["w" * 24, "line one\nline t"], ["held\t!"[:5]], compression="zstd")
    write_chats_domain(root, "chat", CHATS)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Output of a command that ends well."""
    capsys.readouterr()
    assert main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["data", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_ls_counts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, web, total = rows(run(capsys, "ls", root, "--json"))
    assert (chat["domain"], chat["packing"], chat["compression"], chat["dtype"]) == (
        "chat", "best_fit", "none", "uint16",
    )  # fmt: skip
    assert chat["train"] == {"samples": 1, "tokens": 12, "documents": 2}
    assert web["train"] == {"samples": 3, "tokens": 41, "documents": 2}
    assert web["eval"] == {"samples": 1, "tokens": 6, "documents": 1}
    assert total["train"] == {"samples": 4, "tokens": 53, "documents": 4}
    assert total["eval"] == {"samples": 2, "tokens": 12, "documents": 2}
    stored = sum(path.stat().st_size for path in root.rglob("shard.*"))
    assert total["stored_bytes"] == total["here_bytes"] == stored
    assert (total["domains"], total["shards"], total["sequence_length"], total["vocab_size"]) == (
        2,
        4,
        16,
        257,
    )
    catalogue = Catalogue.open(root)
    assert total["tokenizer_fingerprint"] == catalogue.tokenizer_fingerprint
    text = run(capsys, "ls", root)
    assert f"tokenizer {catalogue.tokenizer_fingerprint[:12]}, vocabulary 257, samples of at most 16" in text
    assert "uint16, zstd" in text
    assert "2 in all" in text


def test_ls_and_inspect_of_a_store(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with s3_server() as server:
        url = server.upload(root, "listed")
        assert "give --cache" in refused(capsys, "ls", url)
        before = rows(run(capsys, "ls", url, "--cache", tmp_path / "cache", "--json"))[-1]
        assert before["here_bytes"] == 0
        assert server.shards_requested() == []
        text = run(capsys, "inspect", url, "--cache", tmp_path / "cache", "--domain", "web", "--sample", 0)
        assert f"{url}/web/train/shard.00000.mds.zstd row 0" in text
        after = rows(run(capsys, "ls", url, "--cache", tmp_path / "cache", "--json"))[-1]
        assert after["here_bytes"] == (tmp_path / "cache/web/train/shard.00000.mds").stat().st_size
        assert "--cache-limit lots" in refused(
            capsys, "ls", url, "--cache", tmp_path, "--cache-limit", "lots"
        )


# --- inspect -----------------------------------------------------------------------------------------------


def test_inspect_shows_borders_of_documents(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    text = run(capsys, "inspect", root, "--domain", "web", "--sample", 1)
    assert text.splitlines() == [
        f"web train sample 1: {root}/web/train/shard.00000.mds.zstd row 1",
        # all but the first token of the sample; of the second document, with masks, its first one neither
        "16 of 16 tokens, documents 2, targets 15 (14 with data.mask_documents)",
        "| wwwwwwww<|endoftext|>",
        "---",
        "| line on",
        "--- goes on in the next sample",
        "",
        "--- is where a document ends",
    ]
    assert sorted(root.rglob("*")) == before, "nothing is decompressed into the folder"


def test_inspect_keeps_lines(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "inspect", root, "--domain", "web", "--sample", 2)
    assert text.splitlines()[1:5] == [
        "9 of 16 tokens, documents 1, targets 8",
        "| e",
        "| line t<|endoftext|>",
        "---",
    ]


def test_inspect_tells_what_is_learnt(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "inspect", root, "--domain", "chat", "--sample", 0)
    assert text.splitlines()[1:] == [
        "12 of 16 tokens, documents 2, targets 4",
        "  2+2?",
        "+ 4<|endoftext|>",
        "---",
        "  3+3?",
        "+ 6<|endoftext|>",
        "---",
        "",
        "--- is where a document ends; lines that begin with + are learnt, the others are context",
    ]


def test_inspect_chooses_by_seed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose(3, 9, 0, "web") == [0, 1, 2]
    assert choose(1000, 4, 0, "web") == choose(1000, 4, 0, "web") != choose(1000, 4, 1, "web")
    assert len(set(choose(1000, 50, 0, "web"))) == 50
    text = run(capsys, "inspect", root, "--domain", "web", "--count", 2, "--split", "eval")
    assert text.count("web eval sample 0") == 1


def test_inspect_refuses(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "samples 0 to 2" in refused(capsys, "inspect", root, "--domain", "web", "--sample", 3)
    assert "samples 0 to 2" in refused(capsys, "inspect", root, "--domain", "web", "--sample", -1)
    assert "the nearest is `web`" in refused(capsys, "inspect", root, "--domain", "wed")
    assert "--count 0" in refused(capsys, "inspect", root, "--domain", "web", "--count", 0)


def test_inspect_shows_what_training_refuses(root: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "data"))
    shutil.rmtree(copy / "web" / "train")
    write_samples(copy / "web" / "train", [Sample(np.array([65, 300], np.uint16), np.array([2], np.uint32))])
    change_domain(copy, "web")
    text = run(capsys, "inspect", copy, "--domain", "web", "--sample", 0)
    assert "training refuses it: it has token 300, beyond the vocabulary of 257" in text


def test_a_document_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path)
    write_texts_domain(tmp_path, "web", ["\x1b[2J[b]x\r\x9b1m\x00"], ["\u202eabc[/red]"])
    text = run(capsys, "inspect", tmp_path, "--domain", "web", "--sample", 0)
    assert r"| \x1b[2J[b]x\r\x9b1m\x00<|endof" in text.replace("text|>", "")
    text += run(capsys, "inspect", tmp_path, "--domain", "web", "--split", "eval")
    assert r"| \u202eabc[/red]" in text
    assert not set(text) & set("\x1b\r\x9b\x00\u202e")


def test_printable() -> None:
    assert printable("naïve 日本 😀\n\tx") == "naïve 日本 😀\n\tx"
    assert printable("a\u2028b\u200eb\u0007\ud800") == r"a\u2028b\u200eb\x07\ud800"
    assert first_words("a\n b\x1b " + "c" * 99, most=12) == r"a b\x1b cccc"[:11] + "…"


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(root: Path, tmp_path: Path) -> tuple[RunDir, MixtureLoader]:
    """A run that has drawn 5 batches of 4 with 3:1, saved, and decided on another mixture."""
    plain = tiny_config(root, tmp_path / "run", pool={"ranks": 0}, seed=3)
    plain["data"] |= {"domains": ["web", "chat"], "max_epochs": {"chat": 6}}
    config = RunConfig.model_validate(plain)
    run_dir, catalogue = RunDir(config.run_dir), open_data(config.data)
    weights = {"web": 0.75, "chat": 0.25}
    loader = MixtureLoader(
        catalogue, weights, global_batch_size=4, rank=0, world_size=1, seed=derive_seed(config.seed, "data"),
        shuffle_block=config.data.shuffle_block, reading=read_options(config.data),
    )  # fmt: skip
    for _ in range(5):
        next(loader)
    run_dir.write_config(config)
    state = TrainerState(
        step=5, weights=weights, domain_tokens={}, loader=loader.state_dict(), content={}, world_size=1,
        global_batch_size=4,
    )  # fmt: skip
    for step, mixture in ((0, weights), (6, {"web": 0.5, "chat": 0.5})):
        record = MixtureRecord(version=step, step=step, weights=mixture, why="a test")
        files.append_jsonl(run_dir.mixtures_file, record.model_dump())
    write_record(run_dir.checkpoint(5) / STATE_FILE, state)
    return run_dir, loader


def test_ls_of_a_run(job: tuple[RunDir, MixtureLoader], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, loader = job
    web, chat, total = rows(run(capsys, "ls", run_dir.path, "--json"))
    assert web["weight"] == chat["weight"] == 0.5
    assert web["drawn_samples"] is total["checkpoint_step"] is None
    assert "no checkpoint yet" in run(capsys, "ls", run_dir.path)
    files.mark_complete(run_dir.checkpoint(5), {"step": 5})
    web, chat, total = rows(run(capsys, "ls", run_dir.path, "--json"))
    assert [web["domain"], chat["domain"]] == ["web", "chat"]
    assert [web["drawn_samples"], chat["drawn_samples"]] == loader.counts().tolist() == [15, 5]
    assert [web["drawn_epochs"], chat["drawn_epochs"]] == [5.0, 5.0]
    assert [web["drawn_share"], chat["drawn_share"]] == [0.75, 0.25]
    assert total["checkpoint_step"] == 5
    text = run(capsys, "ls", run_dir.path)
    assert "drawn as of the checkpoint of step 5" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "may be" in text
    assert [web["allowed_samples"], chat["allowed_samples"]] == [None, 6]


def test_ls_of_a_run_whose_data_changed(job, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = job
    files.mark_complete(run_dir.checkpoint(5), {"step": 5})
    copy = Path(shutil.copytree(root, run_dir.path.parent / "copy"))
    shutil.rmtree(copy / "web")
    write_texts_domain(copy, "web", ["w" * 99], ["x"])
    run_dir.write_config(run_dir.config().model_copy(update={
        "data": run_dir.config().data.model_copy(update={"root": str(copy)}),
    }))  # fmt: skip
    assert "domain web has other shards" in refused(capsys, "ls", run_dir.path)


def test_verify_and_inspect_of_a_run(job, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = job
    text = run(capsys, "verify", run_dir.path, "--workers", 1)
    assert text.splitlines()[-1] == "sound; no duplicates"
    assert "web train sample 0" in run(capsys, "inspect", run_dir.path, "--domain", "web", "--sample", 0)


def test_excerpt_of_a_sample_without_an_end(root: Path) -> None:
    catalogue = Catalogue.open(root)
    found = excerpt(catalogue, catalogue.load_tokenizer(), "chat", "eval", 0)
    assert (found.documents, found.chat, found.fault) == (1, True, None)
    assert [(passage.text, passage.learnt) for passage in found.passages] == [
        ("1+1?", False),
        ("2<|endoftext|>", True),
    ]
