"""Images and videos in one prompt: budgets of frames, later turns, beams, and what is refused."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from answers import TOLERANCE, distance, generate
from stock import CACHE, repeats_rows
from vlmprune import VisPruner, VlmpruneError
from zoo import ZOO
from zoo.base import IMAGE, VIDEO, Request
from zoo.crops import FRAMES
from zoo_oracle import dropped_columns, masked

pytestmark = pytest.mark.oracle

VIDEOS = ["llava_onevision", "llava_next_video", "video_llava"]
BUILT = {name: ZOO[name].build() for name in [*VIDEOS, "pixtral", "mistral3"]}


@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_images_in_one_call_are_scored_as_each_alone(name: str) -> None:
    built = BUILT[name]
    req = ZOO[name].request(built, [["image"], ["image"], ["image"]])
    with VisPruner(keep=3, important_ratio=1.0)(built) as handle:
        generate(built, req.inputs)
        together = handle.report
        assert together is not None and together.layouts[0].patches != together.layouts[1].patches
        for row in range(3):
            mask = req.inputs["attention_mask"][row].bool()
            height, width = req.inputs["image_sizes"][row].tolist()
            single = {
                "input_ids": req.inputs["input_ids"][row : row + 1, mask],
                "attention_mask": mask[None, mask].long(),
                "pixel_values": req.inputs["pixel_values"][row : row + 1, :, :height, :width],
                "image_sizes": req.inputs["image_sizes"][row : row + 1],
            }
            generate(built, single)
            assert handle.report is not None
            assert torch.equal(handle.report.kept[0], together.kept[row])


@pytest.mark.parametrize("name", VIDEOS)
def test_a_budget_counts_for_each_frame_or_for_the_clip(name: str) -> None:
    built = BUILT[name]
    req = ZOO[name].request(built, [["video"], ["image", "video"]])
    kept = {}
    for budget in ("crop", "frame", "image", "clip"):
        keep = 3 if budget in ("crop", "frame") else 7
        with VisPruner(keep=keep, budget=budget)(built) as handle:
            generate(built, req.inputs, max_new_tokens=1)
        assert handle.report is not None
        kept[budget] = handle.report.kept
        for one, tokens in zip(handle.report.layouts, handle.report.kept, strict=True):
            frames = one.crop[tokens][one.crop[tokens] >= 0]
            if one.kind == "video" and keep == 3:
                assert torch.bincount(frames, minlength=one.crops).tolist() == [3] * FRAMES
            elif keep == 7:
                assert len(frames) == 7
    for one, same in (("crop", "frame"), ("image", "clip")):
        assert all(torch.equal(a, b) for a, b in zip(kept[one], kept[same], strict=True))
    assert not torch.equal(kept["frame"][0], kept["clip"][0])


def test_budgets_of_videos_need_a_video() -> None:
    name = "llava_onevision"
    req = ZOO[name].request(BUILT[name], [["image"]])
    for budget, instead in (("frame", "crop"), ("clip", "image")):
        pruner = VisPruner(keep=2, budget=budget)  # type: ignore[arg-type]
        for chosen in (pruner, VisPruner(keep=4) | pruner):
            with (
                chosen(BUILT[name]),
                pytest.raises(VlmpruneError, match=f"holds none; use budget='{instead}'"),
            ):
                generate(BUILT[name], req.inputs)
    with pytest.raises(VlmpruneError, match="'frame' or 'clip'"):
        VisPruner(keep=2, budget="film")  # type: ignore[arg-type]
    with VisPruner(keep=17, budget="frame")(BUILT["video_llava"]) as handle:
        req = ZOO["video_llava"].request(BUILT["video_llava"], [["video"]])
        generate(BUILT["video_llava"], req.inputs)
    # Frames of 16 tokens keep all that they have.
    assert handle.report.visual_tokens_after == handle.report.visual_tokens_before
    assert handle.report.below_keep


@pytest.mark.parametrize("name", VIDEOS)
def test_image_and_video_in_one_prompt_of_a_chain(name: str) -> None:
    built = BUILT[name]
    # Each row has one image, so that LLaVA-OneVision tiles them, and scales some of them down.
    req = ZOO[name].request(built, [["image", "video"], ["video", "image", "video"], []])
    with (VisPruner(keep=0.7) | VisPruner(keep=0.6, budget="clip"))(built) as handle:
        got = generate(built, req.inputs)
    report = handle.report
    assert report is not None
    if name == "llava_onevision":
        assert any(one.blended for one in report.layouts)
    expected = masked(built, req, dropped_columns(req, report), handle.positions)
    assert distance(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", VIDEOS)
def test_beams(name: str) -> None:
    built = BUILT[name]
    req = ZOO[name].request(built, [["video"], ["video"]], text=[5, 8])
    if not repeats_rows(built, req.inputs):
        pytest.skip("this release mixes up the videos of repeated rows, without a pruner")
    more = {"num_beams": 2, "num_return_sequences": 2}
    with VisPruner(keep=3, positions="original")(built) as handle:
        got = built.generate(**req.inputs, **more, max_new_tokens=5, do_sample=False)
    dropped = dropped_columns(req, handle.report)
    given_mask = req.inputs["attention_mask"]
    changed = {
        "attention_mask": given_mask * ~dropped,
        "position_ids": (given_mask.cumsum(1) - 1).clamp(min=0),
    }
    expected = built.generate(**(req.inputs | changed), **more, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BUILT)
def test_a_plain_forward_with_padding_on_either_side(name: str, side: str) -> None:
    built = BUILT[name]
    rows: list[list[Any]] = [["image", "video"], ["video"], []]
    if name not in VIDEOS:
        rows = [["image", "image"], ["image"], []]
    req = ZOO[name].request(built, rows, side=side)
    with VisPruner(keep=3, positions="original")(built) as handle, torch.no_grad():
        logits = built(**req.inputs).logits
    dropped = dropped_columns(req, handle.report)
    mask = req.inputs["attention_mask"]
    changed = {
        "attention_mask": mask * ~dropped,
        "position_ids": mask.cumsum(1) - 1 if side == "left" else torch.arange(mask.shape[1])[None],
    }
    changed["position_ids"] = changed["position_ids"].clamp(min=0)
    with torch.no_grad():
        expected = built(**(req.inputs | changed)).logits
        plain = built(**req.inputs).logits
    for row, stays in enumerate(mask.bool() & ~dropped):
        count = int(stays.sum())
        got = logits[row, -count:] if side == "left" else logits[row, :count]
        assert float((got - expected[row, stays]).abs().max()) < TOLERANCE
        if rows[row]:
            assert float((got - plain[row, stays]).abs().max()) > 1e-3


def joined(first: dict[str, Tensor], later: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixels of two turns as those of one prompt."""
    out = {}
    for name in (first | later).keys() - {"input_ids", "attention_mask", "batch_num_images"}:
        parts = [turn[name] for turn in (first, later) if name in turn]
        if name == "pixel_values" and parts[0].ndim == 5:
            most = max(part.shape[1] for part in parts)
            parts = [nn.functional.pad(p, [0] * 7 + [most - p.shape[1]]) for p in parts]
        out[name] = torch.cat(parts)
    return out


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_later_turn_brings_an_image_or_a_video(name: str, kind: Any, policy: Any) -> None:
    built = BUILT[name]
    first = ZOO[name].request(built, [["video", "image"]])
    later = ZOO[name].request(built, [[kind]], seed=9)
    cache = DynamicCache(config=built.config.get_text_config())
    with VisPruner(keep=3, positions=policy)(built) as handle:
        # Random weights may well answer with a placeholder, which is nothing to continue from.
        one = generate(built, first.inputs, **{CACHE: cache}, suppress_tokens=[IMAGE, VIDEO])
        reports = [handle.report]
        ids = torch.cat((one.sequences, later.inputs["input_ids"]), dim=1)
        mask = torch.ones_like(ids)
        turn = {**later.inputs, "input_ids": ids, "attention_mask": mask}
        got = generate(built, turn, **{CACHE: cache})
        reports.append(handle.report)
    both = {"input_ids": ids, "attention_mask": mask, **joined(first.inputs, later.inputs)}
    assert all(reports)
    report: Any = SimpleNamespace(
        layouts=[one for r in reports if r for one in r.layouts],
        kept=[k for r in reports if r for k in r.kept],
    )
    req = Request(both, first.lengths + later.lengths, [], [], [])
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert torch.equal(got.sequences, expected.sequences)
    assert distance(got, expected) < TOLERANCE
    # Control: without what the first turn dropped, the answer differs.
    wrong = dropped_columns(req, report)
    wrong[:, : first.inputs["input_ids"].shape[1]] = False
    assert distance(got, masked(built, req, wrong, policy)) > 1e-3


@pytest.mark.parametrize("name", [*VIDEOS, "pixtral", "mistral3"])
def test_the_whole_conversations_pixels_may_come_again(name: str) -> None:
    """Images and videos that the cache holds are left out, also the counts of their rows."""
    built = BUILT[name]
    kinds: list[Any] = ["image", "image", "video"] if name in VIDEOS else ["image", "image"]
    req = ZOO[name].request(built, [[*kinds, "image"]])
    ids, pixels = req.inputs["input_ids"], {**req.inputs}
    del pixels["input_ids"], pixels["attention_mask"]
    begins = int((ids[0] == IMAGE).nonzero()[-req.lengths[-1], 0]) - 3
    old = {k: v if k == "pixel_values_videos" else v[:2] for k, v in pixels.items()}
    new = {k: v[2:] for k, v in pixels.items() if k != "pixel_values_videos"}
    if "batch_num_images" in pixels:
        old["batch_num_images"] = torch.tensor([2])
        new["batch_num_images"] = pixels["batch_num_images"]
    results = []
    with VisPruner(keep=2)(built) as handle:
        for again in (pixels, new):
            cache = DynamicCache(config=built.config.get_text_config())
            early = ids[:, :begins]
            first = generate(
                built,
                {"input_ids": early, **old},
                **{CACHE: cache},
                suppress_tokens=[IMAGE, VIDEO],
            )
            whole = torch.cat((first.sequences, ids[:, begins:]), dim=1)
            results.append(generate(built, {"input_ids": whole, **again}, **{CACHE: cache}))
            assert handle.report is not None and len(handle.report.kept) == 1
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert distance(*results) == 0


def test_early_items_of_a_batch_cannot_be_told_apart() -> None:
    built = BUILT["video_llava"]
    req = ZOO["video_llava"].request(built, [["video", "video"], ["video", "video"]])
    cache = DynamicCache(config=built.config.get_text_config())
    early = ZOO["video_llava"].request(built, [["video"], ["video"]])
    with VisPruner(keep=2)(built):
        first = generate(built, early.inputs, **{CACHE: cache}, suppress_tokens=[IMAGE, VIDEO])
        turn = torch.cat((first.sequences, early.inputs["input_ids"]), dim=1)
        mask = torch.ones_like(turn)
        mask[:, : early.inputs["attention_mask"].shape[1]] = early.inputs["attention_mask"]
        pixels = {"pixel_values_videos": req.inputs["pixel_values_videos"]}
        with pytest.raises(VlmpruneError, match="pass the new videos alone"):
            generate(
                built,
                {"input_ids": turn, "attention_mask": mask, **pixels},
                **{CACHE: cache},
            )


def test_inputs_that_no_processor_makes_are_refused() -> None:
    built = BUILT["llava_next_video"]
    req = ZOO["llava_next_video"].request(built, [["video"]])
    req.inputs["pixel_values_videos"] = req.inputs["pixel_values_videos"][0]
    with VisPruner(keep=2)(built), pytest.raises(VlmpruneError, match=r"not \[videos, frames"):
        generate(built, req.inputs)
    req = ZOO["mistral3"].request(BUILT["mistral3"], [["image", "image"]])
    req.inputs["image_sizes"] = req.inputs["image_sizes"][:1]
    with VisPruner(keep=1)(BUILT["mistral3"]), pytest.raises(VlmpruneError, match="1 image_sizes"):
        generate(BUILT["mistral3"], req.inputs)


def test_the_former_name_of_pixels_is_taken_where_it_was_changed() -> None:
    """Video-LLaVA's own processor still returns it."""
    built = BUILT["video_llava"]
    takes = inspect.signature(type(built).forward).parameters
    req = ZOO["video_llava"].request(built, [["image"]])
    if "pixel_values" not in takes:
        assert "pixel_values_images" in req.inputs
        return
    former = dict(req.inputs)
    former["pixel_values_images"] = former.pop("pixel_values")
    with VisPruner(keep=2)(built) as handle:
        expected = generate(built, req.inputs)
        assert distance(expected, generate(built, former)) == 0
        assert handle.report is not None and handle.report.visual_tokens_after == 2


def test_models_that_cannot_be_followed_are_refused_at_attach() -> None:
    for name, changed, words in (
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "'full'"),
        ("llava_next_video", {"vision_feature_select_strategy": "full"}, "cannot pool"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "'full'"),
    ):
        built = ZOO[name].make()
        for key, value in changed.items():
            setattr(built.config, key, value)
        with pytest.raises(VlmpruneError, match=words):
            VisPruner(keep=2).attach(built)
    built = ZOO["mistral3"].make()
    built.config.vision_config.model_type = "clip_vision_model"
    with pytest.raises(VlmpruneError, match="supported there: pixtral"):
        VisPruner(keep=2).attach(built)
