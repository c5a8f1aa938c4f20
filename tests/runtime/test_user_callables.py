"""What `generate` calls of the user's sees the prompt as given, and may run the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
)

from answers import same
from stock import CACHE, cache_of
from vlmprune import DART, FastV, VisPruner
from zoo import ZOO

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
STEPS = 4
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False}


def build(family: str, rows: Any = None) -> tuple[Any, dict[str, Any]]:
    model = ZOO[family].build()
    rows = rows or [["image"], ["image", "image"]]
    return model, dict(ZOO[family].request(model, rows).inputs)


class Watch:
    """A processor, criterion, prefix function and streamer that notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Any) -> Any:
        self.seen.append(ids.clone())
        return scores

    def stop(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(ids.clone())
        return torch.zeros(len(ids), dtype=torch.bool)

    def allow(self, row: int, ids: Tensor) -> list[int]:
        self.seen.append(ids.clone()[None])
        return list(range(128))

    def check(self, prompt: Tensor, first: int, calls: int) -> None:
        assert len(self.seen) == calls
        for number, ids in enumerate(self.seen):
            rows = prompt.repeat_interleave(max(1, len(ids) // len(prompt)), 0)
            if len(ids) < len(prompt):
                rows = prompt[number % len(prompt)][None]
            assert torch.equal(ids[:, : prompt.shape[1]], rows)
            assert ids.shape[1] >= prompt.shape[1] + first


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_sees_the_whole_prompt(family: str, beams: int) -> None:
    model, inputs = build(family)
    prompt = inputs["input_ids"]
    with VisPruner(keep=2)(model):
        due = model.generate(**inputs, **OPTIONS, num_beams=beams)
        for what, first in (("logits_processor", 0), ("stopping_criteria", 1)):
            watch = Watch()
            one = watch if what == "logits_processor" else watch.stop
            cls = LogitsProcessorList if what == "logits_processor" else StoppingCriteriaList
            found = model.generate(**inputs, **OPTIONS, num_beams=beams, **{what: cls([one])})
            assert torch.equal(found, due)
            watch.check(prompt, first, STEPS)
        watch = Watch()
        found = model.generate(
            **inputs, **OPTIONS, num_beams=beams, prefix_allowed_tokens_fn=watch.allow
        )
        assert torch.equal(found, due)
        assert {len(ids[0]) for ids in watch.seen} == {prompt.shape[1] + n for n in range(STEPS)}
        for ids in watch.seen:
            assert any(torch.equal(ids[0, : len(row)], row) for row in prompt)


def test_a_later_turn_shows_the_whole_conversation() -> None:
    model, inputs = build("llava", [["image"]])
    with VisPruner(keep=2)(model):
        held = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
        more = torch.cat((held.sequences, torch.tensor([[70, 71, 72]])), dim=1)
        watch = Watch()
        more_given = {CACHE: cache_of(held), "logits_processor": LogitsProcessorList([watch])}
        model.generate(more, **OPTIONS, **more_given)
    watch.check(more, 0, STEPS)


@pytest.mark.parametrize("limit", ["max_length", "criterion"])
def test_lengths_count_the_whole_prompt(limit: str) -> None:
    """The user's own limits, and those of processors that take the place of the host's."""
    model, inputs = build("llava", [["image"]])
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30}
    if limit == "max_length":
        options = {"do_sample": False, "max_length": length + 3}
    else:
        options["stopping_criteria"] = StoppingCriteriaList([MaxLengthCriteria(length + 3)])
    with VisPruner(keep=2)(model):
        assert model.generate(**inputs, **options).shape[1] == length + 3


def test_a_processor_of_the_users_takes_the_place_of_the_hosts() -> None:
    """As without a pruner: what stands in the user's list replaces the host's of its kind."""
    model, inputs = build("llava", [["image"]])
    length = inputs["input_ids"].shape[1]
    with VisPruner(keep=2)(model):
        first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
        model.generation_config.eos_token_id = first
        options = {"max_new_tokens": 6, "do_sample": False}
        assert model.generate(**inputs, **options).shape[1] == length + 1
        own = MinLengthLogitsProcessor(length + 3, first, device="cpu")
        found = model.generate(
            **inputs, **options, min_length=1, logits_processor=LogitsProcessorList([own])
        )
    assert found.shape[1] > length + 3
    assert first not in found[0, length : length + 3]


def test_repeated_words_of_the_prompt_count_where_the_image_parted_them() -> None:
    """An n-gram is that of the whole prompt, not one that pruning made."""
    model, inputs = build("llava", [["image"]])
    watch = NoRepeatNGramLogitsProcessor(2)
    seen: list[Tensor] = []

    class Noted(NoRepeatNGramLogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return watch(input_ids, scores)

    with VisPruner(keep=2)(model):
        model.generate(**inputs, **OPTIONS, no_repeat_ngram_size=2)
        model.generate(**inputs, **OPTIONS, logits_processor=LogitsProcessorList([Noted(2)]))
    assert all(ids.shape[1] >= inputs["input_ids"].shape[1] for ids in seen)


# Of the families with three positions a column the bare model itself fails under guidance.
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "gemma3"])
def test_guidance_by_a_second_prompt(family: str, negative: bool) -> None:
    """Keeping all, the bare model's answer to the bit; pruned, that of both prompts by hand."""
    model, inputs = build(family, [["image"]])
    options: dict[str, Any] = {**OPTIONS, "guidance_scale": 1.7, "output_scores": True}
    options["return_dict_in_generate"] = True
    other = torch.tensor([[70, 71, 72, 73]])
    if negative:
        options["negative_prompt_ids"] = other
    bare = model.generate(**inputs, **options)
    with VisPruner(keep=1.0)(model):
        whole = model.generate(**inputs, **options)
    assert torch.equal(whole.sequences, bare.sequences)
    assert all(torch.equal(a, b) for a, b in zip(whole.scores, bare.scores, strict=True))

    with VisPruner(keep=2)(model):
        short = model.generate(**inputs, **options)
        alone = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    with torch.no_grad():
        text = model(other if negative else inputs["input_ids"][:, -1:]).logits[:, -1]
    pruned = torch.log_softmax(alone.logits[0], -1)
    plain = torch.log_softmax(text, -1)
    assert same(short.scores[0], 1.7 * (pruned - plain) + plain)
    assert not same(short.scores[0], bare.scores[0])


@pytest.mark.parametrize(
    "pruner", [FastV(keep=2, layer=1), DART(keep=2, layer=1), VisPruner(keep=2)]
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_forward_on_text_in_the_middle_is_one_of_its_own(pruner: Any, cached: bool) -> None:
    model, inputs = build("llava", [["image"]])
    text = torch.tensor([[70, 71, 72, 73]])
    with torch.no_grad():
        due = model(text).logits
    seen: list[Tensor] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            seen.append(model(text, use_cache=cached).logits)
        return scores

    with pruner(model) as handle:
        plain = model.generate(**inputs, **OPTIONS)
        kept = handle.report
        found = model.generate(**inputs, **OPTIONS, logits_processor=LogitsProcessorList([look]))
        assert handle.report.visual_tokens_after == kept.visual_tokens_after
    assert torch.equal(found, plain)
    assert len(seen) == STEPS
    assert all(torch.equal(one, due) for one in seen)
