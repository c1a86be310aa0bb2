"""``opmix prepare`` killed or stopped half-way: the next run goes on, to the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opmix_dist.cli import main
from opmix_dist.data.staging import exclusive
from tests.data.corpora import CHAT_TEMPLATE, chat, digests, make_texts, write_lines

pytestmark = pytest.mark.usefixtures("streaming")
SETTINGS = ["--vocab-size", "300", "--sequence-length", "64", "--eval-documents", "9", "--shard-bytes",
            "20000", "--record-seconds", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains of texts, of which the second repeats documents of the first, and one of chats."""
    folder = tmp_path_factory.mktemp("sources")
    a, b = make_texts(0, 200), make_texts(1, 1500)
    chats = [chat(f"question {number}", "an answer " * (number % 9 + 1)) for number in range(900)]
    (folder / "template").write_text(CHAT_TEMPLATE)
    return [
        *("--domain", f"a={write_lines(folder / 'a', a, files=2)}"),
        *("--domain", f"b={write_lines(folder / 'b', [*a[:50], *b], files=40)}"),
        *("--chat-domain", f"c={write_lines(folder / 'c', chats, files=30)}"),
        *("--chat-template", str(folder / "template")),
    ]


def arguments(out: Path, sources: list[str], workers: int) -> list[str]:
    return ["prepare", "--out", str(out), *sources, *SETTINGS, "--workers", str(workers)]


def documents(said: str, line: str) -> int:
    """The number that follows ``line`` in what a run said; 0 when there is no such line."""
    found = re.search(rf"^{line} ([\d,]+) documents", said, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


@pytest.fixture(scope="module")
def undisturbed(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(out, sources, workers=1)) == 0
    return digests(out)


def kill(out: Path, sources: list[str], reached: Callable[[], bool]) -> str:
    """Start ``opmix prepare`` with two workers, and kill it once ``reached``; returns what it said."""
    command = [sys.executable, "-m", "opmix_dist.cli", *arguments(out, sources, workers=2)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(reached, child)
    child.send_signal(signal.SIGKILL)
    said = child.communicate()[1]
    assert child.returncode == -signal.SIGKILL, said
    wait_until(lambda: not group_lives(child.pid), child)
    return said


def wait_until(happened: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        assert child.poll() is None or child.returncode < 0, child.communicate()[1]
        time.sleep(0.002)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_kills_at_several_moments_change_no_byte(
    sources: list[str], undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One folder, killed in turn while b is surveyed, while it is written, and while c is written."""

    def surveyed() -> int:
        file = tmp_path / ".b.tmp" / "work" / "survey" / "survey.json"
        return json.loads(file.read_text())["documents"] if file.exists() else 0

    def shard(domain: str, number: int) -> bool:
        return (tmp_path / f".{domain}.tmp" / "train" / f"shard.{number:05}.mds").exists()

    first = kill(tmp_path, sources, lambda: surveyed() >= 300)
    assert documents(first, "a: read:") == 200
    assert not list(tmp_path.glob("*/domain.json"))

    second = kill(tmp_path, sources, lambda: shard("b", 3))
    resumed = documents(second, "b: goes on after")
    assert resumed >= 300
    assert documents(second, "b: read:") == 1550 - resumed
    assert documents(second, "a: read:") == 0

    third = kill(tmp_path, sources, lambda: shard("c", 0))
    resumed = documents(third, "b: goes on after")
    assert resumed > 0
    assert documents(third, "b: write:") == 1500 - resumed
    assert ": read:" not in third
    assert "tokenizer: train" not in third

    capsys.readouterr()
    assert main(arguments(tmp_path, sources, workers=1)) == 0
    last = capsys.readouterr().err
    resumed = documents(last, "c: goes on after")
    assert resumed > 0
    assert documents(last, "c: write:") == 900 - resumed
    assert ": read:" not in last
    assert digests(tmp_path) == undisturbed


def test_other_settings_begin_anew(
    sources: list[str], undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first run that is refused late, as its last domain has too few documents, leaves its surveys."""
    few = write_lines(tmp_path / "few", make_texts(9, 3), files=1)
    assert main([*arguments(tmp_path / "out", [*sources, "--domain", f"d={few}"], 1), "--seed", "1"]) == 2
    assert (tmp_path / "out" / ".b.tmp" / "work" / "survey" / "digests.bin").stat().st_size == 1550 * 16
    capsys.readouterr()
    assert main(arguments(tmp_path / "out", sources, workers=1)) == 0
    said = capsys.readouterr().err
    assert "goes on" not in said
    assert documents(said, "b: read:") == 1550
    left = {path for path in digests(tmp_path / "out") if path.startswith(".d.tmp")}
    assert left  # another command's, which may go on with it
    found = digests(tmp_path / "out")
    assert {path: found[path] for path in found if path not in left} == undisturbed


def test_a_domain_of_which_only_the_move_is_missing_is_moved(
    sources: list[str], undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, sources, workers=2)) == 0
    (tmp_path / "b").rename(tmp_path / ".b.tmp")
    capsys.readouterr()
    assert main(arguments(tmp_path, sources, workers=2)) == 0
    assert "documents" not in capsys.readouterr().err
    assert digests(tmp_path) == undisturbed


def test_a_damaged_record_is_named(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_lines(tmp_path / "few", make_texts(9, 30), files=1)
    command = arguments(tmp_path / "out", ["--domain", f"d={few}"], workers=1)
    assert main([*command, "--eval-documents", "30"]) == 2
    record = tmp_path / "out" / ".d.tmp" / "work" / "written.safetensors"
    record.write_bytes(b"nonsense")
    assert main([*command, "--eval-documents", "30"]) == 2
    assert f"opmix: cannot go on with {record} (" in capsys.readouterr().err


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow past 24,000 bytes: a write beyond fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_one_clear_error_and_the_next_run_goes_on(
    sources: list[str],
    undisturbed: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("small_files")
    assert main(arguments(tmp_path, sources, workers=1)) == 2
    said = capsys.readouterr().err
    assert f"opmix: cannot write {tmp_path}/b: File too large; mend that and run again, which goes on" in said
    assert not list(tmp_path.glob("*/domain.json"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    in_the_way = tmp_path / ".b.tmp" / "train" / "shard.00001.mds"  # a worker meets it
    in_the_way.mkdir(parents=True)
    assert main(arguments(tmp_path, sources, workers=1)) == 2
    said = capsys.readouterr().err
    assert "b: goes on after" in said
    assert re.search(rf"opmix: cannot write {tmp_path}/b: Is a directory; mend that", said)

    in_the_way.rmdir()
    assert main(arguments(tmp_path, sources, workers=1)) == 0
    assert "b: goes on after" in capsys.readouterr().err
    assert digests(tmp_path) == undisturbed


def test_two_at_once_in_one_folder_are_refused(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with exclusive(tmp_path):
        assert main(arguments(tmp_path, sources, workers=1)) == 2
    assert f"opmix: another `opmix prepare` writes {tmp_path}: wait for it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
