"""Models of which nothing is known but their placeholders, under methods inside the language model.

Hybrids and three positions a token among them, whose records are put aside for that; what cannot be
followed is told at attach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

from answers import DIFFERENT, TOLERANCE, distance, generate
from counted_cases import CASES, HYBRID, built, request
from masked import kept_columns, masking
from step_masks import exchanged, masking_steps, masks_of
from stock import cache_of
from vlmprune import PLPHP, FastV, Recall, VisPruner, VlmpruneError
from vlmprune.runtime.family import family_of
from zoo.base import IMAGE, TEXT, VISION, VOCABULARY, WORDS, loud

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("without_records")]

every = pytest.mark.parametrize("name", CASES)
batches = pytest.mark.parametrize("rows", [[1], [2, 1]])


@every
@batches
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recall_equals_masking_step_by_step(name: str, rows: list[int], attention: str) -> None:
    model = built(name, attention)
    inputs = request(name, model, rows)
    bare = generate(model, inputs)
    with Recall(read=0.3, floor=0, rest="none", watch="tokens")(model) as handle:
        found = generate(model, inputs)
    assert handle.attachment.family.counted
    visual = inputs["input_ids"] == IMAGE
    masks = masks_of(handle.report.reading, visual, cache_of(found))
    with masking_steps(model, masks):
        expected = generate(model, inputs)
    assert torch.equal(found.logits[0], bare.logits[0])
    assert distance(found, expected) < TOLERANCE
    with masking_steps(model, exchanged(masks, visual)):
        assert distance(found, generate(model, inputs)) > DIFFERENT


@every
@batches
def test_cut_caches_equal_masking(name: str, rows: list[int]) -> None:
    model = built(name)
    inputs = request(name, model, rows)
    bare = generate(model, inputs)
    with PLPHP(alpha=1.0, beta=0.0, per_head="adaptive")(model) as handle:
        found = generate(model, inputs)
    with masking(model, kept_columns(handle.report, inputs["input_ids"], IMAGE)):
        expected = generate(model, inputs)
    assert torch.equal(found.logits[0], bare.logits[0])
    assert distance(found, expected) < TOLERANCE < DIFFERENT < distance(found, bare)


@every
@pytest.mark.parametrize("pruner", [Recall(read=1.0), PLPHP(r=1.0, dr=0.0)], ids=repr)
def test_keeping_everything_changes_no_bit(name: str, pruner: Any) -> None:
    model = built(name)
    inputs = request(name, model, [2, 1])
    bare = generate(model, inputs)
    with pruner(model):
        found = generate(model, inputs)
        with torch.no_grad():
            plain = model(**inputs).logits
    assert all(torch.equal(a, b) for a, b in zip(found.logits, bare.logits, strict=True))
    with torch.no_grad():
        assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("name", ["glm4v", "got_ocr2"])
def test_rows_leave_between_layers(name: str) -> None:
    """The same cache columns are left as in a run whose later layers mask what left."""
    model = built(name)
    inputs = request(name, model, [1])
    whole = generate(model, inputs)
    for keep in (0.4, 1.0):
        with FastV(keep=keep, layer=2)(model) as handle:
            found = generate(model, inputs)
        if keep == 1.0:
            assert distance(found, whole) < TOLERANCE
            continue
        seen = inputs["input_ids"] != IMAGE
        seen[0, (inputs["input_ids"][0] == IMAGE).nonzero()[handle.report.kept[0], 0]] = True
        assert distance(found, whole) > DIFFERENT
        with always_masking(model, seen[0], 2):
            assert distance(found, generate(model, inputs)) < TOLERANCE


@contextmanager
def always_masking(model: Any, seen: Tensor, layer: int) -> Iterator[None]:
    """Hide columns [L] from all queries of one row in the layers from one on."""
    total = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal total
        total += (args[0] if args else kwargs["hidden_states"]).shape[1]

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        new = (args[0] if args else kwargs["hidden_states"]).shape[1]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        mask[:, : len(seen)] &= seen
        least = torch.finfo(torch.float32).min
        kwargs["attention_mask"] = torch.zeros(1, 1, new, total).masked_fill(~mask, least)
        return args, kwargs

    layers = model.get_decoder().layers
    hooks = [layers[0].register_forward_pre_hook(count, with_kwargs=True)]
    hooks += [one.register_forward_pre_hook(hide, with_kwargs=True) for one in layers[layer:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_later_turns_go_on() -> None:
    model = built("qwen3_5")
    inputs = request("qwen3_5", model, [1])
    with Recall(read=1.0)(model):
        pruned = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    bare = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(pruned, bare)


def test_methods_that_need_more_say_what_is_missing() -> None:
    model = built("qwen3_5")
    with pytest.raises(VlmpruneError, match="its visual tokens have three positions each"):
        VisPruner(keep=4).attach(model)
    with pytest.raises(VlmpruneError, match="linear attention, whose state every token"):
        FastV(keep=4, layer=1).attach(model)
    assert family_of(model, PLPHP()).counted


def llava_with(text: Any) -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=28, patch_size=7)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return loud(LlavaForConditionalGeneration(config))


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "sinks": (
        lambda: GptOssConfig(
            **TEXT | {"head_dim": 8},
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 3,
        ),
        PLPHP(),
        "attention sinks",
    ),
    "shared keys and values": (
        lambda: Gemma3nTextConfig(
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            intermediate_size=[64] * 3,
            head_dim=8,
            num_kv_shared_layers=1,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            activation_sparsity_pattern=[0.0] * 3,
        ),
        Recall(),
        "some sharing keys and values",
    ),
    "tokens left out where keys are borrowed": (
        lambda: Gemma4TextConfig(
            **TEXT,
            head_dim=8,
            global_head_dim=8,
            num_kv_shared_layers=1,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            hidden_size_per_layer_input=0,
        ),
        FastV(keep=0.4, layer=1),
        "decoder layer 2 of .* attends to an earlier layer's keys and values",
    ),
    "inputs of each token": (
        lambda: Gemma4TextConfig(
            **TEXT, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY
        ),
        FastV(keep=0.4, layer=1),
        "takes per_layer_input of each token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_decoder_cannot_is_told_at_attach(name: str) -> None:
    make, pruner, match = REFUSED[name]
    with pytest.raises(VlmpruneError, match=match):
        pruner.attach(llava_with(make()))


@torch.no_grad()
def test_a_mixture_of_experts_behind_a_known_tower_runs() -> None:
    """Its config has no width of a plain feed-forward, which the figures alone would need."""
    text = Qwen3_5MoeTextConfig(
        **{k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_hidden_layers")},
        **HYBRID,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = llava_with(text)
    ids = torch.tensor([[1, *[IMAGE] * 16, WORDS, WORDS + 1]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    with VisPruner(keep=4)(model) as handle:
        logits = model(**inputs).logits
    assert logits.shape[1] == 4 + 3
    assert 0 < handle.report.decoder_flops_after < handle.report.decoder_flops_before
