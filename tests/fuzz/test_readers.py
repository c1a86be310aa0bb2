"""Readers against damaged and hostile files: each refuses or reads; none executes anything, hangs, or takes
memory without bound."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from opmix_dist.errors import UserError
from tests.fuzz import hostile
from tests.fuzz.readers import READERS, Reader, make_all

HANGS_AFTER_S = 60
MEMORY_BYTES = 3 << 30
"""Of address space above what the process has: what reads without bound fails then, and not the machine."""
JSON_READERS = [reader for reader in READERS if reader.is_json or reader.is_jsonl]
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)
"""Where, as a share of the file, how many bytes are removed there, and what is put there."""


@pytest.fixture(scope="module")
def root(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_all(folder)
    for reader in READERS:
        reader.read(folder)  # imports what it needs
    return folder


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(root: Path) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def marker(root: Path) -> Iterator[Path]:
    """Folder that is made by whoever executes what is planted."""
    path = root / "executed"
    yield path
    assert not path.exists(), "what was planted was executed"


def attempt(reader: Reader, root: Path, what: str) -> None:
    """Read once; fails on anything but a reading and a refusal."""
    late: list[FrameType | None] = []
    signal.signal(signal.SIGALRM, lambda number, frame: late.append(frame) or _give_up())
    signal.alarm(HANGS_AFTER_S)
    try:
        reader.read(root)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, MemoryError) for cause in causes):
            raise AssertionError(f"{reader.name}: {what}: {causes}") from error
    except (UserError, *reader.refuses):
        pass
    except Exception as error:
        raise AssertionError(f"{reader.name}: {what}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        signal.alarm(0)
    assert not late, f"{reader.name}: {what}: no end after {HANGS_AFTER_S} s"


def _give_up() -> None:
    raise TimeoutError


class InPlace:
    """The file of a reader, whose content comes back at the end."""

    def __init__(self, root: Path, reader: Reader) -> None:
        self.path = root / reader.file
        self.good = self.path.read_bytes()

    def __enter__(self) -> InPlace:
        return self

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def hold(self, content: bytes) -> None:
        self.path.write_bytes(content)

    def __exit__(self, *_: object) -> None:
        self.remove()
        self.hold(self.good)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_good_file_is_read(reader: Reader, root: Path) -> None:
    reader.read(root)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_other_contents(reader: Reader, root: Path, marker: Path) -> None:
    with InPlace(root, reader) as file:
        chosen = list(hostile.contents(file.good, marker))
        for what, content in chosen[:: 5 if reader.dear else 1]:
            file.hold(content)
            attempt(reader, root, what)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_what_is_no_ordinary_file(reader: Reader, root: Path) -> None:
    with InPlace(root, reader) as file:
        for put in hostile.PLACES:
            file.remove()
            put(file.path)
            attempt(reader, root, put.__name__)


@pytest.mark.parametrize("reader", JSON_READERS, ids=lambda reader: reader.name)
def test_other_documents(reader: Reader, root: Path) -> None:
    """JSON that is valid and holds what it must not."""
    with InPlace(root, reader) as file:
        first, *rest = file.good.splitlines(keepends=True) if reader.is_jsonl else [file.good]
        for what, document in hostile.documents(json.loads(first), 0, few=reader.dear):
            file.hold(b"".join([hostile.as_json(document), b"\n", *rest]))
            attempt(reader, root, what)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_changed_bytes(reader: Reader, root: Path) -> None:
    """A few bytes replaced, removed or put in anywhere."""
    examples = 3 if reader.dear else 20

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(EDITS)
    def change(edits: list[tuple[float, int, bytes]]) -> None:
        content = file.good
        for place, removed, put in edits:
            at = int(place * len(content))
            content = content[:at] + put + content[at + removed :]
        file.hold(content)
        attempt(reader, root, f"edits {edits}")

    with InPlace(root, reader) as file:
        change()


def test_what_is_planted_would_be_executed(tmp_path: Path) -> None:
    """The tests above can fail."""
    for number, (_, content) in enumerate(hostile.pickles(tmp_path / "executed")):
        if content.startswith(b"PK") or content.startswith(b"\x93NUMPY") or content.startswith(b"!!"):
            continue
        pickle.loads(content)
        assert (tmp_path / "executed").is_dir(), number
        os.rmdir(tmp_path / "executed")
