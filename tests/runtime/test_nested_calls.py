"""Calls of the model in the middle of a `generate`: each has its own picture, cache and report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from answers import same
from stock import CACHE, cache_of
from vlmprune import PLPHP, FastV, Recall, VisPruner
from zoo import ZOO

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]
RECALL = Recall(read=2, floor=0, always=True)
PRUNERS = [VisPruner(keep=2), PLPHP(r=0.3), FastV(keep=2, layer=1), RECALL]
STEPS = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


def build(family: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model, a request, and one of other pixels and other text."""
    model = ZOO[family].build()
    one = ZOO[family].request(model, [["image"]]).inputs
    other = ZOO[family].request(model, [["image", "image"]], text=7, seed=3).inputs
    return model, dict(one), dict(other)


def noised(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompt with another picture, as contrastive decoding asks for."""
    generator = torch.Generator().manual_seed(9)
    pixels = inputs["pixel_values"]
    noise = torch.randn(pixels.shape, generator=generator)
    return {**inputs, "pixel_values": pixels + noise}


class Looking:
    """Runs something at each step, as a processor, a criterion or a streamer."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, list[Any]()

    def __call__(self, ids: Tensor, scores: Any) -> Any:
        with torch.no_grad():
            self.seen.append(self.look())
        return scores

    def stop(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self(ids, scores)
        return torch.zeros(len(ids), dtype=torch.bool)

    def put(self, value: Any) -> None:
        self(value, None)

    def end(self) -> None:
        pass

    def as_(self, way: str) -> dict[str, Any]:
        if way == "streamer":
            return {way: self}
        if way == "stopping_criteria":
            return {way: StoppingCriteriaList([self.stop])}
        return {way: LogitsProcessorList([self])}


@pytest.mark.parametrize("way", ["logits_processor", "stopping_criteria", "streamer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_of_ones_own(family: str, way: str) -> None:
    """With the same prompt and another picture, and with another prompt; outer and inner right."""
    model, inputs, other = build(family)
    pruner = VisPruner(keep=2)
    for second in (noised(inputs), other):
        with pruner(model) as handle, torch.no_grad():
            due, plain = model(**second).logits, model.generate(**inputs, **OPTIONS)
            shown = handle.report.kept
            looking = Looking(lambda second=second: model(**second).logits)
            found = model.generate(**inputs, **OPTIONS, **looking.as_(way))
            assert all(torch.equal(a, b) for a, b in zip(handle.report.kept, shown, strict=True))
        assert torch.equal(found, plain)
        assert len(looking.seen) >= STEPS
        assert all(same(one, due) for one in looking.seen)


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_a_generate_within_a_generate(family: str, pruner: Any) -> None:
    """A second look; and one without a cache, where nothing but the call tells forwards apart."""
    model, inputs, other = build(family)
    for cached in (True, False):
        options = {**OPTIONS, "use_cache": cached}
        if not cached and pruner.cuts:
            continue
        with pruner(model):
            due, plain = model.generate(**other, **options), model.generate(**inputs, **options)
            looking = Looking(lambda options=options: model.generate(**other, **options))
            found = model.generate(**inputs, **options, **looking.as_("logits_processor"))
        assert torch.equal(found, plain)
        assert all(torch.equal(one, due) for one in looking.seen)


def test_a_cache_of_ones_own_goes_on_from_step_to_step() -> None:
    """Contrastive decoding keeps a second cache, pruned as well, for the noised picture."""
    model, inputs, _ = build("llava")
    second = noised(inputs)

    def contrast(pruned: bool) -> Tensor:
        held: dict[str, Any] = {}

        def look(ids: Tensor, scores: Tensor) -> Tensor:
            with torch.no_grad():
                if not held:
                    out = model(**second, use_cache=True)
                else:
                    ones = torch.ones_like(ids)
                    out = model(ids[:, -1:], attention_mask=ones, **held, use_cache=True)
            held[CACHE] = cache_of(out)
            return 2 * scores - out.logits[:, -1]

        return model.generate(**inputs, **OPTIONS, logits_processor=LogitsProcessorList([look]))

    bare = contrast(False)
    with VisPruner(keep=1.0)(model):
        assert torch.equal(contrast(True), bare)
    with VisPruner(keep=2)(model):
        found = contrast(True)
        first = model(**inputs).logits[:, -1] * 2 - model(**second).logits[:, -1]
    assert int(found[0, inputs["input_ids"].shape[1]]) == int(first.argmax())


PLACES: dict[str, Any] = {
    "tower": lambda m: m.model.vision_tower,
    "projector": lambda m: m.model.multi_modal_projector,
    "embedding": lambda m: m.get_input_embeddings(),
    "decoder": lambda m: m.model.language_model,
    "layer": lambda m: m.model.language_model.layers[1],
    "attention": lambda m: m.model.language_model.layers[2].self_attn,
    "head": lambda m: m.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda one: type(one).__name__)
def test_a_call_from_within_a_module_is_one_of_its_own(pruner: Any, place: str) -> None:
    """A hook of the user's may run the model while it runs, wherever it hangs."""
    model, inputs, other = build("llava")
    seen: list[Tensor] = []
    with pruner(model) as handle:
        due, plain = model.generate(**other, **OPTIONS), model.generate(**inputs, **OPTIONS)
        kept = handle.report
        busy: list[int] = []

        def hook(*_: Any) -> None:
            if not busy:
                busy.append(1)
                seen.append(model.generate(**other, **OPTIONS))

        hooked = PLACES[place](model).register_forward_pre_hook(hook)
        found = model.generate(**inputs, **OPTIONS)
        hooked.remove()
        assert all(torch.equal(a, b) for a, b in zip(handle.report.kept, kept.kept, strict=True))
    assert torch.equal(found, plain)
    assert len(seen) == 1
    assert torch.equal(seen[0], due)
