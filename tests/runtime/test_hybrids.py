"""Decoders with recurrent layers: tokens that are left out never enter a recurrence.

So the reference is a prompt without them, not one that masks them: to 1e-9 in float64, and in
float32 within three times what padding alone changes of the model that is not pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    JambaConfig,
    Lfm2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    NemotronHConfig,
    Qwen3_5TextConfig,
)

import masked
from answers import DIFFERENT, TOLERANCE, distance, generate
from counted_cases import HYBRID, ROPE
from rows_alone import apart, exchanged, in_double, kept_columns, padding_apart, shortened
from step_masks import masking_steps, masks_of
from stock import cache_of
from vlmprune import PLPHP, FastV, RandomTokens, Recall, UniformGrid, VisPruner, VlmpruneError
from vlmprune.hosts import families
from vlmprune.hosts.config import layer_kinds
from zoo import ZOO
from zoo.base import IMAGE, TEXT, VISION, WORDS, loud, pad

pytestmark = pytest.mark.oracle

MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4}
DEPTH = {**TEXT, "num_hidden_layers": 4}

DECODERS: dict[str, Callable[[], Any]] = {
    "gated delta rule": lambda: Qwen3_5TextConfig(
        **{**DEPTH, **HYBRID}, rope_parameters=ROPE | {"partial_rotary_factor": 1.0}
    ),
    "convolution": lambda: Lfm2Config(
        **DEPTH, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False
    ),
    "mamba": lambda: JambaConfig(
        **DEPTH,
        **MAMBA,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
    ),
    "mamba 2": lambda: NemotronHConfig(
        **{k: v for k, v in DEPTH.items() if k != "num_hidden_layers"},
        hybrid_override_pattern="M*M*",
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
}
SIDE, PATCH = 28, 7


def kinds(make: Callable[[], Any]) -> list[str]:
    return list(layer_kinds(LlavaConfig(text_config=make())))


# Releases that call a layer of these otherwise are not asked about it.
HERE = [name for name, make in DECODERS.items() if kinds(make)[1::2] == ["full_attention"] * 2]
every = pytest.mark.parametrize("name", HERE)


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH)
    text = DECODERS[name]()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return loud(LlavaForConditionalGeneration(config)).to(dtype)


def request(rows: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rows of so many images each, padded at the left."""
    generator = torch.Generator().manual_seed(1)
    patches = (SIDE // PATCH) ** 2
    prompts = [
        [1, *([WORDS + r, *[IMAGE] * patches] * count), *range(WORDS + 5, WORDS + 9 + 3 * r)]
        for r, count in enumerate(rows)
    ]
    ids, mask = pad(prompts, "left")
    pixels = torch.randn(sum(rows), 3, SIDE, SIDE, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def test_all_are_asked_about_on_late_releases() -> None:
    assert len(HERE) == len(DECODERS) or Version(transformers.__version__) < Version("5.24")


@every
@pytest.mark.parametrize("make", [VisPruner, RandomTokens], ids=lambda make: make.__name__)
def test_pruned_equals_shortened_in_double(name: str, make: Any) -> None:
    model, inputs = built(name, torch.float64), request([2, 1], torch.float64)
    ids, logits = inputs["input_ids"], list[Tensor]()
    with in_double(model):
        # What `generate` returns of them is rounded to float32.
        head = model.lm_head.register_forward_hook(lambda *given: logits.append(given[-1][:, -1]))
        with make(keep=0.4)(model) as handle:
            found = generate(model, inputs)
        head.remove()
        kept = kept_columns(handle.report, ids)
        expected = shortened(model, inputs, kept, found.sequences)
        others = shortened(model, inputs, exchanged(kept, ids), found.sequences)
    assert expected[0].dtype == torch.float64
    assert apart(logits, expected) < 1e-9
    assert apart(logits, others) > DIFFERENT


@every
def test_in_single_it_is_as_near_as_padding_leaves_the_model(name: str) -> None:
    model, inputs = built(name), request([2, 1])
    padding = padding_apart(model, inputs, generate(model, inputs))
    with RandomTokens(keep=0.4)(model) as handle:
        found = generate(model, inputs)
    kept = kept_columns(handle.report, inputs["input_ids"])
    expected = shortened(model, inputs, kept, found.sequences)
    assert apart(found.logits, expected) < 3 * padding < 1e-4


@every
def test_masking_is_no_reference_of_a_recurrence(name: str) -> None:
    """What is only masked in the attention passed through the recurrent layers."""
    model, inputs = built(name), request([1])
    with RandomTokens(keep=0.4)(model) as handle:
        found = generate(model, inputs)
    kept = kept_columns(handle.report, inputs["input_ids"])
    heads = model.config.get_text_config().num_key_value_heads
    seen = {layer: kept[:, None].repeat(1, heads, 1) for layer in range(4)}
    with masked.masking(model, seen):
        assert distance(found, generate(model, inputs)) > DIFFERENT


@every
def test_caches_of_layers_that_attend_alone_are_cut(name: str) -> None:
    model, inputs = built(name), request([2, 1])
    bare = generate(model, inputs)
    with PLPHP(alpha=1.0, beta=0.0, per_head="adaptive")(model) as handle:
        found = generate(model, inputs)
    assert [one.index for one in handle.report.layers] == [1, 3]
    with masked.masking(model, masked.kept_columns(handle.report, inputs["input_ids"], IMAGE)):
        expected = generate(model, inputs)
    assert distance(found, expected) < TOLERANCE < DIFFERENT < distance(found, bare)


@every
def test_layers_that_attend_alone_are_read_in_part(name: str) -> None:
    model, inputs = built(name), request([2, 1])
    bare = generate(model, inputs)
    with Recall(read=0.3, floor=0, rest="none", watch="tokens")(model) as handle:
        found = generate(model, inputs)
    assert {layer for step in handle.report.reading.steps for layer in step.index} == {1, 3}
    masks = masks_of(handle.report.reading, inputs["input_ids"] == IMAGE, cache_of(found))
    with masking_steps(model, masks):
        assert distance(found, generate(model, inputs)) < TOLERANCE
    assert distance(found, bare) > DIFFERENT


@every
def test_rows_do_not_leave_between_layers(name: str) -> None:
    with pytest.raises(VlmpruneError, match="prune before the language model"):
        FastV(keep=4, layer=1).attach(built(name))


@every
def test_the_generic_path_agrees_with_the_record(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    text = DECODERS[name]()
    config = ZOO["internvl"].make().config.to_dict() | {"text_config": text}
    model = loud(InternVLForConditionalGeneration(InternVLConfig(**config)))
    inputs = ZOO["internvl"].request(model, [["image", "image"], ["image"]]).inputs
    with UniformGrid(keep=4)(model) as handle:
        recorded = generate(model, inputs)
    assert handle.attachment.family is families.FAMILIES["internvl"]
    kept = kept_columns(handle.report, inputs["input_ids"])
    monkeypatch.delitem(families._records, "internvl")
    with UniformGrid(keep=4)(model) as handle:
        found = generate(model, inputs)
    assert handle.attachment.family.note == "in no record; its layout was measured at attach"
    assert torch.equal(kept_columns(handle.report, inputs["input_ids"]), kept)
    assert distance(found, recorded) < TOLERANCE
    expected = shortened(model, inputs, kept, found.sequences)
    padding = padding_apart(model, inputs, generate(model, inputs))
    assert apart(found.logits, expected) < TOLERANCE + 3 * padding < 1e-4
    others = shortened(model, inputs, exchanged(kept, inputs["input_ids"]), found.sequences)
    assert apart(found.logits, others) > DIFFERENT
