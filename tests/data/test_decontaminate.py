"""Decontamination: exactly the documents that share a gram, compared with a search that hashes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.data import decontaminate
from opmix_dist.data.decontaminate import Grams, split_words

words = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


def shared(evaluation: list[str], text: str, ngram: int) -> bool:
    """By the definition, with strings only."""
    grams = set()
    for other in map(split_words, evaluation):
        length = min(ngram, len(other))
        grams |= {tuple(other[i : i + length]) for i in range(len(other) - length + 1) if length}
    mine = split_words(text)
    return any(tuple(mine[i : i + len(gram)]) == gram for gram in grams for i in range(len(mine)))


@given(st.lists(words, max_size=4), words, st.integers(1, 6))
def test_met_is_what_the_definition_says(evaluation: list[str], text: str, ngram: int) -> None:
    assert Grams.of(evaluation, ngram).met_in(text) == shared(evaluation, text, ngram)


@given(st.lists(words, max_size=4), words, st.integers(1, 6))
def test_hashes_that_collide_change_nothing(evaluation: list[str], text: str, ngram: int) -> None:
    """With the base 0 a hash is the last word's number, so that most grams share theirs with others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontaminate, "_BASE", np.uint64(0))
        assert Grams.of(evaluation, ngram).met_in(text) == shared(evaluation, text, ngram)


def test_case_punctuation_and_line_breaks_do_not_matter() -> None:
    grams = Grams.of(["The quick (brown) fox, it jumps."], 4)
    assert grams.met_in("He said: THE QUICK\n\nbrown-fox!")
    assert not grams.met_in("the quick red brown fox it")
    assert not grams.met_in("quick brown fox")


def test_a_short_text_is_met_as_a_whole() -> None:
    grams = Grams.of(["forty two apples", "one two three four five six"], 5)
    assert grams.met_in("there are Forty-two apples here")
    assert not grams.met_in("forty two pears and apples")
    assert grams.met_in("zero two three four five six")
    assert not grams.met_in("two three four five seven")


def test_nothing_to_meet() -> None:
    grams = Grams.of(["...", ""], 13)
    assert not grams.met_in("... words ...")
    assert not Grams.of([], 13).met_in("words")


def test_the_fingerprint_sees_words_and_length() -> None:
    texts = ["a b c d e", "f g"]
    prints = [
        Grams.of(texts, 3),
        Grams.of(texts, 4),
        Grams.of(["a b c d x", "f g"], 3),
        Grams.of(texts[:1], 3),
    ]
    assert len({grams.fingerprint() for grams in prints}) == 4
    assert Grams.of(["A  b c, d e", "f. g"], 3).fingerprint() == prints[0].fingerprint()
