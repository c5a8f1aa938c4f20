"""What a configuration keeps and reads for a question, in figures and in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from vlmprune import costs
from vlmprune.draw import layer_map
from vlmprune.draw.recall import spread
from vlmprune.errors import VlmpruneError
from vlmprune.io.models import Loaded, attached
from vlmprune.pruner import Pruner
from vlmprune.study import one_question, word_by_word
from vlmprune.study.compare.results import SIDE, STEPS, STILL, ShownAnswer, Still
from vlmprune.study.word_by_word import Followed


def drawn(
    loaded: Loaded,
    pruner: Pruner,
    inputs: Any,
    images: Sequence[Image.Image],
    answer: ShownAnswer,
    limit: int,
) -> ShownAnswer:
    """An answer with what was kept for it, in figures and where wanted in pictures.

    Args:
        loaded: model and processor.
        pruner: the method.
        inputs: of the question.
        images: its pictures.
        answer: as it was given.
        limit: tokens of the longest answer, if pictures are wanted; 0 for figures alone.
    """
    in_part = word_by_word.watched(pruner) is not None
    with attached(pruner, loaded.model) as handle:
        # What a step reads takes one to be told.
        some = {"max_new_tokens": 2, "min_new_tokens": 2} if in_part else {"max_new_tokens": 1}
        loaded.model.generate(**inputs, **some, do_sample=False, num_beams=1)
        assert handle is not None and handle.report is not None
        report = handle.report
    followed, trouble = None, ""
    if in_part and limit > 1:
        try:
            if report.reading is not None and report.reading.aside:
                raise VlmpruneError(
                    "every step reads all of it, which is faster here; recall:always=true does not."
                )
            followed = word_by_word.follow(loaded, pruner, inputs, images, limit)
        except VlmpruneError as error:
            trouble = str(error)
    caching = costs.caching_layers(loaded.model.config)
    answer = replace(
        answer,
        kept=sum(len(indices) for indices in report.kept),
        before=report.visual_tokens_before,
        kv_share=_share(report.kv_bytes_after, report.kv_bytes_before),
        parts={
            role: sum(int(one[role].sum()) for one in report.roles if role in one)
            for role in ("important", "diverse")
            if any(role in one for one in report.roles)
        },
        heads=layer_map.shares(report, caching),
        reached=layer_map.reached(report, len(caching)),
        trouble=trouble,
    )
    if report.reading is not None:
        share = _share(report.kv_bytes_read, report.kv_bytes_before)
        answer = replace(answer, read_share=share)
    if followed is not None:
        return replace(answer, drawn=_together(followed, images), strip=_strip(followed, images))
    if not limit or trouble:
        return answer
    try:
        pictures = one_question.draw(
            loaded, inputs, images, report, legend=False, min_side=SIDE, max_side=SIDE
        )
    except VlmpruneError as error:
        return replace(answer, trouble=str(error))
    return replace(answer, drawn=pictures)


def _together(followed: Followed, images: Sequence[Image.Image]) -> list[Image.Image]:
    """For each picture which cells all steps together read."""
    return [followed.together(number, one, SIDE) for number, one in enumerate(images)]


def _strip(followed: Followed, images: Sequence[Image.Image]) -> list[Still]:
    """Some steps of an answer, the first and the last among them."""
    steps = spread(len(followed.reading.steps), max(1, STEPS // len(images)))
    films = [
        followed.film(n, one, legend=False, side=STILL, steps=steps) for n, one in enumerate(images)
    ]
    frames = zip(*(film.frames for film in films), strict=True)
    return [Still(word, list(shown)) for word, shown in zip(films[0].words, frames, strict=True)]


def _share(part: float, whole: float) -> float:
    """A part of what may be nothing, or unknown."""
    return part / whole if whole else 1.0
