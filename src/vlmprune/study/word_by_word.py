"""An answer under a method that reads its cache in part, followed step by step.

`draw.recall` draws it. Prints nothing; `cli` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from PIL import Image

from vlmprune.draw import recall
from vlmprune.draw.recall import Film
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import processed
from vlmprune.io.models import Loaded, attached, enough_memory
from vlmprune.pruner import Pruner
from vlmprune.report import Reading, Report
from vlmprune.study.one_question import Place, places_of


@dataclass(frozen=True)
class Followed:
    """An answer, and what each of its steps read.

    Attributes:
        texts: the decoded answer up to each of its tokens.
        reading: what the steps read.
        report: of the whole answer.
        places: for each image where its visual tokens lie.
    """

    texts: list[str]
    reading: Reading
    report: Report
    places: list[Place] = field(repr=False)

    def film(self, number: int, image: Image.Image, **how: Any) -> Film:
        """The film of one image; `how` goes to `recall.film`."""
        return recall.film(image, **self._shown(number) | how)

    def together(self, number: int, image: Image.Image, side: int) -> Image.Image:
        """One still of an image: how many KV heads read each cell, averaged over the steps."""
        lit = self._shown(number)["lit"]
        mean = torch.stack(lit).mean(dim=0)
        how = {"lit": [mean], "texts": ["", ""], "legend": False, "side": side}
        return self.film(number, image, **how).frames[0]

    def pictures(
        self, number: int, image: Image.Image, ending: str
    ) -> tuple[list[Image.Image], list[int]]:
        """What a file of one image holds, as `recall.pictures` has it."""
        return recall.pictures(ending, image, **self._shown(number))

    def _shown(self, number: int) -> dict[str, Any]:
        place = self.places[number]
        lit = [self.reading.lit(step)[number] for step in range(len(self.reading.steps))]
        about = {"crops": place.crops, "whole_crop": place.whole_crop}
        return {"boxes": place.boxes, "lit": lit, "texts": self.texts, **about}


def watched(pruner: Pruner) -> Pruner | None:
    """The same pruner, which notes what its steps read; None where it reads nothing in part."""
    links: Sequence[Any] = pruner.links
    if not any(one.recalls for one in links):
        return None
    return reduce(
        or_, [replace(one, watch=one.watch or "tokens") if one.recalls else one for one in links]
    )


def in_part(pruner: Pruner) -> Pruner:
    """The same pruner, which reads in part even where reading all would be faster."""
    links: Sequence[Any] = pruner.links
    return reduce(or_, [replace(one, always=True) if one.recalls else one for one in links])


def check(pruner: Pruner, option: str, max_new_tokens: int) -> None:
    """Refuse what has no steps to follow.

    Args:
        pruner: the method.
        option: that asked for it.
        max_new_tokens: limit of the answer.

    Raises:
        VlmpruneError: the method reads nothing in part, or there is but one token.
    """
    if watched(pruner) is None:
        raise VlmpruneError(
            f"{option} draws what each step reads of the cache, and {_name(pruner)} reads all of "
            "it; use a method that reads it in part, as in --method recall."
        )
    if max_new_tokens < 2:
        raise VlmpruneError(
            f"{option} draws the steps after the first token, and --max-new-tokens "
            f"{max_new_tokens} leaves none; give 2 or more."
        )


def follow(
    loaded: Loaded, pruner: Pruner, inputs: Any, images: Sequence[Image.Image], max_new_tokens: int
) -> Followed:
    """Answer once more, greedily, and note what each step reads.

    Args:
        loaded: model and processor.
        pruner: one that reads its cache in part.
        inputs: of one sample, from `prepare`.
        images: its pictures.
        max_new_tokens: limit of the answer.

    Raises:
        VlmpruneError: what the pruner refuses, every picture is read whole, the answer has but one
            token, or where visual tokens lie is not known.
    """
    noting = watched(pruner)
    assert noting is not None
    prompt = processed.ids_of(inputs).shape[1]
    with enough_memory(loaded.model.device), attached(noting, loaded.model) as handle:
        out = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
    assert handle is not None and handle.report is not None
    report, new = handle.report, out[0, prompt:]
    if report.reading is None:
        most = max(len(one) for one in report.kept)
        raise VlmpruneError(
            f"{_name(pruner)} reads every picture here whole ({most} visual tokens at most), so "
            "there is nothing to draw; give it a smaller read or floor, or a larger picture."
        )
    if not report.reading.steps:
        raise VlmpruneError(
            "the answer ends with its first token, which takes no step, so there is nothing to "
            "draw; ask something else."
        )
    texts = [
        loaded.processor.decode(new[: n + 1], skip_special_tokens=True).lstrip()
        for n in range(len(new))
    ]
    return Followed(texts, report.reading, report, places_of(loaded, inputs, images, report))


def _name(pruner: Pruner) -> str:
    return " | ".join(type(one).__name__ for one in pruner.links)
