"""Scorers of the standard sets, on cases worked out by hand from what their authors' code does."""

from __future__ import annotations

import random

import pytest

from vlmprune.study.tasks.scorers import gqa_words, mme_says, option_of, pope_says, yes_no
from vlmprune.study.tasks.vqa_words import textvqa_accuracy, textvqa_words, vqa_accuracy, vqa_words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        # Only the first sentence counts, only whole words, and only these spellings.
        ("Yes. There is no doubt.", "yes"),
        ("Nobody knows", "yes"),
        ("NO", "yes"),
        ("There isn't one", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_yes_and_no(text: str, says: str) -> None:
    assert pope_says(text) == says


def test_figures_of_yes_and_no() -> None:
    said = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    true = ["yes", "yes", "no", "yes", "yes", "no", "no", "no"]
    found = yes_no(said, true)
    # Two hits, one false alarm, two misses.
    assert found.accuracy == 5 / 8
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 2 / 4
    assert found.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert found.yes == 3 / 8
    never = yes_no(["no", "other"], ["yes", "no"])
    assert (never.accuracy, never.precision, never.recall, never.f1, never.yes) == (0.5, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("no, it is", "no"),
        # Within the first four characters, a yes before a no.
        (" yes", "yes"),
        ("  yes", "other"),
        ("not", "no"),
        ("know", "no"),
        ("The answer is yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_yes_and_no(text: str, says: str) -> None:
    assert mme_says(text) == says


def test_gqa_takes_case_and_full_stops_off() -> None:
    assert gqa_words("Red.") == "red"
    assert gqa_words("No...") == "no"
    # Nothing else is forgiven.
    assert gqa_words(" a dog") != "a dog"
    assert gqa_words("A dog") == "a dog"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B\nbecause", "B"),
        ("B. salt", "B"),
        ("The answer is C.", "C"),
        ("I think that the sky is blue. The answer is D", "D"),
        # Of two, the one with a full stop.
        ("The answer is A or rather The answer is B.", "B"),
        ("The answer is salt", None),
        ("B.", None),
        ("b", None),
        ("F", None),
        ("salt", None),
        ("", None),
    ],
)
def test_options_are_found_by_their_letter(text: str, letter: str | None) -> None:
    assert option_of(text) == letter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Dog", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        # A mark at a word's edge goes, one within becomes a space.
        ("yes!", "yes"),
        ("yes! no", "yes no"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("black/white /grey", "blackwhite grey"),
        ("x-ray", "x ray"),
        # With a thousands' comma all go.
        ("1,000 red/blue", "1000 redblue"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("5.", "5"),
        ("a", ""),
    ],
)
def test_words_of_vqa(text: str, words: str) -> None:
    assert vqa_words(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Coca-Cola", "coca cola"),
        ("Joe's", "joe 's"),
        ("1,000 red/blue", "1000 red blue"),
        ("what? now", "what now"),
        ("line\none", "line 1"),
        ("the End.", "end"),
    ],
)
def test_words_of_textvqa(text: str, words: str) -> None:
    assert textvqa_words(text) == words


@pytest.mark.parametrize(("hits", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_accuracy_by_how_many_of_ten_people_agree(hits: int, score: float) -> None:
    people = ["red"] * hits + ["blue"] * (9 - hits) + ["green"]
    random.Random(hits).shuffle(people)
    assert vqa_accuracy("Red.", people) == pytest.approx(score)
    assert textvqa_accuracy("Red.", people) == pytest.approx(score)


def test_accuracy_leaves_each_person_out() -> None:
    """Against the definition, written out."""
    draw = random.Random(0)
    for _ in range(50):
        people = draw.choices(["one", "1", "two", "the two", "red"], k=draw.choice([1, 3, 10]))
        said = draw.choice(["1", "2", "red", "green"])
        same = {"one": "1", "two": "2", "the two": "2"}
        true = [same.get(person, person) for person in people]
        turns = []
        for i in range(len(true)):
            others = true[:i] + true[i + 1 :]
            turns.append(min(1, sum(one == said for one in others) / 3))
        assert textvqa_accuracy(said, people) == pytest.approx(sum(turns) / len(turns))


def test_where_all_people_agree_vqa_compares_as_it_stands() -> None:
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("two", ["two"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert textvqa_accuracy("2", ["two"] * 10) == 1
