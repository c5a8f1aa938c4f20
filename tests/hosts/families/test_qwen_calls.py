"""The Qwen line and GLM-V called in every way: beams, later turns, by hand; each equals masking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from answers import DIFFERENT, distance
from masked import masking
from qwen_oracle import (
    APART,
    FAMILIES,
    MEDIA_NAMES,
    MODELS,
    NAMES,
    forget_positions,
    generate,
    masked,
    positions_of,
)
from shortened import exchanging, is_recurrent, shorter, tolerance
from stock import CACHE, cache_of
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.hosts.families.qwen import MEDIA
from vlmprune.pruner import Pruner
from vlmprune.views import EncoderView, Selection
from zoo import ZOO, Request
from zoo.base import IMAGE, VOCABULARY, WORDS
from zoo_oracle import columns_of, dropped_columns

pytestmark = pytest.mark.oracle

_forget = pytest.fixture(autouse=True)(forget_positions)


def _joined(
    name: str, first: Request, answer: Tensor, second: Request | None, more: Tensor
) -> Request:
    """A whole conversation: a request, what was answered, and a request or mere words."""
    ids = second.inputs["input_ids"] if second else more
    tail = torch.cat((answer, ids), dim=1)
    mask = torch.ones_like(tail)
    if second:
        mask[:, answer.shape[1] :] = second.inputs["attention_mask"]
    inputs = dict(first.inputs)
    for key in MEDIA_NAMES & set(second.inputs if second else ()):
        value = second.inputs[key]  # type: ignore[union-attr]
        inputs[key] = torch.cat((inputs[key], value)) if key in inputs else value
    inputs["input_ids"] = torch.cat((first.inputs["input_ids"], tail), dim=1)
    inputs["attention_mask"] = torch.cat((first.inputs["attention_mask"], mask), dim=1)
    inputs |= ZOO[name].aligned(inputs["input_ids"])
    return Request(inputs, first.lengths, first.modalities, first.rows, first.pixels)


TURNS = [
    (name, rows, turn)
    for name in NAMES
    for rows in (["image"], ["video", "image"])
    for turn in ("words", "new image", "all images again", "new video")
    # GLM-V cannot be asked about images and videos at once (`test_glm4v`); of a request for both
    # there its items are videos.
    if name in APART or turn == "words" or ("video" in rows) == (turn == "new video")
]


@pytest.mark.parametrize(("name", "rows", "turn"), TURNS)
def test_second_turn_equals_masking(name: str, rows: Any, turn: str) -> None:
    built = MODELS[name]
    first = ZOO[name].request(built, [rows])
    more = torch.randint(WORDS, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(5))
    second = None
    if turn != "words":
        kind = "video" if turn == "new video" else "image"
        second = ZOO[name].request(built, [[kind]], seed=9)
        second.inputs[MEDIA[kind == "video"].inputs[0]] += 0.5
    with VisPruner(keep=0.4)(built) as handle:
        before = generate(built, first.inputs)
        kept = dropped_columns(first, handle.report)
        answer = before.sequences[:, first.inputs["input_ids"].shape[1] :]
        whole = _joined(name, first, answer, second, more)
        given = {k: v for k, v in whole.inputs.items() if k not in MEDIA_NAMES}
        if turn == "all images again":
            given |= {k: v for k, v in whole.inputs.items() if k in MEDIA_NAMES}
        elif second:
            given |= {k: v for k, v in second.inputs.items() if k in MEDIA_NAMES}
        after = generate(built, given, **{CACHE: cache_of(before)})
        late = dropped_columns(second, handle.report) if second else torch.zeros_like(more) > 0
    held = torch.zeros_like(answer, dtype=torch.bool)
    dropped = torch.cat((kept, held, late), dim=1)
    expected = masked(built, whole.inputs, dropped)
    assert torch.equal(after.sequences, expected.sequences)
    assert distance(after, expected) < tolerance(built)
    assert distance(after, masked(built, whole.inputs, dropped & False)) > DIFFERENT


@FAMILIES
def test_a_later_turn_on_a_cache_that_the_host_filled(name: str) -> None:
    built = MODELS[name]
    first = ZOO[name].request(built, [["image", "image"]])
    second = ZOO[name].request(built, [["image"]], seed=9)
    before = generate(built, first.inputs)
    answer = before.sequences[:, first.inputs["input_ids"].shape[1] :]
    whole = _joined(name, first, answer, second, answer)
    given = {k: v for k, v in whole.inputs.items() if k not in MEDIA_NAMES}
    given |= {k: v for k, v in second.inputs.items() if k in MEDIA_NAMES}
    with VisPruner(keep=0.4)(built) as handle:
        after = generate(built, given, **{CACHE: cache_of(before)})
    late = dropped_columns(second, handle.report)
    earlier = whole.inputs["input_ids"].shape[1] - late.shape[1]
    dropped = torch.nn.functional.pad(late, (earlier, 0))
    assert distance(after, masked(built, whole.inputs, dropped)) < tolerance(built)


@FAMILIES
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_pruner_goes_on_and_the_host_alone_does_not(name: str, how: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image"]])
    built.model.rope_deltas = torch.tensor([[77]])
    with torch.no_grad():
        with VisPruner(keep=0.4)(built) as handle:
            if how == "forward":
                first = built(**req.inputs, use_cache=True)
                tail = first.logits[:, -1:].argmax(-1)
            else:
                first = generate(built, req.inputs)
                tail = first.sequences[:, -1:]
            report = handle.report
        with pytest.raises(VlmpruneError, match="continue it with the pruner attached"):
            built(input_ids=tail, **{CACHE: cache_of(first)})
        with VisPruner(keep=0.4)(built):
            step = built(input_ids=tail, **{CACHE: cache_of(first)}).logits
        answer = (
            first.sequences[:, req.inputs["input_ids"].shape[1] :] if how != "forward" else tail
        )
        whole = _joined(name, req, answer, None, tail[:, :0])
        dropped = dropped_columns(req, report)
        dropped = torch.nn.functional.pad(dropped, (0, answer.shape[1]))
        expected = masked(built, whole.inputs, dropped, max_new_tokens=1).logits[0]
    assert (step[:, -1] - expected).abs().max() < tolerance(built)


@FAMILIES
def test_keeping_everything_leaves_what_the_host_remembers(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image"], ["image"], []])
    for call in (generate, lambda built, inputs: built(**inputs)):
        with torch.no_grad():
            call(built, req.inputs)
            expected = built.model.rope_deltas
            built.model.rope_deltas = None
            with VisPruner(keep=1.0)(built):
                call(built, req.inputs)
        assert torch.equal(built.model.rope_deltas, expected)
        assert built.model.rope_deltas.dtype == expected.dtype


@pytest.mark.parametrize("step", [2, 40])
def test_a_video_that_reaches_further_in_time_than_the_text_behind_it(step: int) -> None:
    built = MODELS["qwen2_5_vl"]
    req = ZOO["qwen2_5_vl"].request(built, [["video"]], text=3)
    req.inputs["second_per_grid_ts"] = torch.tensor([float(step)])
    # Later frames go, and with them the largest position.
    pruner = _First(5)
    with pruner(built) as handle:
        pruned = generate(built, req.inputs, max_new_tokens=30)
    dropped = dropped_columns(req, handle.report)
    expected = masked(built, req.inputs, dropped, max_new_tokens=30)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < tolerance(built)


@dataclass(frozen=True)
class _First(Pruner):
    """Keeps the first few cells of the first crop."""

    count: int

    def select(self, view: EncoderView) -> Selection:
        kept = torch.zeros_like(view.candidates)
        kept[0, : self.count] = True
        return Selection(kept, {})


@FAMILIES
def test_a_prompt_may_end_in_visual_tokens(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["image"]], text=0)
    end = int((req.inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        req.inputs[key] = req.inputs[key][:, :end]
    with _First(3)(built) as handle:
        pruned = generate(built, req.inputs)
        plain = generate(built, req.inputs, use_cache=False)
    dropped = dropped_columns(req, handle.report)
    assert distance(pruned, plain) < tolerance(built)
    if is_recurrent(built):
        assert distance(pruned, masked(built, req.inputs, dropped)) < tolerance(built)
        return
    # Its last column is dropped, so that the first new token is read off the one that stays; the
    # positions of the answer go on behind the full prompt's last column all the same.
    answer = pruned.sequences[:, end:]
    whole = _joined(name, req, answer, None, answer[:, :0])
    start = positions_of(built, req.inputs)
    steps = torch.arange(1, answer.shape[1] + 1) + start[..., -1:]
    mask = torch.nn.functional.pad(~dropped, (0, answer.shape[1]), value=True).long()
    changed = {"attention_mask": mask, "position_ids": torch.cat((start, steps), dim=-1)}
    with torch.no_grad():
        logits = built(**(whole.inputs | changed)).logits
    last = int((~dropped[0]).nonzero()[-1])
    assert last < end - 1
    for step, column in enumerate([last, *range(end, end + len(pruned.logits) - 1)]):
        assert (pruned.logits[step] - logits[:, column]).abs().max() < tolerance(built)


@FAMILIES
def test_a_call_inside_a_call_encodes_its_own_items(name: str) -> None:
    built = MODELS[name]
    outer = ZOO[name].request(built, [["image", "video"]])
    inner = ZOO[name].request(built, [["video"], ["image"]], seed=4)
    inside: list[Any] = []

    class Asks(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if not inside:
                inside.append(generate(built, inner.inputs))
            return scores

    with VisPruner(keep=0.4)(built):
        alone = generate(built, inner.inputs), generate(built, outer.inputs)
        around = generate(built, outer.inputs, logits_processor=[Asks()])
    assert distance(inside[0], alone[0]) == 0
    assert distance(around, alone[1]) == 0


@FAMILIES
def test_chained_with_a_cut_cache_equals_masking(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["image", "image"], ["video"], []])
    with (VisPruner(keep=0.6) | PLPHP(alpha=0.8, beta=0.6, per_head="adaptive"))(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    places: dict[int, list[int]] = {0: [], 1: []}
    for row, columns in columns_of(req, [len(layout.labels) for layout in report.layouts]):
        places[row] += columns
    keep = {}
    for layer in report.layers:
        mask = torch.ones(3, len(layer.kept), req.inputs["input_ids"].shape[1], dtype=torch.bool)
        for head, rows in enumerate(layer.kept):
            for row, columns in places.items():
                mask[row, head, columns] = False
                mask[row, head, [columns[i] for i in rows[row].tolist()]] = True
        keep[layer.index] = mask
    dropped = dropped_columns(req, report)
    if is_recurrent(built):
        short = shorter(req.inputs, dropped)
        keep = {index: short(mask.mT).mT for index, mask in keep.items()}
    with masking(built, keep):
        expected = masked(built, req.inputs, dropped)
    assert distance(pruned, expected) < tolerance(built)
    assert distance(pruned, masked(built, req.inputs, dropped)) > DIFFERENT


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_forward_equals_masking(name: str, side: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image"], ["image"], []], side=side)
    with VisPruner(keep=0.4)(built) as handle, torch.no_grad():
        pruned = built(**req.inputs, use_cache=False).logits
    dropped = dropped_columns(req, handle.report)
    mask = req.inputs["attention_mask"] * ~dropped
    three = positions_of(built, req.inputs)
    with torch.no_grad():
        full = built(**req.inputs).logits
        if is_recurrent(built):
            with exchanging(built, req.inputs, dropped, three[1:]) as text:
                expected = [
                    row[own != 0]
                    for row, own in zip(built(**text).logits, text["attention_mask"], strict=True)
                ]
        else:
            changed = {"attention_mask": mask, "position_ids": three}
            whole = built(**(req.inputs | changed)).logits
            expected = [row[own != 0] for row, own in zip(whole, mask, strict=True)]
    for row, stays in enumerate(expected):
        real = int((mask[row] != 0).sum())
        own = pruned[row, -real:] if side == "left" else pruned[row, :real]
        # Of recurrences each row's padding is another.
        assert (own - stays).abs().max() < tolerance(built)
        # The row without images is as it was.
        same = (full[row, mask[row] != 0] - stays).abs().max() < 3 * tolerance(built)
        assert same == (row == 2)


# Padding between columns changes what a recurrence holds, without a pruner too.
@pytest.mark.parametrize("name", [name for name in NAMES if not is_recurrent(MODELS[name])])
def test_a_row_may_have_nothing_new_in_a_turn(name: str) -> None:
    built = MODELS[name]
    # Items of one kind come row by row, which those of two turns do not.
    apart = not ZOO[name].one_placeholder
    first = ZOO[name].request(built, [["image"], ["video"]] if apart else [["video"], []])
    kind: Any = "image" if apart else "video"
    second = ZOO[name].request(built, [[kind], []], text=[4, 0], seed=9)
    # What the second row says is padding.
    second.inputs["attention_mask"][1] = 0
    words = torch.randint(WORDS, VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(2))
    whole = _joined(name, first, words[:, :0], second, words)
    ids = torch.cat((whole.inputs["input_ids"], words), dim=1)
    mask = torch.cat((whole.inputs["attention_mask"], torch.ones_like(words)), dim=1)
    dropped = []
    with torch.no_grad():
        with VisPruner(keep=0.4)(built) as handle:
            cache = cache_of(built(**first.inputs, use_cache=True))
            dropped.append(dropped_columns(first, handle.report))
            end = whole.inputs["input_ids"].shape[1]
            given = second.inputs | {"attention_mask": whole.inputs["attention_mask"]}
            cache = cache_of(built(**given, **{CACHE: cache}))
            dropped.append(dropped_columns(second, handle.report))
            logits = built(input_ids=words, attention_mask=mask, **{CACHE: cache}).logits
        gone = torch.cat((*dropped, torch.zeros_like(words, dtype=torch.bool)), dim=1)
        inputs = whole.inputs | {"input_ids": ids, "attention_mask": mask}
        inputs |= ZOO[name].aligned(ids)
        changed = {"attention_mask": mask * ~gone, "position_ids": positions_of(built, inputs)}
        expected = built(**(inputs | changed)).logits[:, end:]
    assert (logits - expected).abs().max() < tolerance(built)
