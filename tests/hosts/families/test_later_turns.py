"""A later turn on a pruned cache equals one on the host's own cache of a masked prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT
from shortened import exchanging, is_recurrent, tolerance
from stock import CACHE, cache_of
from vlmprune import DivPrune, VisPruner
from vlmprune.hosts.families import FAMILIES, PROVED
from zoo.base import VOCABULARY, WORDS
from zoo_oracle import KNOWN, dropped_columns, others, three_positions

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", KNOWN)
def test_a_later_turn_equals_masking(name: str) -> None:
    entry = KNOWN[name]
    built = entry.build()
    rows: list[list[Any]] = [["image", "image"], ["image"], ["image"] if entry.images_first else []]
    req = entry.request(built, rows)
    words = torch.randint(WORDS, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(3))
    given = req.inputs["attention_mask"]
    further = torch.ones_like(words)
    pruner = (VisPruner if "attention" in PROVED[name].stages else DivPrune)(keep=0.4)
    with pruner(built) as handle, torch.no_grad():
        cache = cache_of(built(**req.inputs, use_cache=True))
        report = handle.report
        later = {"input_ids": words, "attention_mask": torch.cat((given, further), dim=1)}
        pruned = built(**later, **{CACHE: cache}).logits
    dropped = dropped_columns(req, report)
    assert bool(dropped.any())
    answer = two_turns(built, req.inputs, words, report.positions)
    assert (pruned - answer(dropped)).abs().max() < tolerance(built)
    assert (pruned - answer(dropped_columns(req, report, others(report)))).abs().max() > DIFFERENT


def two_turns(
    built: Any, inputs: dict[str, Tensor], words: Tensor, policy: str
) -> Callable[[Tensor], Tensor]:
    """What the host makes of words behind a prompt of which some columns are hidden [B, L]."""
    family = FAMILIES[built.config.model_type]
    given = inputs["attention_mask"]
    steps = torch.arange(1, words.shape[1] + 1)

    def masked(dropped: Tensor) -> Tensor:
        mask = given * ~dropped
        if family.rope is not None:
            three = three_positions(built, inputs)
            text = (given.cumsum(1) - 1).clamp(min=0)
            prompt = torch.cat((text[None], three))
        else:
            # A plain forward counts columns; padding lies before them all.
            counted = torch.ones_like(given) if policy == "original" else 1 - dropped.long()
            prompt = (counted.cumsum(1) - 1).clamp(min=0) + family.first
        first = {"attention_mask": mask, "position_ids": prompt}
        around: Any = nullcontext()
        if is_recurrent(built):
            around = exchanging(built, inputs, dropped, prompt[1:])
        with torch.no_grad(), around as text_alone:
            turn = inputs | first if text_alone is None else text_alone
            cache = cache_of(built(**turn, use_cache=True))
            mask = torch.cat((turn["attention_mask"], torch.ones_like(words)), dim=1)
            return built(
                input_ids=words,
                attention_mask=mask,
                position_ids=prompt[..., -1:] + steps,
                **{CACHE: cache},
            ).logits

    return masked
