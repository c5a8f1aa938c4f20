"""The Qwen line: merged groups, windows, 3-D positions, and calls that go on from others."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

from qwen_oracle import FAMILIES, MODELS, forget_positions, generate
from vlmprune import VisPruner, VlmpruneError, costs
from vlmprune.draw.boxes import token_boxes
from vlmprune.hosts import contract
from vlmprune.hosts.families.qwen import MEDIA
from vlmprune.pruner import Pruner
from vlmprune.runtime.family import family_of
from vlmprune.views import EncoderView, Selection
from zoo import ZOO
from zoo.base import START, WORDS
from zoo_oracle import dropped_columns

GROUP = 4  # patches of a visual token


_forget = pytest.fixture(autouse=True)(forget_positions)


@dataclass(frozen=True)
class Watching(Pruner):
    """Keeps everything, and shows what it saw."""

    seen: list[EncoderView] = field(default_factory=list)

    def select(self, view: EncoderView) -> Selection:
        self.seen.append(view)
        return Selection(view.candidates, {})


def media_inputs(
    modality: str,
    grids: list[tuple[int, int, int]],
    seed: int = 0,
    media: Sequence[Any] = MEDIA,
) -> tuple[Any, dict[str, Tensor]]:
    """A medium and inputs of items of these sizes in visual tokens."""
    medium = media[modality == "video"]
    sizes = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids])
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return medium, {medium.inputs[0]: pixels, medium.inputs[1]: sizes}


sides = st.integers(1, 5)
image_grids = st.lists(st.tuples(st.just(1), sides, sides), min_size=1, max_size=3)
video_grids = st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=2)
requests = st.one_of(
    st.tuples(st.just("image"), image_grids), st.tuples(st.just("video"), video_grids)
)


@FAMILIES
@settings(max_examples=8)
@given(requests, st.randoms(use_true_random=False))
def test_a_patch_moves_the_token_that_it_scores(name: str, one: Any, random: Any) -> None:
    built = MODELS[name]
    medium, inputs = media_inputs(*one, media=family_of(built).media)
    layouts = medium.layouts(built, inputs, torch.zeros(1, 0, dtype=torch.bool))
    block = built.model.visual.blocks[-1]
    total = len(inputs[medium.inputs[0]])
    moving: list[int] = []

    def push(_: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for patch in moving:
            output[patch] += torch.randn(
                output.shape[1], generator=torch.Generator().manual_seed(1)
            )
        return output

    def tokens() -> Tensor:
        output = getattr(built.model, medium.method)(*inputs.values())
        return torch.cat(medium.split(output, layouts))

    handle = block.register_forward_hook(push, prepend=True)
    try:
        with torch.no_grad():
            before = tokens()
            assert len(before) == sum(len(layout.labels) for layout in layouts)
            for patch in random.sample(range(total), min(total, 4)):
                moving[:] = [patch]
                moved = ((tokens() - before).abs().amax(dim=1) > 1e-6).nonzero()[:, 0].tolist()
                impulse = torch.zeros(total)
                impulse[patch] = 1
                frames = [n * GROUP for t, h, w in one[1] for n in [h * w] * t]
                rows = [part[None] for part in impulse.split(frames)]
                scores, features = medium.cells(built, inputs, layouts, rows, [impulse[:, None]])
                assert torch.equal(torch.cat(scores), torch.cat(features)[:, 0])
                assert [len(row) for row in scores] == [n // GROUP for n in frames]
                start, expected = 0, []
                for layout in layouts:
                    own = torch.stack(scores[: layout.crops])
                    del scores[: layout.crops]
                    found = layout.to_tokens(own > 0).nonzero()[:, 0] + start
                    start += len(layout.labels)
                    expected += found.tolist()
                assert moved == expected and len(moved) == 1
    finally:
        handle.remove()


def test_towers_of_the_same_sizes_cost_the_same() -> None:
    """None of Qwen3-VL's kind has a CLS token."""
    like = ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass")
    here = [MODELS[name] for name in like if name in MODELS]
    found = {costs.encoder_flops(one.config, patches=24) for one in here}
    assert len(found) == 1
    assert costs.encoder_flops(MODELS["qwen2_5_vl"].config, patches=24) not in found


@FAMILIES
@settings(max_examples=8)
@given(requests)
def test_rows_and_columns_are_those_of_thepositions_of(name: str, one: Any) -> None:
    built = MODELS[name]
    modality, grids = one
    medium, inputs = media_inputs(modality, grids)
    layouts = medium.layouts(built, inputs, torch.zeros(1, 0, dtype=torch.bool))
    token, kind = ZOO[name].placeholder(modality), 1 + (modality == "video")
    for layout, (frames, height, width) in zip(layouts, grids, strict=True):
        each = [[token] * (height * width)] * frames
        if name.startswith("qwen2"):
            each = [[token] * (frames * height * width)]
        ids = torch.tensor([[1, *(i for part in each for i in [START, *part, WORDS])]])
        grid = {medium.inputs[1]: torch.tensor([(frames, 2 * height, 2 * width)])}
        positions, _ = built.model.get_rope_index(
            ids, mm_token_type_ids=(ids == token).int() * kind, **grid
        )
        time, row, column = positions[:, 0, ids[0] == token]
        if not name.startswith("qwen2"):
            # Its frames stand one after the other, each with positions of its own.
            row, column = (x - time for x in (row, column))
            row, column = row - row.min(), column - column.min()
        assert torch.equal(row - row.min(), layout.row)
        assert torch.equal(column - column.min(), layout.column)
        _, crop = time.unique(return_inverse=True)
        assert torch.equal(crop, layout.crop)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
@FAMILIES
def test_scores_are_the_attention_that_patches_receive(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = ZOO[name].build("eager" if attention == "eager" else "sdpa")
    req = ZOO[name].request(built, [["image", "video"], ["image"]])
    visual = built.model.visual
    if attention == "packed":
        # Flash attention is given all images as one sequence, and where each ends.
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", _packed)
        visual.config._attn_implementation = "flash_attention_2"
    number = len(visual.blocks) - 1
    given = visual.post_layernorm if name.startswith("glm") else visual.merger
    caught: list[dict[str, Any]] = []
    handles = [
        visual.patch_embed.register_forward_hook(
            lambda m, a, out: caught.append({"patches": out.detach()})
        ),
        visual.blocks[0].register_forward_pre_hook(
            lambda m, a: caught[-1].update(first=a[0].detach())
        ),
        visual.blocks[number].attn.register_forward_pre_hook(
            lambda m, a, k: caught[-1].update(k, hidden=(a[0] if a else k["hidden_states"])),
            with_kwargs=True,
        ),
        given.register_forward_pre_hook(lambda m, a: caught[-1].update(last=a[0].detach())),
    ]
    pruner = Watching()
    # The contract's own run of the tower aside.
    with torch.no_grad(), contract.switched_off(), pruner(built) as handle:
        built(**req.inputs)
    for hook in handles:
        hook.remove()
    assert f"full-attention block {number}" in handle.report.score
    expected: dict[str, list[Tensor]] = {"image": [], "video": []}
    features: dict[str, list[Tensor]] = {"image": [], "video": []}
    for modality, seen in zip(sorted(set(req.modalities)), caught, strict=True):
        grid = req.inputs[f"{modality}_grid_thw"]
        lengths = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        rows = _received(visual.blocks[number].attn, seen, lengths)
        # Which patch, as the processor orders them, each row of the tower is.
        place = torch.arange(len(rows))
        if name == "qwen2_5_vl":
            place = torch.cdist(seen["first"], seen["patches"]).argmin(dim=1)
            assert not torch.equal(place, torch.arange(len(place)))
        undone = torch.empty_like(rows)
        undone[place] = rows
        groups = undone.view(-1, GROUP).mean(dim=1)
        expected[modality] = list(groups.split([n // GROUP for n in lengths]))
        last = torch.empty_like(seen["last"])
        last[place] = seen["last"]
        merged = last.view(-1, GROUP, last.shape[1]).mean(dim=1)
        features[modality] = list(merged.split([n // GROUP for n in lengths]))
    view = pruner.seen[0]
    frames = iter(req.inputs["video_grid_thw"][:, 0].tolist())
    order = [kind for kind in req.modalities for _ in range(next(frames) if kind == "video" else 1)]
    assert len(order) == len(view.attention)
    for crop, modality in enumerate(order):
        score, cells = expected[modality].pop(0), features[modality].pop(0)
        torch.testing.assert_close(view.attention[crop, : len(score)], score)
        torch.testing.assert_close(view.features[crop, : len(cells)], cells)
        assert int(view.candidates[crop].sum()) == len(score)


def _received(attn: Any, seen: dict[str, Any], lengths: list[int]) -> Tensor:
    """[rows of the tower] what each receives, by plain softmax inside its image or frame."""
    hidden = seen["hidden"].detach()
    heads, dim = attn.num_heads, hidden.shape[1] // attn.num_heads
    query, key, _ = attn.qkv(hidden).view(len(hidden), 3, heads, dim).permute(1, 2, 0, 3)
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    cos, sin = seen["position_embeddings"]

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    out = []
    query, key = turned(query), turned(key)
    for q, k in zip(query.split(lengths, dim=1), key.split(lengths, dim=1), strict=True):
        weights = (q @ k.transpose(1, 2) * attn.scaling).softmax(dim=-1)
        out.append(weights.mean(dim=(0, 1)))
    return torch.cat(out).detach()


def _packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
) -> tuple[Tensor, None]:
    ends = more["cu_seq_lens_q"]
    lengths = (ends[1:] - ends[:-1]).tolist()
    parts = [part.split(lengths, dim=2) for part in (query, key, value)]
    out = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=more["scaling"])
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


@FAMILIES
def test_kept_columns_have_the_positions_of_the_full_request(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image"], ["image"], []])
    full, _ = built.model.get_rope_index(
        **{k: v for k, v in req.inputs.items() if not k.startswith("pixel")}
    )
    given: list[dict[str, Any]] = []
    own = built.model.forward
    monkeypatch.setattr(built.model, "forward", lambda *a, **k: (given.append(k), own(*a, **k))[1])
    with VisPruner(keep=0.4)(built) as handle, torch.no_grad():
        generate(built, req.inputs)
        built(**req.inputs)
    stays = (req.inputs["attention_mask"] != 0) & ~dropped_columns(req, handle.report)
    for call in (given[0], given[-1]):
        mask = call["attention_mask"] != 0
        assert call["position_ids"].shape[:2] == (4, 3)
        for row in range(3):
            there = call["position_ids"][:, row, mask[row]]
            assert torch.equal(there[1:], full[:, row, stays[row]])
            assert torch.equal(there[0], torch.arange(int(mask[row].sum())))
    if name.startswith("qwen2"):
        # Rows 1 to 3 differ on visual tokens, and row 0 is not any of them.
        assert not torch.equal(there := given[0]["position_ids"][1], given[0]["position_ids"][2])
        assert not torch.equal(there, given[0]["position_ids"][0])


@FAMILIES
def test_a_budget_counts_frames(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image"]])
    with VisPruner(keep=3)(built) as handle:
        generate(built, req.inputs)
    video, image = handle.report.layouts
    counts = video.crop[handle.report.kept[0]].bincount().tolist()
    assert counts == [3] * int(req.inputs["video_grid_thw"][0, 0])
    assert len(handle.report.kept[1]) == 3 * image.crops
    assert (image.crops == 1) == (req.modalities[1] == "image")


@FAMILIES
def test_what_does_not_fit_is_refused(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["image"]])
    less = req.inputs | {"pixel_values": req.inputs["pixel_values"][1:]}
    without = {k: v for k, v in req.inputs.items() if k != "image_grid_thw"}
    with VisPruner(keep=0.5)(built):
        with pytest.raises(VlmpruneError, match="hold 23 patches but image_grid_thw asks for 24"):
            generate(built, less)
        with pytest.raises(VlmpruneError, match="came without image_grid_thw"):
            generate(built, without)


@pytest.mark.parametrize("size", [(300, 200), (97, 241), (56, 56)])
@pytest.mark.parametrize(
    ("name", "processes"),
    [("qwen2_vl", Qwen2VLImageProcessorPil), ("glm4v", Glm4vImageProcessorPil)],
)
def test_boxes_lie_where_the_processor_finds_the_pixels(
    name: str, processes: Any, size: tuple[int, int]
) -> None:
    processor = processes(resample=0, do_normalize=False, do_rescale=False)
    blank = torch.zeros(size[1], size[0], 3, dtype=torch.uint8)
    grid = processor(Image.fromarray(blank.numpy()), return_tensors="pt")["image_grid_thw"]
    inputs = {"image_grid_thw": grid, "pixel_values": torch.zeros(int(grid.prod()), 1)}
    media = family_of(MODELS[name]).media
    layout = media[0].layouts(MODELS[name], inputs, torch.zeros(1, 0) > 0)[0]
    boxes = token_boxes(layout, size, processor, name, patch_size=14)
    assert boxes.amax(dim=0)[2:].tolist() == list(size)
    for token in {0, len(boxes) // 3, len(boxes) - 1}:
        x0, y0, x1, y1 = boxes[token].round().int().tolist()
        bright = blank.clone()
        bright[y0:y1, x0:x1] = 255
        pixels = processor(Image.fromarray(bright.numpy()), return_tensors="pt")["pixel_values"]
        shares = pixels.view(len(boxes), -1).float().mean(dim=1) / 255
        assert shares[token] > 0.9 and shares.sum() - shares[token] < 0.3
    with pytest.raises(VlmpruneError, match="not known for a video"):
        token_boxes(replace(layout, kind="video"), size, processor, name)


@FAMILIES
def test_costs_equal_torchs_count_of_the_tower(name: str) -> None:
    built = ZOO[name].build("eager")
    # A whole number of windows, which Qwen2.5's cost formula takes for granted.
    _, inputs = media_inputs("image", [(1, 4, 6)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built.model.get_image_features(*inputs.values())
    counted = sum(
        sum(flops.values())
        for module, flops in counter.get_flop_counts().items()
        if re.search(r"visual\.blocks\.\d+$|VisionTransformer.*\.blocks\.\d+$", module)
        or re.search(r"Vision\w*Model\w*\.blocks\.\d+$", module)
    )
    assert costs.encoder_flops(built.config, patches=4 * 6 * GROUP) == counted


def test_the_encoder_is_given_what_the_host_would_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = MODELS["qwen2_5_vl"]
    req = ZOO["qwen2_5_vl"].request(built, [["video"]])
    given: list[set[str]] = []
    own = built.model.get_video_features

    @functools.wraps(own)
    def spy(*args: Any, **kwargs: Any) -> Any:
        given.append(set(kwargs))
        return own(*args, **kwargs)

    monkeypatch.setattr(built.model, "get_video_features", spy)
    with contract.switched_off(), VisPruner(keep=0.5)(built):
        generate(built, req.inputs)
    assert given == [{"video_grid_thw", "return_dict"}]
