"""The first pass: digests, duplicates and splits, at any block size and after any interruption."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data import dedupe
from opmix_dist.data import survey as survey_module
from opmix_dist.data.dedupe import PublishedDigests, SurveyedDigests, drop_duplicates
from opmix_dist.data.source import Conversation, Document, Place
from opmix_dist.data.survey import (
    Holdout,
    Mark,
    Survey,
    Surveyed,
    Surveyor,
    document_digest,
    hold_out,
)
from opmix_dist.data.tokenizer import TokenizerFiles
from opmix_dist.data.workers import FileFault
from opmix_dist.errors import UserError


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """For tests by properties, which may not use fixtures of one test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


class Listed:
    """A chunk of documents that are at hand."""

    def __init__(self, documents: Sequence[Document], file: int = 0) -> None:
        self._documents, self._file = documents, file

    def documents(self) -> Iterator[tuple[int, Document]]:
        return ((self._file, document) for document in self._documents)


def surveyed(documents: Sequence[Document], seed: int = 0) -> Surveyed:
    return Surveyor(seed, None)(Listed(documents))


def make_survey(folder: Path, documents: Sequence[Document], seed: int = 0, per_chunk: int = 7) -> Survey:
    survey = Survey(folder)
    for number, begin in enumerate(range(0, len(documents), per_chunk)):
        survey.append(Place(0, number), surveyed(documents[begin : begin + per_chunk], seed))
    survey.save(complete=True)
    return survey


def marks(survey: Survey) -> list[int]:
    return survey.column("marks").tolist()


# --- digests -----------------------------------------------------------------------------------------------


def test_digests_see_content_and_no_white_space() -> None:
    assert document_digest("x y") == document_digest(" x\n\ty ") != document_digest("xy")
    ids = np.array([1, 2, 300], np.uint16)
    assert document_digest(ids) == document_digest(ids.astype(np.int64)) != document_digest(ids[:2])
    chat = Conversation([{"role": "user", "content": "x"}])
    same = Conversation([{"content": "x", "role": "user"}])
    tools = Conversation(chat.messages, [{"name": "t"}])
    assert document_digest(chat) == document_digest(same) != document_digest(tools)
    # Token ids that spell a text are not that text
    assert document_digest(np.frombuffer(b"abcd", np.uint32)) != document_digest("abcd")


def test_documents_without_content_are_marked() -> None:
    found = surveyed(["x", " \n", np.empty(0, np.int32), Conversation([]), np.array([1])])
    assert found.marks.tolist() == [Mark.TRAIN, Mark.EMPTY, Mark.EMPTY, Mark.EMPTY, Mark.TRAIN]


@pytest.mark.parametrize("ids", [[3, 10], [-1, 3]])
def test_token_ids_out_of_the_vocabulary_are_refused(ids: list[int]) -> None:
    tokenizer = TokenizerFiles("unused", "0" * 64, eos_id=0, vocab_size=10)
    with pytest.raises(FileFault) as caught:
        Surveyor(0, tokenizer)(Listed([np.array([3, 9]), np.array(ids)], file=5))
    assert caught.value.file == 5
    assert "tokenizer has ids below 10" in caught.value.reason


# --- duplicates --------------------------------------------------------------------------------------------

corpora = st.lists(st.lists(st.integers(0, 15).map(str), max_size=30), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)  # each brings files to the disk
@given(corpora, st.integers(1, 40), st.integers(1, 9), st.integers(0, 4))
def test_of_equal_documents_the_first_stays(
    corpus: list[list[str]], bucket: int, block: int, finished: int
) -> None:
    seen: set[str] = set()
    wanted = [[text in seen or seen.add(text) or False for text in texts] for texts in corpus]
    with pytest.MonkeyPatch.context() as patch, temporary_folder() as folder:
        patch.setattr(dedupe, "BUCKET_DOCUMENTS", bucket)
        patch.setattr(survey_module, "BLOCK_DOCUMENTS", block)
        patch.setattr(dedupe, "BLOCK_DOCUMENTS", block)
        surveys = [make_survey(folder / str(number), texts) for number, texts in enumerate(corpus)]
        for size in (finished, len(surveys)):  # the first domains alone, then all: what was settled stays
            drop_duplicates([SurveyedDigests(survey) for survey in surveys[:size]], folder / "scratch")
        assert [[mark == Mark.DUPLICATE for mark in marks(survey)] for survey in surveys] == wanted
        assert not (folder / "scratch").exists()


def test_a_finished_domain_counts_by_its_digests_alone(tmp_path: Path) -> None:
    earlier = b"".join(document_digest(text) for text in ("a", "b", "c"))
    (tmp_path / "digests.bin").write_bytes(earlier)
    survey = make_survey(tmp_path / "late", ["b", "d", "", "d", "c"])
    drop_duplicates(
        [PublishedDigests(tmp_path / "digests.bin"), SurveyedDigests(survey)], tmp_path / "scratch"
    )
    assert marks(survey) == [Mark.DUPLICATE, Mark.TRAIN, Mark.EMPTY, Mark.DUPLICATE, Mark.DUPLICATE]
    kept = np.concatenate(list(survey.kept_digests()))
    assert kept.tobytes() == document_digest("d")


# --- splits ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.permutations(list(range(40))),
    st.integers(0, 2**63 - 1),
    st.sampled_from([Holdout(0.3), Holdout(0.3, most=3), Holdout(0.3, exactly=7)]),
    st.integers(1, 50),
)
def test_the_split_follows_content_and_not_order(
    order: list[int], seed: int, holdout: Holdout, block: int
) -> None:
    texts = [f"document {number}" for number in range(40)]

    def held_out(documents: list[str]) -> set[str]:
        with temporary_folder() as folder:
            survey = make_survey(folder, documents, seed)
            hold_out(survey, holdout.rank_below(survey, "x"))
            return {text for text, mark in zip(documents, marks(survey), strict=True) if mark == Mark.EVAL}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey_module, "BLOCK_DOCUMENTS", block)
        shuffled = held_out([texts[number] for number in order])
    assert shuffled == held_out(texts)
    assert holdout.most is None or len(shuffled) <= holdout.most
    assert holdout.exactly is None or len(shuffled) == holdout.exactly


def test_the_held_out_share_is_the_one_asked_for(tmp_path: Path) -> None:
    """10,000 draws at 0.05: 500 expected, standard deviation 21.8; the bound is five of them."""
    survey = make_survey(tmp_path, list(map(str, range(10_000))), seed=3, per_chunk=5_000)
    hold_out(survey, Holdout(0.05).rank_below(survey, "x"))
    assert abs(survey.count(Mark.EVAL) - 500) < 109


def test_too_few_documents_to_hold_out_are_named(tmp_path: Path) -> None:
    survey = make_survey(tmp_path, ["a", "b", "", "c"])
    with pytest.raises(UserError, match="domain web has 3 documents, not more than the 3 to hold out"):
        Holdout(0.5, exactly=3).rank_below(survey, "web")
    hold_out(survey, Holdout(0.5, exactly=2).rank_below(survey, "web"))
    assert sorted(marks(survey)) == [Mark.TRAIN, Mark.EVAL, Mark.EVAL, Mark.EMPTY]


# --- interruption ------------------------------------------------------------------------------------------


def test_a_survey_goes_on_after_its_last_record(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    whole = make_survey(tmp_path / "whole", texts)
    begun = Survey(tmp_path / "killed")
    begun.append(Place(0, 0), surveyed(texts[:7]))
    begun.append(Place(0, 1), surveyed(texts[7:14]))
    begun.save()
    begun.append(Place(0, 2), surveyed(["never", "noted"]))  # on the disk perhaps, but in no record
    begun.close()
    again = Survey(tmp_path / "killed")
    assert (again.documents, again.complete, again.next_place) == (14, False, (Place(0, 1), 1))
    for number in range(2, 6):
        again.append(Place(0, number), surveyed(texts[7 * number : 7 * number + 7]))
    again.save(complete=True)
    for name in ("digests", "ranks", "marks", "files", "chunks"):
        assert again.path(name).read_bytes() == whole.path(name).read_bytes(), name
    assert Survey(tmp_path / "killed").complete


def test_files_that_are_shorter_than_their_record_are_refused(tmp_path: Path) -> None:
    survey = make_survey(tmp_path / "work" / "survey", ["a", "b"])
    survey.path("ranks").write_bytes(b"")
    with pytest.raises(UserError, match=r"ranks.bin is too short.*: delete "):
        Survey(tmp_path / "work" / "survey")
