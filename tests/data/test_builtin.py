"""The built-in corpus: present in this installation, capped, reproducible, with domains that differ."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.data import builtin
from opmix_dist.data.builtin import BuiltinSource, builtin_domains, split_lines
from opmix_dist.errors import UserError

MAX_BYTES = 60_000


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {name: documents_of(source) for name, source in builtin_domains(MAX_BYTES).items()}


def documents_of(source: BuiltinSource) -> list[str]:
    return [str(text) for _, chunk in source.chunks() for _, text in chunk.documents()]


def test_every_domain_reaches_the_cap_and_stops_there(texts: dict[str, list[str]]) -> None:
    assert len(texts) >= 5
    for name, documents in texts.items():
        sizes = [len(text.encode()) for text in documents]
        assert sum(sizes[:-1]) < MAX_BYTES <= sum(sizes), name


def test_domains_have_clearly_different_statistics(texts: dict[str, list[str]]) -> None:
    """Total variation between byte distributions; two halves of one domain are about 0.05 apart."""
    shares = {}
    for name, documents in texts.items():
        counts = Counter("".join(documents).encode())
        shares[name] = {byte: count / counts.total() for byte, count in counts.items()}
    for one in shares:
        for other in shares:
            if one < other:
                distance = sum(abs(shares[one].get(b, 0) - shares[other].get(b, 0)) for b in range(256)) / 2
                assert distance > 0.1, (one, other, distance)


def test_the_choice_follows_the_seed(texts: dict[str, list[str]]) -> None:
    again = builtin_domains(MAX_BYTES, seed=0)["python"]
    other = builtin_domains(MAX_BYTES, seed=1)["python"]
    assert documents_of(again) == texts["python"]
    assert documents_of(other) != texts["python"]
    assert again.files() == builtin_domains(MAX_BYTES)["python"].files() != other.files()


def test_chunks_from_any_place_are_the_tail_of_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "CHUNK_CHARS", 5_000)
    source = builtin_domains(MAX_BYTES)["prose"]
    chunks = list(source.chunks())
    assert len(chunks) >= 3
    for i, (place, _) in enumerate(chunks):
        assert list(source.chunks(place)) == chunks[i:]
        assert list(source.chunks(place._replace(chunk=place.chunk + 1))) == chunks[i + 1 :]


def test_a_document_carries_the_number_of_its_file() -> None:
    source = builtin_domains(MAX_BYTES)["cpp"]
    texts: dict[int, str] = {}
    for _, chunk in source.chunks():
        for number, text in chunk.documents():
            texts[number] = texts.get(number, "") + str(text)
    assert len(texts) >= 2
    for number, text in texts.items():
        name, size = source.files()[number]
        whole = Path(name).read_bytes()
        assert len(whole) == size
        assert whole.startswith(text.encode())  # the last file is cut where the domain is full


def test_an_installation_with_too_little_text_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "_site", lambda: tmp_path)
    (tmp_path / "x.dist-info").mkdir()
    (tmp_path / "x.dist-info" / "LICENSE").write_text("few words")
    with pytest.raises(UserError, match="domain licences finds only 9 bytes"):
        documents_of(BuiltinSource("licences", MAX_BYTES, 0))


@given(st.text(alphabet="ab\n\r\u2028", max_size=200), st.integers(1, 20))
def test_pieces_join_to_the_text_and_exceed_the_bound_only_by_one_line(text: str, bound: int) -> None:
    pieces = list(split_lines(text, bound))
    assert "".join(pieces) == text
    assert all(len(piece) <= bound or len(piece.splitlines()) == 1 for piece in pieces)
