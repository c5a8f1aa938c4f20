"""Calls that are refused, before any work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import IMAGE, model, request
from vlmprune import PLPHP, Pruner, Recall, VisPruner, VlmpruneError
from vlmprune.methods import FastV

pytestmark = pytest.mark.oracle


REFUSED: dict[str, Any] = {
    "vlmprune does not support assisted decoding; leave out": {"prompt_lookup_num_tokens": 2},
    "use_mtp": {"use_mtp": True},
    "cache_params is called": {"cache_params": object()},
    "^inputs_embeds cannot be pruned, for they do not show where the images are; pass input_ids": {
        "input_ids": None,
        "inputs_embeds": torch.zeros(1, 4, 32),
    },
    "^attention_mask has 4 dimensions; vlmprune needs the plain": {
        "attention_mask": torch.ones(1, 1, 4, 4)
    },
    "^mm_encoder_outputs cannot be pruned": {"mm_encoder_outputs": {"image": object()}},
}


def test_images_that_were_encoded_before_are_refused() -> None:
    """Without pixels, too: they would go through whole."""
    built = model()
    inputs = request(built, [1]).inputs
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        given = {"mm_encoder_outputs": {"image": built.get_image_features(pixels)}}
    with VisPruner(keep=4)(built):
        for call in (built, built.generate):
            with pytest.raises(VlmpruneError, match=r"^mm_encoder_outputs cannot be pruned"):
                call(**inputs, **given)


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_come_before_any_work(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    req = request(built, [1])

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder ran")

    with VisPruner(keep=4)(built):
        monkeypatch.setattr(built.model.vision_tower, "forward", encode)
        with pytest.raises(VlmpruneError, match=words) as caught:
            built.generate(**(req.inputs | REFUSED[words]), max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pruner", [PLPHP(r=0.5), Recall(read=0.5), FastV(keep=4)])
def test_flex_attention_is_refused_inside_the_language_model(
    pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its masks cannot be read; before any work, and not with another attention."""
    built = model()
    req = request(built, [1])
    with pruner(built):
        built.generate(**req.inputs, max_new_tokens=2)
        built.config.get_text_config()._attn_implementation = "flex_attention"
        monkeypatch.setattr(
            built.model.vision_tower, "forward", lambda *_, **__: pytest.fail("the encoder ran")
        )
        with pytest.raises(VlmpruneError, match="does not work with flex_attention; load"):
            built.generate(**req.inputs, max_new_tokens=2)


def test_positions_of_three_axes_are_refused_where_a_model_has_one() -> None:
    built = model()
    req = request(built, [1])
    positions = torch.arange(req.inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with VisPruner(keep=4)(built), pytest.raises(VlmpruneError, match="have 3 dimensions, but a"):
        built(**req.inputs, position_ids=positions)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_gaps_are_refused_where_flash_attention_takes_them_for_borders(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model()
    one, two = (request(built, images).inputs for images in ([1], [1, 1]))
    said = f"leaves gaps that {kind} takes for packed sequences at batch 1; load"
    with VisPruner(keep=4, positions="original")(built):
        # The name alone is looked at: a CPU has no such attention.
        text = built.config.get_text_config()
        monkeypatch.setattr(text, "_attn_implementation", kind)
        with pytest.raises(VlmpruneError, match=said):
            built.generate(**one, max_new_tokens=1)
        with pytest.raises(VlmpruneError, match=said):
            built(**one)
        monkeypatch.undo()
        # Not with another attention, nor in a batch.
        built.generate(**one, max_new_tokens=1)
        built.generate(**two, max_new_tokens=1)


def test_ids_and_pixels_that_do_not_fit_are_refused() -> None:
    built = model()
    req = request(built, [2])
    with VisPruner(keep=4)(built):
        cut = {k: req.inputs[k][:, :-12] for k in ("input_ids", "attention_mask")}
        with pytest.raises(VlmpruneError, match="placeholders"):
            built.generate(**(req.inputs | cut), max_new_tokens=2)
        text = {k: req.inputs[k][:, -4:] for k in ("input_ids", "attention_mask")}
        with pytest.raises(VlmpruneError, match="without image placeholders"):
            built.generate(**(req.inputs | text), max_new_tokens=2)


def test_a_mask_that_hides_placeholders_is_refused() -> None:
    built = model()
    req = request(built, [1, 1])
    mask = req.inputs["attention_mask"].clone()
    mask[0, (req.inputs["input_ids"][0] == IMAGE).nonzero()[3, 0]] = 0
    with (
        pytest.raises(VlmpruneError, match="attention_mask hides image placeholders"),
        VisPruner(keep=4)(built),
    ):
        built.generate(**(req.inputs | {"attention_mask": mask}), max_new_tokens=1)
