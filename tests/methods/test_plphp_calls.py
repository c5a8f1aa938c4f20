"""PLPHP in all the ways in which a model is called: turns, beams, samples, streams, chunks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    TextStreamer,
)

from answers import TOLERANCE, distance, generate
from cut_cache import SETTINGS
from masked import kept_columns, masking
from stock import CACHE, cache_of
from tiny import IMAGE, model, request
from vlmprune import PLPHP, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images
from vlmprune.runtime.cache.ragged_layer import RaggedLayer

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[1], [1, 2]])
def test_second_turn_with_a_new_image(attention: str, images: list[int]) -> None:
    built = model(attention=attention)
    one, two = request(built, images), request(built, images[::-1], seed=7)
    pruner = PLPHP(**SETTINGS, per_head="adaptive")
    new = two.inputs["input_ids"]
    new_mask = two.inputs["attention_mask"]

    def second(turn: Any) -> dict[str, Any]:
        ids = torch.cat((turn.sequences, new), 1)
        first = torch.ones_like(turn.sequences)
        first[:, : one.inputs["attention_mask"].shape[1]] = one.inputs["attention_mask"]
        return {
            "input_ids": ids,
            "attention_mask": torch.cat((first, new_mask), 1),
            "pixel_values": two.inputs["pixel_values"],
            CACHE: cache_of(turn),
        }

    with pruner(built) as handle:
        turn = generate(built, one.inputs)
        report = handle.report
        again = generate(built, second(turn))
        later = handle.report
    assert report is not None and later is not None and later is not report
    keep = kept_columns(report, one.inputs["input_ids"], IMAGE)
    with masking(built, keep):
        expected = generate(built, one.inputs)
        assert distance(turn, expected) < TOLERANCE
        # The second prompt is read over the first one's cut cache.
        full = second(expected)
        start = turn.sequences.shape[1] - 1
        both = kept_columns(later, full["input_ids"], IMAGE, before=start)
        for index, mask in keep.items():
            both[index][:, :, : mask.shape[2]] &= mask
        state = copy.deepcopy(full[CACHE])
        prefill = generate(built, full, max_new_tokens=1)
    assert float((again.logits[0] - prefill.logits[0]).abs().max()) < TOLERANCE

    class Both(dict):
        """The first turn's masks while the second prompt is read, then those of both turns."""

        def get(self, index: int, default: Any = None) -> Any:
            return both.get(index) if self.read else keep.get(index, default)

    masks = Both({0: None})
    masks.read = False
    hook = built.register_forward_hook(lambda *_: setattr(masks, "read", True))
    with masking(built, masks):
        expected = generate(built, full | {CACHE: state})
    hook.remove()
    assert torch.equal(again.sequences, expected.sequences)
    assert distance(again, expected) < TOLERANCE
    lengths = {k.shape[0] for layer in later.layers for head in layer.kept for k in head}
    assert len(lengths) > 1


def test_sampling_and_several_sequences() -> None:
    built = model()
    req = request(built, [1, 1], text=[5, 9])
    settings = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    with PLPHP(**SETTINGS)(built) as handle:
        pruned = generate(built, req.inputs, **settings)
    assert handle.report is not None
    assert len(handle.report.layers[0].gamma) == 2
    torch.manual_seed(5)
    with masking(built, kept_columns(handle.report, req.inputs["input_ids"], IMAGE)):
        expected = generate(built, req.inputs, **settings)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE


def test_streaming() -> None:
    built = model()
    req = request(built, [1])
    seen: list[Tensor] = []

    class Streamer(TextStreamer):
        def __init__(self) -> None: ...

        def put(self, value: Tensor) -> None:
            seen.append(value.flatten())

        def end(self) -> None: ...

    with PLPHP(**SETTINGS)(built):
        out = generate(built, req.inputs, streamer=Streamer())
    assert torch.cat(seen).tolist() == out.sequences[0].tolist()


def test_plain_forward_and_steps_by_hand() -> None:
    built = model()
    req = request(built, [1, 2])
    mask = req.inputs["attention_mask"]
    with torch.no_grad():
        whole = built(**req.inputs)
        with PLPHP(**SETTINGS)(built) as handle:
            first = built(**req.inputs)
            assert torch.equal(first.logits, whole.logits)
            report, cache = handle.report, cache_of(first)
            steps = []
            for _ in range(3):
                token = torch.full((2, 1), 9)
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                steps.append(built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits)
        assert report is not None and len(report.layers) == 3
        assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)
        mask, cache = req.inputs["attention_mask"], cache_of(whole)
        with masking(built, kept_columns(report, req.inputs["input_ids"], IMAGE)):
            for step in steps:
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                own = built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
                assert float((step - own).abs().max()) < TOLERANCE


def test_a_prompt_read_in_chunks() -> None:
    built = model()
    req = request(built, [2, 1])
    with PLPHP(**SETTINGS)(built) as handle:
        whole = generate(built, req.inputs)
        kept = handle.report.layers[0].kept if handle.report else []
        if not chunks_hold_images():
            with pytest.raises(VlmpruneError, match="loses images"):
                generate(built, req.inputs, prefill_chunk_size=16)
            return
        chunks = generate(built, req.inputs, prefill_chunk_size=16)
    assert distance(whole, chunks) < TOLERANCE
    assert handle.report is not None and kept
    for one, other in zip(kept, handle.report.layers[0].kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert cache_of(chunks).layers[0].prefix is not None


def test_a_copied_cache_goes_its_own_way() -> None:
    built = model()
    req = request(built, [1])
    with PLPHP(**SETTINGS)(built):
        turn = generate(built, req.inputs)
        twin = copy.deepcopy(cache_of(turn))
        ids = torch.cat((turn.sequences, torch.tensor([[7, 8]])), 1)
        one = generate(built, {"input_ids": ids, CACHE: cache_of(turn)})
        other = generate(built, {"input_ids": ids, CACHE: twin})
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
