"""Families of square tiles and squares: who makes which token, windows, later turns, beams."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from tile_oracle import NAMES, dropped_by, generate, masked_inputs, moved_features, rows_of
from vlmprune import VisPruner, VlmpruneError
from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.families import FAMILIES
from vlmprune.runtime.geometry import spans
from zoo import WINDOWED, ZOO, tiles
from zoo.base import IMAGE, START, WORDS, Entry, loud, pad

INTERNVL, AYA = ZOO["internvl"].make(), ZOO["aya_vision"].make()


# Which patches make a token: moved one by one, behind the tower's last layer.


def idefics3_3() -> Any:
    config = ZOO["idefics3"].make().config
    config.scale_factor = 3
    return ZOO["idefics3"].make().__class__(config)


def aya_3() -> Any:
    config = ZOO["aya_vision"].make().config
    config.downsample_factor = 3
    return ZOO["aya_vision"].make().__class__(config)


def gemma3_3() -> Any:
    config = ZOO["gemma3"].make().config
    config.mm_tokens_per_image = 4
    return ZOO["gemma3"].make().__class__(config)


MAKES: list[tuple[str, str, Callable[[], Any]]] = [
    *((name, name, ZOO[name].make) for name in NAMES if name != "paligemma2"),
    ("idefics3", "idefics3, squares of 3", idefics3_3),
    ("aya_vision", "aya_vision, squares of 3", aya_3),
    ("gemma3", "gemma3, squares of 3", gemma3_3),
]


@pytest.mark.parametrize(
    ("name", "make"), [(n, make) for n, _, make in MAKES], ids=[words for _, words, _ in MAKES]
)
def test_each_token_is_made_of_its_members_alone(name: str, make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    built = loud(make())
    medium = FAMILIES[built.config.model_type].media[0]
    side = built.config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    pixels = torch.randn(2, 3, side, side)
    inputs = {"pixel_values": pixels[None] if name in ("idefics3", "smolvlm") else pixels}
    members = medium.members(built, inputs)  # type: ignore[attr-defined]
    layer = medium.scored(built, inputs).layer
    moved: list[int] = []

    def move(_: Any, __: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).contiguous().clone()
        if moved:
            # The CLS token lies before the patches, or behind them.
            patches = (side // tiles.PATCH) ** 2
            cls = first.shape[1] - patches if name == "internvl" else 0
            first[1, moved[-1] + cls] += torch.randn(first.shape[-1]) * 3
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def tokens() -> Tensor:
        with torch.no_grad():
            arguments = (None,) if "vision_feature_select_strategy" in required else ()
            out = built.base_model.get_image_features(inputs["pixel_values"], *arguments)
        made = out.last_hidden_state if name == "llama4" else out.pooler_output
        if not isinstance(made, Tensor):
            made = torch.cat(list(made))
        return made.reshape(2, -1, made.shape[-1])

    required = [
        n
        for n, p in inspect.signature(built.base_model.get_image_features).parameters.items()
        if p.default is p.empty
    ]
    hook = layer.register_forward_hook(move, prepend=True)
    before = tokens()
    owners: list[list[int]] = [[] for _ in members]
    for patch in range(members.numel()):
        moved.append(patch)
        change = (tokens() - before).abs().amax(dim=2)
        assert float(change[0].max()) < 1e-6
        for token in (change[1] > 1e-5).nonzero()[:, 0].tolist():
            owners[token].append(patch)
    hook.remove()
    assert owners == [sorted(one) for one in members.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_attention_of_the_members(name: str) -> None:
    """Against eager attention's own weights, which the tower returns."""
    entry = ZOO[name]
    built = entry.build("eager")
    req = entry.request(built, [["image"]])
    medium = FAMILIES[built.config.model_type].media[0]
    scored = medium.scored(built, req.inputs)
    weights: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        weights.append(output[1])

    hook = attention_of(scored.layer).register_forward_hook(keep)
    views = []
    pruner = VisPruner(keep=0.5)
    select = VisPruner.select

    def look(self: Any, view: Any) -> Any:
        views.append(view)
        return select(self, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisPruner, "select", look)
        with pruner(built):
            generate(built, req.inputs, max_new_tokens=1)
    hook.remove()
    rows = {"cls": 0, "last": -1}
    if scored.rows == "received":
        expected = weights[0].mean(dim=(1, 2))
    else:
        expected = weights[0].mean(dim=1)[:, rows[scored.rows]]
        expected = expected[:, :-1] if scored.rows == "last" else expected[:, 1:]
    members = medium.members(built, req.inputs)  # type: ignore[attr-defined]
    expected = expected[:, members].mean(dim=2)
    assert torch.allclose(views[0].attention, expected, atol=1e-6)


# Windows shorter than the request.


@pytest.mark.parametrize("name", [name for name in NAMES if name in WINDOWED])
def test_short_windows_equal_dropped_columns_moved_into_the_padding(name: str) -> None:
    entry: Entry = WINDOWED[name]
    built = entry.build()
    for module in built.modules():
        if hasattr(module, "floor_scale"):
            # Llama 4 also scales queries by their column, padding counted, which is 1 up to here.
            module.floor_scale = 1024
    req = entry.request(built, rows_of(name))
    with VisPruner(keep=0.4, positions="original")(built) as handle:
        pruned = generate(built, req.inputs)
    ids = req.inputs["input_ids"]
    dropped = dropped_by(handle, ids)
    full = masked_inputs(req.inputs, dropped)
    order = full["attention_mask"].sort(dim=1, stable=True).indices
    moved = {k: v.gather(1, order) if v.shape == ids.shape else v for k, v in full.items()}
    if name == "gemma3":
        moved["token_type_ids"] *= moved["attention_mask"]
    numbers = torch.full_like(ids, -1)
    numbers[ids == IMAGE] = torch.arange(int((ids == IMAGE).sum()))
    with moved_features(built, numbers.gather(1, order)[moved["input_ids"] == IMAGE]):
        expected = generate(built, moved)
    assert torch.equal(pruned.sequences[:, ids.shape[1] :], expected.sequences[:, ids.shape[1] :])
    assert distance(pruned, expected) < TOLERANCE
    # And it is not what masking gives, for a window counts columns.
    assert distance(pruned, generate(built, full)) > DIFFERENT


# What the families do with odd inputs.


@pytest.mark.parametrize("name", [name for name in ("idefics3", "smolvlm") if name in ZOO])
def test_padding_inside_a_tile_gets_no_attention(name: str) -> None:
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image", "image"], ["image"]])
    # The lower half of every tile is padding, as where tiles keep their aspect ratio.
    req.inputs["pixel_attention_mask"][:, :, 24:] = 0
    with VisPruner(keep=0.4, positions="original")(built) as handle:
        pruned = generate(built, req.inputs)
    dropped = dropped_by(handle, req.inputs["input_ids"])
    expected = generate(built, masked_inputs(req.inputs, dropped))
    assert distance(pruned, expected) < TOLERANCE
    important = [one["important"] for one in handle.report.roles]
    # Two of nine tokens of a tile are chosen by attention; the last row's patches are all padded.
    assert all(not bool(chosen[6:].any()) for chosen in important)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "aya_vision", "llama4"])
def test_truncated_placeholders_are_told(name: str) -> None:
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"]])
    ids = req.inputs["input_ids"]
    column = int((ids[0] == IMAGE).nonzero()[0])
    keep = [i for i in range(ids.shape[1]) if i != column]
    short = {"input_ids": ids[:, keep], "attention_mask": req.inputs["attention_mask"][:, keep]}
    with VisPruner(keep=0.5)(built), pytest.raises(VlmpruneError, match="tiles of 9 visual"):
        generate(built, req.inputs | short)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("idefics3", r"are not \[rows, tiles, channels, height, width\]"),
        ("internvl", r"are not \[images, channels, height, width\]"),
    ],
)
def test_pixels_of_another_shape_are_told(name: str, form: str) -> None:
    built = ZOO[name].build()
    inputs = ZOO[name].request(built, [["image"]]).inputs
    flat = inputs["pixel_values"].flatten(0, 1)
    with VisPruner(keep=2)(built), pytest.raises(VlmpruneError, match=form) as told:
        generate(built, inputs | {"pixel_values": flat})
    assert f"pixel_values of shape {tuple(flat.shape)}" in str(told.value)


def test_an_image_of_internvl_is_all_its_tiles() -> None:
    entry = ZOO["internvl"]
    built = entry.build()
    req = entry.request(built, [["image", "image"], ["image"]])
    with VisPruner(keep=0.5)(built) as handle:
        generate(built, req.inputs)
    assert [one.crops for one in handle.report.layouts] == [3, 1, 5]


def test_a_tower_with_another_selection_is_refused() -> None:
    built = ZOO["internvl"].build()
    built.config.vision_feature_select_strategy = "full"
    with pytest.raises(VlmpruneError, match="set it to 'default'"):
        VisPruner(keep=0.5).attach(built)


def test_a_merging_that_uses_a_patch_twice_is_refused() -> None:
    built = ZOO["internvl"].build()
    inputs = ZOO["internvl"].request(built, [["image"]]).inputs
    plain = built.model.pixel_shuffle

    def shuffle(vision_features: Tensor, scale_factor: float) -> Tensor:
        return plain(vision_features.roll(1, 1).maximum(vision_features), scale_factor)

    built.model.pixel_shuffle = shuffle
    said = "^InternVL.* cannot merge 6 x 6 patches of a tile into whole squares; pass what "
    with VisPruner(keep=0.5)(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)


@given(st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=3), st.booleans())
def test_runs_of_placeholders_are_images(rows: list[list[int]], left: bool) -> None:
    """Tiles of each image, from ids alone, over random counts, paddings and places."""
    built = INTERNVL
    medium = FAMILIES["internvl"].media[0]
    prompts = [[1, *chain(*([START, *[IMAGE] * 9 * n] for n in row)), WORDS] for row in rows]
    ids, _ = pad(prompts, "left" if left else "right")
    counts = [n for row in rows for n in row]
    inputs = {"pixel_values": torch.zeros(sum(counts), 3, 48, 48)}
    found = medium.layouts(built, inputs, ids == IMAGE)
    assert [one.crops for one in found] == counts
    assert [len(one.labels) for one in found] == [9 * n for n in counts]
    places = spans(ids == IMAGE, [len(one.labels) for one in found], "image")
    assert [place.row for place in places] == [r for r, row in enumerate(rows) for _ in row]
    single = FAMILIES["aya_vision"].media[0].layouts(AYA, inputs, ids == IMAGE)
    assert [one.crops for one in single] == [1] * sum(counts)
