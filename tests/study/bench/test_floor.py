"""The floor: natively short prompts, and the same encoder's work."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiny import model, request
from vlmprune import PLPHP, FastV, Recall, VisPruner, VlmpruneError, costs
from vlmprune.hosts.families import register
from vlmprune.hosts.families.qwen import QwenImages
from vlmprune.hosts.requests import base_of
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.runtime.family import family_of
from vlmprune.study import measure
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import tables
from vlmprune.study.bench.floor import Floor, counts_of, floor_of
from vlmprune.views import EncoderView, Selection
from zoo import ZOO

# A row of two pictures and one of one, in every family.
ROWS = [["image", "image"], ["image"]]


@dataclass(frozen=True)
class First(Budgeted):
    """Keeps the first tokens of each crop, which are those that a floor has."""

    def select(self, view: EncoderView) -> Selection:
        number = view.candidates.long().cumsum(dim=1)
        return Selection(view.candidates & (number <= int(self.keep)), {})


def logits(built: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[steps, B, V] of the new tokens."""
    out = built.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits)


def placeholders(built: Any, floor: Floor) -> list[int]:
    """Visual tokens of each row, counted in the prompt."""
    return (floor.inputs["input_ids"] == built.config.image_token_id).sum(dim=1).tolist()


@pytest.mark.parametrize("name", ZOO)
def test_every_family_takes_a_natively_short_prompt(name: str) -> None:
    built = ZOO[name].build()
    req = ZOO[name].request(built, ROWS, text=[3, 5])
    with VisPruner(2)(built) as handle:
        pruned = built.generate(**req.inputs, max_new_tokens=2, do_sample=False)
    assert handle.report is not None
    kept = [len(one) for one in handle.report.kept]
    prefill, decode = counts_of(handle.report)
    assert list(prefill) == list(decode) == kept
    floor = floor_of(built, req.inputs, prefill)
    assert sum(placeholders(built, floor)) == floor.visual_tokens == sum(kept)
    assert placeholders(built, floor) == floor.row_tokens
    for pixels in family_of(built).media[0].inputs[:1]:
        assert torch.equal(floor.inputs[pixels], req.inputs[pixels])
    before = set(vars(base_of(built)))
    with floor.on(built):
        out = built.generate(**floor.inputs, max_new_tokens=2, do_sample=False)
    assert set(vars(base_of(built))) == before
    # The same kind of answer, over prompts that differ by the dropped tokens alone.
    new = out.shape[1] - floor.inputs["input_ids"].shape[1]
    assert new == pruned.shape[1] - req.inputs["input_ids"].shape[1] == 2
    assert len(out) == len(pruned) and out.dtype == pruned.dtype


def test_the_floor_of_the_first_tokens_is_that_pruned_model() -> None:
    built = model("llava")
    inputs = request(built, [2, 1], text=[3, 6]).inputs
    with First(5, positions="compact")(built):
        pruned = logits(built, inputs)
    floor = floor_of(built, inputs, (5, 5, 5))
    with floor.on(built):
        found = logits(built, floor.inputs)
    assert (found - pruned).abs().max() < 1e-5
    other = floor_of(built, inputs, (5, 5, 6))
    with other.on(built):
        assert (logits(built, other.inputs) - pruned).abs().max() > 1e-3


def test_the_encoder_does_the_same_work() -> None:
    built = model("llava_next")
    inputs = request(built, [1, 1]).inputs

    def encoded(given: dict[str, Tensor]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            built.generate(**given, max_new_tokens=1, do_sample=False)
        counts = counter.get_flop_counts()
        return sum(
            sum(found.values())
            for name, found in counts.items()
            if name.split(".")[-1] in ("CLIPVisionModel", "vision_tower")
        )

    full = encoded(inputs)
    floor = floor_of(built, inputs, (7, 3))
    with floor.on(built):
        assert encoded(floor.inputs) == full > 0


def report_of(built: Any, inputs: dict[str, Tensor], pruner: Any) -> Any:
    with pruner(built) as handle:
        built.generate(**inputs, max_new_tokens=2, do_sample=False)
    return handle.report


def test_how_many_tokens_a_floor_has() -> None:
    """Three layers, 16 visual tokens a picture."""
    built = model("llava")
    inputs = request(built, [1, 2]).inputs
    few = (4, 4, 4)
    assert counts_of(report_of(built, inputs, VisPruner(4))) == (few, few)
    # All of them are seen at prefill, and half stays in the cache of every layer.
    assert counts_of(report_of(built, inputs, PLPHP(r=0.5, dr=0))) == ((16,) * 3, (8,) * 3)
    both = VisPruner(4) | PLPHP(r=0.5, dr=0)
    assert counts_of(report_of(built, inputs, both)) == (few, (2, 2, 2))
    # The layers see 16, 16 and 4.
    assert counts_of(report_of(built, inputs, FastV(keep=4))) == ((12,) * 3, (12,) * 3)


def test_a_cache_that_is_read_in_part_has_the_floor_of_what_a_step_reads() -> None:
    """Four heads of eight channels, two of them KV heads, in three layers."""
    built = model("llava")
    inputs = request(built, [1, 2]).inputs
    # Of 16 tokens 4 are read, and of all the keys, which are half of the bytes. Row 0 has one
    # picture of the two that there is room for.
    exact, padded = Recall(read=4, sketch="exact", floor=0, rest="none", always=True), 3 / 4
    report = report_of(built, inputs, exact)
    assert report.kv_bytes_after == report.kv_bytes_before / padded
    read = report.kv_bytes_read / report.kv_bytes_before
    assert read == pytest.approx(4 / 16 + 0.5 / padded)
    assert counts_of(report) == ((16,) * 3, (round(16 * read),) * 3)
    # One layer is read whole.
    part = report_of(built, inputs, replace(exact, first_layer=1))
    assert part.kv_bytes_read == pytest.approx(
        (report.kv_bytes_before + 2 * report.kv_bytes_read) / 3
    )
    # What the sketch adds to what is held is no part of the floor's prefill.
    both = report_of(built, inputs, VisPruner(8) | Recall(read=2, floor=0, always=True))
    assert both.kv_bytes_after > both.kv_bytes_before / 2 > both.kv_bytes_read
    each = both.kv_bytes_before / both.visual_tokens_before
    few = round(both.kv_bytes_read / each / 3)
    assert counts_of(both) == ((8,) * 3, (few,) * 3) and few < 8
    # Without a step nothing was read in part.
    with exact(built) as handle:
        built.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert handle.report is not None and handle.report.kv_bytes_read == report.kv_bytes_before
    assert counts_of(handle.report) == ((16,) * 3, (16,) * 3)


def test_bench_tells_what_is_held_and_what_is_read() -> None:
    built = model("llava")
    work = bench.Work(built, request(built, [1]).inputs, "tiny", 1)
    pruners = {
        "here": Recall(read=2, floor=0, always=True),
        "away": Recall(read=2, floor=0, store="host"),
        "cut": PLPHP(r=0.5, dr=0),
    }
    result = bench.compare(work, pruners, new_tokens=3, repeat=1, floor=True)
    here, away, cut = result.methods
    full = result.full
    sketch = away.visual_kv_bytes
    assert here.visual_kv_bytes == full.visual_kv_bytes + sketch and sketch > 0
    assert away.visual_host_bytes == full.visual_kv_bytes and here.visual_host_bytes == 0
    assert here.visual_read_bytes == away.visual_read_bytes == full.visual_kv_bytes / 8 + sketch
    assert cut.visual_read_bytes == cut.visual_kv_bytes == full.visual_kv_bytes / 2
    assert full.visual_read_bytes == full.visual_kv_bytes
    # The cache itself tells the same.
    assert here.cache_bytes - away.cache_bytes == full.visual_kv_bytes
    assert here.cache_bytes > full.cache_bytes + sketch
    _, decode = result.floor(here) or (None, None)
    assert decode is not None
    assert decode.visual_tokens == round(16 * here.visual_read_bytes / full.visual_kv_bytes)
    content = json.loads(json.dumps(result.as_dict()))
    (shown,) = [
        tables.rows(content | {"seconds_are": "CPU", "runs": [content]}, content)[row]
        for row in (2,)
    ]
    assert "MiB on the host" in shown[-2] and shown[-2].endswith("read")


def test_a_floor_that_cannot_be() -> None:
    built = model("llava")
    inputs = request(built, [1, 1]).inputs
    for counts in ((4,), (4, 17), (0, 4)):
        with pytest.raises(VlmpruneError, match="do not fit pictures of"):
            floor_of(built, inputs, counts)
    video = ZOO["qwen2_5_vl"].build()
    moving = ZOO["qwen2_5_vl"].request(video, [["video"]])
    with pytest.raises(VlmpruneError, match="for images alone"):
        floor_of(video, moving.inputs, (2,))


def test_a_record_from_outside_may_leave_no_floor(own_records: None) -> None:
    """Positions of three axes that nothing but the pixels tells the host of."""
    built = ZOO["qwen2_vl"].build()
    req = ZOO["qwen2_vl"].request(built, [["image"]])
    floor_of(built, req.inputs, (2,))

    class Fixed(QwenImages):
        resizable = False

    own = replace(family_of(built), media=(Fixed(),))
    register("qwen2_vl", own, replace=True)
    with pytest.raises(VlmpruneError, match=f"^{own.name} has no floor: its positions follow from"):
        floor_of(built, req.inputs, (2,))


def test_bench_measures_each_floor_once() -> None:
    built = model("llava")
    work = bench.Work(built, request(built, [1, 1]).inputs, "tiny", 1)
    cut = PLPHP(r=0.5, dr=0)
    pruners = {"few": VisPruner(4), "first": First(4), "cut": cut, "both": VisPruner(8) | cut}
    result = bench.compare(work, pruners, new_tokens=2, repeat=2, floor=True)
    assert [(one.name, one.visual_tokens) for one in result.floors] == [
        ("floor of 8 tokens", 8),
        ("floor of 16 tokens", 16),
    ]
    few, first, half, both = result.methods
    assert result.floor(few) == result.floor(first) == (result.floors[0],) * 2
    # A cut cache has the full model's prefill, and the decoding of a shorter one.
    assert result.floor(half) == (result.full, result.floors[1])
    assert result.floor(both) == (result.floors[1], result.floors[0])
    assert result.floors[0].flops == few.flops
    assert result.floors[0].visual_kv_bytes == few.visual_kv_bytes == both.visual_kv_bytes
    assert result.floors[0].cache_bytes == few.cache_bytes
    assert result.floors[0].selecting_ms is None and len(result.floors[0].total_ms.values) == 2
    content = result.as_dict()
    assert content["methods"][3]["floor"] == "floor of 16 tokens"
    assert content["methods"][3]["decode_floor"] == "floor of 8 tokens"
    over = content["methods"][0]["times_the_floor"]
    assert over["first_token"] == few.first_ms.median / result.floors[0].first_ms.median
    assert set(over) == {"first_token", "prefill", "decode"}


def test_formula_flops_are_the_counted_ones() -> None:
    """Of the decoder's layers; the formula leaves out the text, which is added here exactly.

    What n visual and t text tokens take is the formula of n + t. So it differs from the formula of
    n by what t tokens take alone and by the attention between them, 2 x 4 n t q in each layer.
    """
    # Torch does not count the fused CPU kernel; the eager products are the same.
    built = model("llava", attention="eager")
    text = built.config.text_config
    inputs = request(built, [1]).inputs
    words = inputs["input_ids"].shape[1] - 16

    def counted(given: dict[str, Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            built.generate(**given, max_new_tokens=1, do_sample=False)
        return sum(
            sum(found.values())
            for name, found in counter.get_flop_counts().items()
            if ".layers." in name and "language_model" in name and name.split(".")[-1].isdigit()
        )

    def formula(visual: int) -> float:
        left_out = costs.prefill_flops(text, words)
        left_out += text.num_hidden_layers * 2 * 4 * visual * words * text.hidden_size
        return costs.prefill_flops(text, visual) + left_out

    result = bench.compare(
        *(bench.Work(built, inputs, "tiny", 1), {"few": VisPruner(4)}),
        **{"new_tokens": 1, "repeat": 1, "floor": True},
    )
    assert counted(inputs) == formula(16)
    with VisPruner(4)(built) as handle:
        assert counted(inputs) == formula(4)
    assert handle.report is not None
    few, (short,) = result.methods[0], result.floors
    saved = costs.prefill_flops(text, 16) - costs.prefill_flops(text, 4)
    assert result.full.flops - few.flops == result.full.flops - short.flops == saved
    floor = floor_of(built, inputs, (4,))
    with floor.on(built):
        assert counted(floor.inputs) == formula(4)


def test_prefill_is_a_part_of_the_first_token() -> None:
    built = model("llava")
    inputs = request(built, [1]).inputs
    hooks = len(built.get_decoder()._forward_hooks)
    one = measure.timed(built, inputs, 2)
    assert one.prefill_ms is not None and 0 < one.prefill_ms < one.first_ms < one.total_ms
    assert len(built.get_decoder()._forward_hooks) == hooks
