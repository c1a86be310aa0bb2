"""`opmix data verify`: every planted fault is found and named, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from opmix_dist.cli import main
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.samples import Sample
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore
from opmix_dist.data.tokenizer import train_tokenizer
from opmix_dist.data.verify import VerifyReport, verify
from opmix_dist.errors import UserError
from tests.data.shard_files import flip_a_byte
from tests.data.sound_folder import (
    T,
    change_domain,
    encode,
    tokenizer_of,
    write_chats_domain,
    write_samples,
    write_texts_domain,
    write_tokenizer,
)
from tests.helpers import ROOT
from tests.s3_server import s3_server

pytestmark = pytest.mark.usefixtures("streaming")

# 8 to 46 tokens each with EOS: some in one sample of 16, some in four, and in two shards of 3 samples
WEB = [f"web {i} " + "w" * (4 * i + 3) for i in range(10)]
CODE = [f"code {i} " + "c" * (3 * i + 1) for i in range(10)]
CHATS = [(f"{i}+{i}?", f"{2 * i}") for i in range(9)]


@pytest.fixture(scope="module", params=["none", "zstd"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    write_tokenizer(root)
    write_texts_domain(root, "web", WEB[2:], WEB[:2], compression=request.param)
    write_texts_domain(root, "code", CODE[3:], CODE[:3], compression=request.param)
    write_chats_domain(root, "chat", CHATS, compression=request.param)
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def check(root: Path, **options: object) -> VerifyReport:
    return verify(str(root), workers=1, **options)


def faults(report: VerifyReport) -> list[str]:
    return [*report.shared_faults, *(f"{f.domain} {f.split}: {f.what}" for f in report.faults)]


def shard(root: Path, split: str = "web/train", number: int = 1) -> Path:
    return next((root / split).glob(f"shard.{number:05}.mds*"))


def test_a_sound_folder_is_sound_and_stays_as_it_is(root: Path) -> None:
    before = sorted((path, path.stat().st_size) for path in root.rglob("*"))
    report = check(root)
    assert faults(report) == []
    assert report.repetitions == 0
    web = next(domain for domain in report.domains if domain.name == "web")
    assert web.documents == len(WEB)
    assert web.tokens == sum(len(text) + 1 for text in WEB)
    # train has 10 + 4 i tokens for i = 2 to 9: 256, in 16 samples and 6 shards; eval has 24, in 2 and 1
    assert (web.samples, web.shards) == (16 + 2, 6 + 1)
    assert sorted((path, path.stat().st_size) for path in root.rglob("*")) == before


def _flip(root: Path) -> None:
    flip_a_byte(shard(root))


def _truncate(root: Path) -> None:
    shard(root).write_bytes(shard(root).read_bytes()[:-5])


def _remove(root: Path) -> None:
    shard(root).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip, "its hash is not the one of its index: flipped bytes"),
        (_truncate, r"\d+ of \d+ bytes are there"),
        (_remove, "is missing"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named_and_the_rest_is_checked(
    root: Path, damage: Callable[[Path], None], reason: str
) -> None:
    path = str(shard(root))
    damage(root)
    flip_a_byte(shard(root, "code/eval", 0))
    web, code = sorted(faults(check(root)), reverse=True)
    assert web.startswith("web train: ")
    assert path in web
    assert "/opmix-" not in web  # where it was decompressed
    assert re.search(reason, web), web
    assert str(shard(root, "code/eval", 0)) in code


@pytest.mark.parametrize("what", ["samples", "tokens", "documents"])
def test_wrong_counts_in_the_description(root: Path, what: str) -> None:
    info = json.loads((root / "web" / "domain.json").read_text())
    info["splits"]["train"][what] += 1
    (root / "web" / "domain.json").write_text(json.dumps(info))
    found = faults(check(root))
    assert len(found) == (
        1 if what != "documents" else 3
    )  # sources.jsonl and digests.bin count documents too
    assert any(line.startswith("web train: ") and what in line for line in found)
    assert all("domain.json" in line or "digests.bin" in line for line in found)


def rewrite(root: Path, split: str, change: Callable[[int, Sample], Sample]) -> None:
    """Write a split anew, with a sound index, after changing its samples."""
    folder = root / split
    compression = "zstd" if shard(root, split, 0).suffix == ".zstd" else "none"
    opened = ShardedSplit(folder)
    samples = [change(number, opened.read(number)) for number in range(len(opened))]
    shutil.rmtree(folder)
    write_samples(folder, samples, compression=compression)
    change_domain(root, split.split("/")[0])


def only(number: int, **fields: object) -> Callable[[int, Sample], Sample]:
    """Change one sample."""

    def change(at: int, sample: Sample) -> Sample:
        return Sample(**{**vars(sample), **fields}) if at == number else sample

    return change


def uint32(*values: object) -> np.ndarray:
    return np.array(values, np.uint32)


@pytest.mark.parametrize(
    ("split", "change", "fault"),
    [
        ("web/train", {"tokens": np.full(T, 257, np.uint16)}, "has token 257, beyond the vocabulary of 257"),
        ("web/train", {"ends": uint32(9, 9)}, "has document ends that do not ascend within 1 to 16"),
        ("web/train", {"ends": uint32(17)}, "its document ends lie outside of it"),
        ("web/train", {"tokens": np.zeros(T + 1, np.uint16)}, "has 17 tokens, not 1 to 16"),
        ("chat/train", {"ends": uint32(5)}, "cuts its last conversation off"),
        ("chat/train", {"spans": uint32([4, 6], [5, 6])}, "has ranges of learnt tokens that are empty"),
        ("chat/train", {"spans": uint32([4, 4])}, "has ranges of learnt tokens that are empty, or overlap"),
    ],
)  # fmt: skip
def test_a_wrong_sample_is_named(root: Path, split: str, change: dict, fault: str) -> None:
    """Its shard's hashes are right: what wrote it was wrong."""
    rewrite(root, split, only(1, **change))
    found = [line for line in faults(check(root)) if fault in line]
    assert len(found) == 1
    assert f"{shard(root, split, 0)}: sample 1 " in found[0]


def test_many_wrong_samples_are_counted(root: Path) -> None:
    rewrite(root, "web/train", lambda _, sample: Sample(sample.tokens + np.uint16(257), sample.ends))
    found = faults(check(root))
    assert len(found) == 16  # at most three samples a shard
    rewrite(root, "web/train", lambda _, sample: sample)
    shutil.rmtree(root / "web" / "train")
    samples = [Sample(np.full(T, 300, np.uint16), uint32(T)) for _ in range(8)]
    write_samples(root / "web" / "train", samples, per_shard=8)
    change_domain(root, "web")
    found = [line for line in faults(check(root)) if "shard." in line and "sample" in line]
    assert sum("has token 300" in line for line in found) == 3
    assert any("5 more of its samples are faulty" in line for line in found)


def test_a_split_that_lost_its_end(root: Path) -> None:
    """Whole shards are missing, and the index and the counts were made to fit."""
    opened = ShardedSplit(root / "web" / "train")
    kept = [opened.read(number) for number in range(13)]
    shutil.rmtree(root / "web" / "train")
    write_samples(root / "web" / "train", kept)
    change_domain(root, "web", compression="none")
    found = [line for line in faults(check(root)) if "has no end" in line]
    # documents end behind 18, 40, 66, 96, 130, 168 and 210 tokens; 208 are left, and sample 10 is 160 to 175
    assert len(found) == 1
    assert "the document that begins in sample 10 has no end" in found[0]


def test_another_tokenizer(root: Path) -> None:
    shutil.rmtree(root / "tokenizer")
    train_tokenizer(["d e f " * 9], 260).save_pretrained(root / "tokenizer")
    found = faults(check(root))
    assert [line.split(":")[0] for line in found] == ["chat None", "code None", "web None"]
    assert all("was tokenised with another tokenizer" in line for line in found)
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    assert any("tokenizer.json is not a tokenizer" in line for line in faults(check(root)))


def test_small_files(root: Path) -> None:
    (root / "web" / "sources.jsonl").write_text("{}\n")
    flip_a_byte(root / "web" / "digests.bin")
    (root / "code" / "digests.bin").unlink()
    (root / "chat" / "domain.json").write_text("{")
    found = faults(check(root))
    assert len(found) == 4
    for end in (
        "web/sources.jsonl: its sha256",
        "web/digests.bin: its sha256",
        "code/digests.bin: is missing",
    ):
        assert any(end in line for line in found), end
    assert any("chat/domain.json is not valid JSON" in line for line in found)


def test_shards_that_nothing_describes_are_no_silent_loss(root: Path) -> None:
    name = next(iter(Catalogue.open(root).names))
    (root / name / "domain.json").unlink()
    found = [fault for domain in verify(str(root), workers=1).domains for fault in domain.faults]
    assert len(found) == 1
    assert f"{root / name} has shards and no domain.json: restore it, or remove the folder" in str(found[0])


def test_an_index_of_another_version(root: Path) -> None:
    index = root / "web" / "eval" / "index.json"
    index.write_text(index.read_text() + "\n")
    assert ["content_sha256" in line for line in faults(check(root))] == [True]
    index.write_text("{}")
    found = faults(check(root))
    assert len(found) == 1
    assert found[0].startswith(f"web eval: {index}")


def test_shards_stored_in_another_way_than_described(root: Path) -> None:
    other = "none" if shard(root).suffix == ".zstd" else "zstd"
    change_domain(root, "web", compression=other)
    found = faults(check(root))
    assert len(found) == 2
    assert all(f"its shards are not compressed as domain.json says ({other})" in line for line in found)


def test_a_damaged_copy_beside_a_compressed_shard(root: Path) -> None:
    """It is what training reads."""
    if shard(root).suffix != ".zstd":
        pytest.skip("no copies where nothing is compressed")
    for number in range(len(opened := ShardedSplit(root / "web" / "train"))):
        opened.read(number)
    assert faults(check(root)) == []
    flip_a_byte(root / "web" / "train" / "shard.00001.mds")
    found = faults(check(root))
    assert len(found) == 1
    assert f"{root}/web/train/shard.00001.mds: is not what its compressed file holds" in found[0]


@pytest.mark.parametrize("written", ["zstd"], indirect=True)
def test_a_file_that_expands_too_far_is_not_let(root: Path) -> None:
    index = root / "web" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][1]["raw_data"]["bytes"] = 20
    index.write_text(json.dumps(content))
    change_domain(root, "web")
    found = faults(check(root))
    assert len(found) == 1
    assert f"{shard(root)}: holds more than the 20 bytes of its index" in found[0]


def test_domains_of_different_length_cannot_be_used_together(root: Path) -> None:
    change_domain(root, "web", sequence_length=32)
    assert ["16 and 32 tokens" in line for line in faults(check(root))] == [True]
    assert faults(check(root, domains=["web"])) == []


# --- duplicates --------------------------------------------------------------------------------------------


@pytest.fixture
def repeating(tmp_path: Path) -> Path:
    """Held-out texts of `a` that stand in train of `a` and `b`, at other places within samples and shards."""
    write_tokenizer(tmp_path)
    long = "long " + "x" * 100  # 106 tokens: 7 samples, 3 shards
    write_texts_domain(tmp_path, "a", ["one", "two", "short"], [long, "short", "only here", "short"])
    write_texts_domain(tmp_path, "b", ["three", long, "two", long, "four"], ["other", "only here"])
    return tmp_path


def test_duplicates_across_domains_samples_and_shards(repeating: Path) -> None:
    report = check(repeating)
    assert faults(report) == []
    a, b = report.domains
    # eval of `a`: "short" begins behind the 106 tokens of `long`, in sample 6; again behind 6 and 10 more
    assert [(d.sample, d.other_domain, d.other_split, d.other_sample) for d in a.in_train] == [
        (6, "a", "train", 0),
        (0, "b", "train", 0),
    ]
    assert a.in_train[1].opening.startswith("long xxx")
    assert [(d.sample, d.other_domain, d.other_sample) for d in a.within_eval] == [(7, "a", 6)]
    assert [(d.sample, d.other_domain, d.other_sample) for d in b.within_eval] == [(0, "a", 7)]
    assert b.in_train == []
    assert (a.repeated, b.repeated) == (1 + 1, 1 + 2 + 1)  # digests.bin has both splits


def test_duplicates_within_train(repeating: Path) -> None:
    a, b = check(repeating, all_train=True).domains
    assert (a.repeated, b.repeated) == (0, 2)  # b: "two", which `a` has, and `long` again


def test_a_copy_without_eos_is_a_duplicate(tmp_path: Path) -> None:
    """Token ids that come from other tools may lack it."""
    write_tokenizer(tmp_path)
    write_texts_domain(tmp_path, "a", ["one"], ["the same"])
    ids = encode(tokenizer_of(tmp_path), "the same", eos=False)
    write_samples(tmp_path / "a" / "train", [Sample(ids, uint32(len(ids)))])
    change_domain(tmp_path, "a", splits={
        "train": {"samples": 1, "tokens": 8, "documents": 1},
        "eval": {"samples": 1, "tokens": 9, "documents": 1},
    })  # fmt: skip
    report = check(tmp_path)
    assert faults(report) == []
    assert len(report.domains[0].in_train) == 1


def test_an_unreadable_shard_hides_only_its_own_documents(repeating: Path) -> None:
    """`long` in train of `b` lies in shards 0 to 2, and from the middle of shard 2 on again."""
    shard(repeating, "b/train", 1).unlink()
    report = check(repeating)
    assert len(report.faults) == 1
    assert [(d.sample, d.other_domain, d.other_sample) for d in report.domains[0].in_train] == [
        (6, "a", 0),
        (0, "b", 7),
    ]


# --- the command -------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["data", "verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_exit_status(root: Path, repeating: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, root, "--workers", 1)
    assert (status, text.splitlines()[-1]) == (0, "sound; no duplicates")
    status, text = run(capsys, repeating, "--workers", 1)
    assert (status, text.splitlines()[-1]) == (0, "sound; 10 duplicates")
    assert "duplicate: a eval sample 0 is also in b train sample 0: long xxx" in text
    assert run(capsys, repeating, "--workers", 1, "--strict")[0] == 1
    flip_a_byte(shard(root))
    status, text = run(capsys, root, "--workers", 1)
    assert (status, text.splitlines()[-1]) == (1, "1 fault; no duplicates")
    assert "fault: web train: " in text
    status, text = run(capsys, root, "--workers", 1, "--domain", "code")
    assert status == 0
    assert "2 more domains were neither checked nor searched" in text


def test_refusals(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((root, "--domain", "wep"), "has no domain 'wep': the nearest is `web`"),
        ((tmp_path / "nowhere",), "nowhere is no folder"),
        ((tmp_path,), "holds no domain"),
        (("s3://bucket/data",), "s3://bucket/data is remote: give --cache"),
        ((root, "--workers", 0), "--workers 0: give at least 1"),
    ):
        status, text = run(capsys, *arguments)
        assert status == 2
        assert message in text
        assert len(text.strip().splitlines()) == 1


def test_a_document_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07[red]\u202e\x9b1m"
    write_tokenizer(tmp_path)
    write_texts_domain(tmp_path, "a", [hostile], [hostile])
    status, text = run(capsys, tmp_path, "--workers", 1)
    assert status == 0
    assert r"\x1b[2J\x1b]0;owned\x07" in text
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


@pytest.mark.parametrize("written", ["zstd"], indirect=True)
def test_workers_change_nothing(root: Path) -> None:
    flip_a_byte(shard(root))
    alone, together = check(root), verify(str(root), workers=2)
    assert len(alone.faults) == 1
    assert together.domains == alone.domains


@pytest.mark.parametrize("written", ["zstd"], indirect=True)
def test_a_remote_folder(written: Path, tmp_path: Path) -> None:
    with s3_server() as server:
        url = server.upload(written, "sound")
        assert faults(verify(url, store=ShardStore(url, tmp_path / "cache"), workers=1)) == []
        damaged = Path(shutil.copytree(written, tmp_path / "damaged"))
        flip_a_byte(shard(damaged))
        (damaged / "code" / "digests.bin").unlink()
        (damaged / "chat" / "eval" / "index.json").unlink()
        url = server.upload(damaged, "damaged")
        found = faults(verify(url, store=ShardStore(url, tmp_path / "cache2", attempts=1), workers=1))
        assert len(found) == 3
        assert any(f"{url}/web/train/{shard(damaged).name} cannot be fetched" in line for line in found)
        assert any(f"{url}/code/digests.bin: is missing" in line for line in found)
        assert any(f"{url}/chat/eval/index.json does not exist" in line for line in found)


@pytest.mark.parametrize("written", ["zstd"], indirect=True)
def test_workers_die_with_a_command_that_is_killed(written: Path, tmp_path: Path) -> None:
    """While they wait for a store that does not answer."""
    answer = threading.Event()
    # what a killed command leaves there goes with it; not in tmp_path: a socket's name has 107 characters
    with s3_server() as server, tempfile.TemporaryDirectory() as scratch:
        url = server.upload(written, "hanging")
        server.fault = lambda path: answer.wait(60) and None if "/shard." in path else None
        command = [sys.executable, "-m", "opmix_dist.cli", "data", "verify", url, "--workers", "2"]
        environment = {**os.environ, "TMPDIR": scratch}
        process = psutil.Popen([*command, "--cache", str(tmp_path / "cache")], cwd=ROOT, env=environment)
        try:
            until(lambda: len(set(server.shards_requested())) >= 2)
            children = process.children(recursive=True)
            assert len(children) >= 2
            process.kill()
            until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
        finally:
            answer.set()
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def test_what_prepare_makes_is_sound(tiny_data: Path) -> None:
    report = check(tiny_data, all_train=True)
    assert faults(report) == []
    assert report.repetitions == 0
    assert [domain.name for domain in report.domains] == list(Catalogue.open(tiny_data).names)
    with pytest.raises(UserError, match="no domain 'prse'"):
        check(tiny_data, domains=["prse"])
