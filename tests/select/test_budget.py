"""What a `keep` setting means, and which settings are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune.errors import VlmpruneError
from vlmprune.select.budget import plain_keep, resolve_keep


@given(st.integers(1, 5000), st.data())
def test_an_int_is_a_number_of_tokens(available: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, available))
    assert resolve_keep(keep, available) == keep


@given(st.integers(1, 5000), st.floats(0, 1, exclude_min=True))
def test_a_fraction_is_rounded_and_never_empty(available: int, fraction: float) -> None:
    kept = resolve_keep(fraction, available)
    assert isinstance(kept, int)
    assert kept == max(1, round(fraction * available))
    assert 1 <= kept <= available


def test_one_and_one_point_nothing_differ() -> None:
    assert resolve_keep(1, 576) == 1
    assert resolve_keep(1.0, 576) == 576
    assert resolve_keep(0.25, 576) == 144
    assert resolve_keep(0.0001, 576) == 1


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "keep=0 leaves no"),
        (-3, "keep=-3 leaves no"),
        (577, "keep=577 is more than the 576 visual tokens of the image"),
        (0.0, "outside"),
        (-0.5, "outside"),
        (1.5, "keep=1.5 is a fraction outside"),
        (64.0, "keep=64.0 is a fraction outside"),
        (float("nan"), "keep=nan is a fraction outside"),
        (float("inf"), "keep=inf is a fraction outside"),
        (True, "keep=True is not a number"),
        ("64", "keep='64' is not a number"),
        (None, "keep=None is not a number"),
        (1j, "is not a number"),
    ],
)
def test_refusals_are_one_sentence_with_the_way_out(keep: Any, words: str) -> None:
    with pytest.raises(VlmpruneError, match=words.replace("(", r"\(")) as caught:
        resolve_keep(keep, 576, "image")
    sentence = str(caught.value)
    assert "use " in sentence and "\n" not in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def test_nothing_to_keep() -> None:
    with pytest.raises(VlmpruneError, match="has 0 visual tokens"):
        resolve_keep(1, 0)


def test_other_libraries_integers_count_tokens() -> None:
    assert plain_keep(np.int64(4)) == 4 and type(plain_keep(np.int64(4))) is int
    assert plain_keep(0.5) == 0.5 and type(plain_keep(np.float32(0.5))) is float
    with pytest.raises(VlmpruneError, match="keep=0 leaves no"):
        plain_keep(np.int64(0))


@pytest.mark.parametrize("available", [0, -1])
def test_of_nothing_nothing_can_be_kept(available: int) -> None:
    with pytest.raises(VlmpruneError, match=f"this crop has {available} visual tokens, so none"):
        resolve_keep(1, available, "crop")
