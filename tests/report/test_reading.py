"""What a report says of a cache that is read in part: which tokens, how many bytes, of what."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import Recall, VisPruner
from vlmprune.report import ImageTokens, Reading, StepRead


def numbers(*some: int) -> torch.Tensor:
    return torch.tensor(some)


def reading(*steps: StepRead, rows: int = 1, images: list[ImageTokens] | None = None) -> Reading:
    return Reading((0, 2), [[1]], 1000, 1100, 0, 100, list(steps), images or [], rows)


def test_a_token_is_lit_by_the_heads_that_read_it() -> None:
    # The second sample has two images; its tokens stand behind each other, pruned before.
    images = [
        ImageTokens(0, numbers(0, 1, 2), numbers(0, 2, 3), 5),
        ImageTokens(1, numbers(0, 1), numbers(1, 0), 2),
        ImageTokens(1, numbers(2, 3), numbers(0, 1), 2),
    ]
    index = {
        0: torch.tensor([[[0, -1], [2, -1]], [[0, 3], [1, 3]]], dtype=torch.int32),
        2: torch.tensor([[[2, -1]], [[0, 2]]], dtype=torch.int32),
    }
    found = reading(StepRead(index=index), rows=2, images=images).lit(0)
    third = 1 / 3
    for one, expected in zip(
        found, ([third, 0, 0, 2 * third, 0], [third, 2 * third], [third, 2 * third]), strict=True
    ):
        assert torch.allclose(one, torch.tensor(expected))


def test_of_beams_the_first_is_told() -> None:
    images = [ImageTokens(row, numbers(0, 1), numbers(0, 1), 2) for row in (0, 1)]
    index = {0: torch.tensor([[[0]], [[1]], [[1]], [[0]]], dtype=torch.int32)}
    first, second = reading(StepRead(index=index), rows=2, images=images).lit(0)
    assert first.tolist() == [1, 0] and second.tolist() == [0, 1]


def test_shares_are_of_all_steps() -> None:
    steps = [
        StepRead(10, 5, 100, mass={0: [0.5], 2: [1.0]}),
        StepRead(30, 15, 300, mass={0: [0.25], 2: [0.25]}),
    ]
    one = reading(*steps)
    assert (one.share_read, one.share_fetched, one.share_of_attention) == (0.1, 0.05, 0.5)
    told = json.loads(json.dumps(one.as_dict()))
    assert [told[name] for name in ("share_read", "share_fetched", "share_of_attention")] == [
        *(0.1, 0.05, 0.5)
    ]
    none = reading()
    assert none.share_read is none.share_fetched is none.share_of_attention is None


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("before", [None, VisPruner(8)])
def test_a_later_turns_report_is_of_its_own_images(store: Any, before: Any) -> None:
    """The cache holds both turns' tokens; each report counts what its turn brought."""
    built = model("llava")
    first, second = (request(built, [1], seed=seed).inputs for seed in (1, 2))
    method: Any = Recall(read=2, floor=0, store=store, always=True)
    with (method if before is None else before | method)(built) as handle:
        out = built.generate(
            **first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        one = handle.report
        ids = torch.cat((out.sequences, second["input_ids"]), dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given |= {"pixel_values": second["pixel_values"]} | {CACHE: cache_of(out)}
        built.generate(**given, max_new_tokens=3, do_sample=False)
        two = handle.report
    assert one.reading.own == 1 and two.reading.own == 0.5
    assert two.reading.dense_bytes == 2 * one.reading.dense_bytes
    assert two.kv_bytes_before == one.kv_bytes_before
    # Of sketches a part is there once, however many tokens there are.
    once = 2 * one.reading.sketch_bytes - two.reading.sketch_bytes
    assert 0 <= once < one.reading.sketch_bytes
    assert one.kv_bytes_after - two.kv_bytes_after == pytest.approx(once / 2)
    assert two.kv_bytes_after > 0 and 0 < two.kv_bytes_read < one.kv_bytes_before
    dense = one.reading.dense_bytes
    held = one.reading.sketch_bytes + (dense if store == "device" else 0)
    assert one.kv_bytes_after == held
    # Two tokens of each head are read, and the sketch.
    tokens = 16 if before is None else 8
    assert one.kv_bytes_read == dense * 2 / tokens + one.reading.sketch_bytes
