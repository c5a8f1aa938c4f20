"""Which questions are answered together."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from vlmprune import embedded
from vlmprune.io.models import Loaded
from vlmprune.study.evals.run import evaluate
from vlmprune.study.tasks import Sample, Scenes


class Mixed(Scenes):
    """Short questions and a long one about each of two pictures."""

    def samples(self, limit: int | None = None) -> list[Sample]:
        kinds = ("000-at", "000-where", "000-describe", "001-at", "001-describe")
        return [one for one in Scenes().samples(16) if one.id in kinds][:limit]


def test_short_answers_do_not_wait_for_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those alone are answered together that may be of the same length."""
    loaded = Loaded(*embedded.load())
    asked: list[tuple[int, int]] = []
    own = type(loaded.model).generate

    @functools.wraps(own)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["max_new_tokens"], len(kwargs["attention_mask"])))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded.model), "generate", generate)
    evaluate(loaded, None, Mixed(), batch=5)
    limits = {one.kind == "listing": Mixed().max_new_tokens(one) for one in Mixed().samples()}
    assert limits[False] < limits[True]
    assert asked == [(limits[False], 3), (limits[True], 2)]
