"""GLM-V: images and videos have one placeholder, and a token is one square of patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from answers import DIFFERENT, TOLERANCE, distance, generate
from hidden import hiding
from qwen_oracle import MODELS, positions_of
from stock import CACHE, cache_of
from vlmprune import FastV, Recall, VisPruner, VlmpruneError
from vlmprune.hosts.families import FAMILIES
from zoo import ZOO
from zoo.base import IMAGE
from zoo.glm4v import VIDEO_END, VIDEO_START
from zoo_oracle import dropped_columns, masked, others

pytestmark = pytest.mark.oracle

NAMES = [name for name in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr") if name in ZOO]


@pytest.fixture(autouse=True)
def _forget() -> None:
    for name in NAMES:
        if name in MODELS:
            MODELS[name].model.rope_deltas = None


def both(name: str) -> dict[str, Any]:
    """A prompt with an image and a video."""
    built = MODELS[name]
    image, video = (ZOO[name].request(built, [[kind]]).inputs for kind in ("image", "video"))
    joined = {k: torch.cat((image[k], video[k]), 1) for k in image.keys() & video.keys()}
    return image | video | joined


def test_images_and_videos_in_one_call_are_refused_and_the_host_fails() -> None:
    built, inputs = MODELS["glm4v"], both("glm4v")
    sentence = (
        "Glm4vForConditionalGeneration has one placeholder for images and videos, so that a call "
        "can bring either"
    )
    with VisPruner(keep=0.4)(built), pytest.raises(VlmpruneError, match=sentence):
        generate(built, inputs)
    with Recall(read=0.4)(built), pytest.raises(VlmpruneError, match=sentence):
        built(**inputs)
    with pytest.raises(ValueError, match="do not match"):
        generate(built, inputs)


@pytest.mark.parametrize("kinds", [("image", "video"), ("video", "image")])
def test_a_video_after_an_image_equals_masking(kinds: Any) -> None:
    """In a later turn; the reference is the host with a cache of its own, masked."""
    name = "glm4v"
    built = MODELS[name]
    first, second = (ZOO[name].request(built, [[kind]], seed=n) for n, kind in enumerate(kinds))
    media = {k for k in second.inputs if "pixel" in k or "grid" in k}

    def whole(name: str) -> torch.Tensor:
        return torch.cat((first.inputs[name], second.inputs[name]), dim=1)

    given = {"input_ids": whole("input_ids"), "attention_mask": whole("attention_mask")}
    given |= ZOO[name].aligned(given["input_ids"])
    with VisPruner(keep=0.4)(built) as handle, torch.no_grad():
        cache = cache_of(built(**first.inputs, use_cache=True))
        dropped = [dropped_columns(first, handle.report)]
        later = {k: v for k, v in second.inputs.items() if k in media}
        pruned = generate(built, given | later, **{CACHE: cache})
        dropped.append(dropped_columns(second, handle.report))

    def reference(dropped: list[torch.Tensor]) -> torch.Tensor:
        masks = [1 - one.long() for one in dropped]
        places = [positions_of(built, one.inputs) for one in (first, second)]
        places[1] = places[1] + places[0][..., -1:] + 1
        with torch.no_grad():
            before = built(
                **first.inputs
                | {"attention_mask": masks[0], "position_ids": places[0], "use_cache": True}
            )
            after = built(
                **second.inputs
                | {"attention_mask": torch.cat(masks, 1), "position_ids": places[1]},
                **{CACHE: cache_of(before)},
            )
        return after.logits[:, -1]

    assert (pruned.logits[0] - reference(dropped)).abs().max() < TOLERANCE
    whole_first = [torch.zeros_like(dropped[0]), dropped[1]]
    assert (pruned.logits[0] - reference(whole_first)).abs().max() > DIFFERENT


@pytest.mark.parametrize("kind", ["image", "video"])
def test_stored_images_and_videos_are_told_apart(kind: Any) -> None:
    built = MODELS["glm4v"]
    req = ZOO["glm4v"].request(built, [[kind]])
    without = {k: v for k, v in req.inputs.items() if "pixel" not in k}
    other = ZOO["glm4v"].request(built, [["video" if kind == "image" else "image"]])
    with VisPruner(keep=0.4)(built) as handle:
        expected = generate(built, req.inputs)
        vision = handle.encode(**req.inputs)
        assert distance(generate(built, without | {"vision": vision}), expected) == 0
        joined = vision + handle.encode(**other.inputs)
        with pytest.raises(VlmpruneError, match="one placeholder for images and videos"):
            generate(built, without | {"vision": joined})


@pytest.mark.parametrize("name", NAMES)
def test_frames_keep_their_times(name: str) -> None:
    """What stands between a video's frames stays, however few patches of a frame do."""
    built = ZOO[name].build()
    req = ZOO[name].request(built, [["video"]])
    ids = req.inputs["input_ids"]
    with VisPruner(keep=0.2)(built) as handle:
        pruned = generate(built, req.inputs)
    stays = ids[0, ~dropped_columns(req, handle.report)[0]]
    assert stays[stays != IMAGE].tolist() == ids[0, ids[0] != IMAGE].tolist()
    assert {VIDEO_START, VIDEO_END} <= {*stays.tolist()}
    (layout,) = handle.report.layouts
    assert layout.kind == "video" and layout.crops == int(req.inputs["video_grid_thw"][0, 0])
    dropped = dropped_columns(req, handle.report)
    assert distance(pruned, masked(built, req, dropped, "original")) < TOLERANCE
    control = dropped_columns(req, handle.report, others(handle.report))
    assert distance(pruned, masked(built, req, control, "original")) > DIFFERENT


@pytest.mark.parametrize("name", NAMES)
def test_a_square_of_patches_makes_a_token(name: str) -> None:
    """Turning one square's pixels moves the features of its cell most, and its token alone scores.

    The tower's blocks mix patches, so they are made to hand on what they are given.
    """
    built = ZOO[name].build()
    req = ZOO[name].request(built, [["image"]])
    medium = FAMILIES[name].media[0]
    hooks = [
        block.register_forward_hook(lambda _, args, __: args[0])
        for block in built.model.visual.blocks
    ]
    (layout,) = medium.layouts(built, req.inputs, torch.zeros(1, 0) > 0)

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = built.model.get_image_features(pixels, req.inputs["image_grid_thw"])
        return torch.cat(medium.split(made, [layout]))

    plain = req.inputs["pixel_values"]
    before = tokens(plain)
    for cell in range(layout.patches):
        turned = plain.clone()
        turned[4 * cell : 4 * cell + 4] *= -1
        moved = (tokens(turned) - before).abs().amax(dim=1) > 1e-6
        assert moved.nonzero()[:, 0].tolist() == (layout.labels == cell).nonzero()[:, 0].tolist()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_chained_with_a_method_inside_the_language_model(name: str) -> None:
    """Tokens leave before the language model, and more of them inside it."""
    built = ZOO[name].build()
    req = ZOO[name].request(built, [["image", "image"], ["image"]])
    with (VisPruner(keep=0.7) | FastV(keep=0.4, layer=1))(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    with VisPruner(keep=0.7)(built) as alone:
        generate(built, req.inputs, max_new_tokens=1)
    before = dropped_columns(req, alone.report)
    inside = {one.index: dropped_columns(req, report, one.kept) for one in report.layers}
    assert sorted(inside) == [1, 2] and int(inside[1].sum()) > int(before.sum()) > 0
    with hiding(built, inside):
        expected = masked(built, req, before, "original")
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, masked(built, req, before, "original")) > DIFFERENT
