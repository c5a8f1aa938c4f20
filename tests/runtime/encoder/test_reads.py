"""What a method reads of the vision encoder, against eager attention and hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import model, request
from unrecorded import MAKES, built_by, vipllava
from unrecorded import request as unknown
from vlmprune import METHODS, VlmpruneError
from vlmprune.hosts.attention import attention_of, read
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.runtime.attention import taps
from vlmprune.views import EncoderView, Reads, Selection
from zoo import ZOO
from zoo.base import scale_of

FAMILIES = ["llava", "llava_next"]
CLOSE = {"rtol": 0, "atol": 2e-6}


@dataclass(frozen=True)
class Spy(Budgeted):
    """Keeps the first cells, and what it was shown."""

    keep: int | float = 4
    wants: Reads = field(default_factory=Reads)
    seen: list[Any] = field(default_factory=list)

    def reads(self, depth: int, feature: int) -> Reads:
        self.seen.append((depth, feature))
        return self.wants

    def select(self, view: EncoderView) -> Selection:
        self.seen.append(view)
        kept = self.each(view, lambda cells, n: torch.arange(n).expand(len(cells), -1))
        return Selection(kept, {})

    @property
    def view(self) -> EncoderView:
        return self.seen[-1]


@torch.no_grad()
def look(built: Any, inputs: dict[str, Any], wants: Reads) -> Spy:
    spy = Spy(wants=wants)
    with spy(built):
        built(**inputs)
    return spy


@contextmanager
def eager(built: Any, attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and weights of each call of an attention module, as eager attention has them."""
    code: Any = sys.modules[type(attention).__module__]
    plain = code.eager_attention_forward
    found: list[tuple[Tensor, Tensor]] = []

    def noted(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(module, query, key, *args, **kwargs)
        if module is attention:
            found.append((key, out[1]))
        return out

    code.eager_attention_forward = noted
    built.set_attn_implementation({"vision_config": "eager"})
    try:
        yield found
    finally:
        code.eager_attention_forward = plain
        built.set_attn_implementation({"vision_config": "sdpa"})


def tower_of(built: Any) -> nn.ModuleList:
    tower = built.model.vision_tower
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def all_crops(inputs: dict[str, Any], crops: list[int]) -> Tensor:
    pixels = inputs["pixel_values"]
    if pixels.ndim == 4:
        return pixels
    return torch.cat([one[:n] for one, n in zip(pixels, crops, strict=True)])


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_attention_and_hooks(family: str, kind: str) -> None:
    built = model(family, kind=kind)
    req = request(built, [2, 0, 1])
    wants = Reads(layers=(0, 2), patches=1, keys=0, projected=True)
    spy = look(built, req.inputs, wants)
    view = spy.view
    assert spy.seen[0] == (3, 1), "three layers, features of the one before the last"
    counts = [view.images.count(i) for i in range(3)]
    pixels = all_crops(req.inputs, counts)
    heads = built.config.vision_config.num_attention_heads

    keys: list[Tensor] = []
    attention = attention_of(tower_of(built)[0])
    projection = getattr(attention, "k_proj", None) or attention.key
    hook = projection.register_forward_hook(lambda _, __, out: keys.append(out))
    weights = []
    with torch.no_grad():
        for layer in tower_of(built):
            with eager(built, attention_of(layer)) as calls:
                built.model.vision_tower(pixels)
            weights.append(calls[0][1])
    hook.remove()

    cls = int(kind != "siglip")
    patches = [w.mean(dim=1)[:, cls:, cls:] for w in weights]
    rows = [w.mean(dim=1)[:, 0, 1:] if cls else w.mean(dim=(1, 2)) for w in weights]
    assert set(view.layers) == {0, 2}
    for layer in (0, 2):
        torch.testing.assert_close(view.layers[layer], rows[layer], **CLOSE)
        assert (view.layers[layer] - rows[1]).abs().max() > 1e-3
    assert view.received is not None and view.given is not None
    torch.testing.assert_close(view.received, patches[1].mean(dim=1), **CLOSE)
    torch.testing.assert_close(view.given, patches[1].mean(dim=2), **CLOSE)
    # Control: with the CLS token, or renormalised, they are others.
    assert cls == 0 or (view.given - 1 / 16).abs().max() > 1e-3
    assert (view.received - patches[0].mean(dim=1)).abs().max() > 1e-3
    want = keys[0].view(len(pixels), -1, heads, keys[0].shape[-1] // heads).mean(dim=2)[:, cls:]
    assert view.keys is not None
    torch.testing.assert_close(view.keys, want, rtol=0, atol=1e-5)

    with torch.no_grad():
        features = built.get_image_features(
            **{k: v for k, v in req.inputs.items() if k in ("pixel_values", "image_sizes")}
        ).pooler_output
    assert view.projected is not None
    shown = view.projected[view.candidates]
    projected = torch.cat(list(features))
    newline = getattr(built.model, "image_newline", None)
    if newline is not None:
        projected = projected[(projected != newline).any(dim=1)]
    assert shown.shape == projected.shape
    assert not view.projected[~view.candidates].any()
    # The packing may take crops apart, so rows are found by their values.
    near = torch.cdist(shown.double(), projected.double()).min(dim=1)
    assert near.values.max() < 1e-5 and len(near.indices.unique()) == len(shown)
    assert view.grids == ((4, 4),) * len(pixels) and view.videos == (False,) * 3


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
def test_all_heads_as_one(kind: str) -> None:
    """One softmax over what the projections make, of the whole width, by hand in float64."""
    built = model(kind=kind)
    req = request(built, [1, 1])
    view = look(built, req.inputs, Reads(layers=(2,), joined=2)).view
    attention = attention_of(tower_of(built)[2])
    seen = {}
    hooks = [
        (
            getattr(attention, f"{name[0]}_proj", None) or getattr(attention, name)
        ).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.double()}))
        for name in ("query", "key")
    ]
    with torch.no_grad():
        built.model.vision_tower(req.inputs["pixel_values"])
    for hook in hooks:
        hook.remove()
    cls, width = int(kind != "siglip"), seen["key"].shape[2]
    # Of a tower that scales as usual, (H · D)^-0.5; those of the tests do not.
    scale = scale_of(attention) * (width // built.config.vision_config.num_attention_heads) ** 0.5
    weights = (seen["query"] @ seen["key"].mT * scale * width**-0.5).softmax(dim=-1)
    want = weights[:, 0, 1:] if cls else weights.mean(dim=1)
    assert view.joined is not None and view.joined_keys is not None
    torch.testing.assert_close(view.joined.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(view.joined_keys.double(), seen["key"][:, cls:], rtol=0, atol=1e-5)
    # Control: the mean of the heads' own attention is another.
    assert (view.joined - view.layers[2]).abs().max() > 1e-3


def test_all_heads_as_one_of_grouped_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 4, generator=generator) for heads in (6, 2))
    real = torch.arange(9).expand(2, 9) < torch.tensor([[9], [7]])
    for mask in (None, real):
        found = taps.JoinedTap("received").look(read(nn.Identity(), query, key, 0.7, mask=mask))
        wide = key.repeat_interleave(3, dim=1).transpose(1, 2).flatten(2)
        assert torch.equal(found[..., 1:], wide)
        scores = query.transpose(1, 2).flatten(2) @ wide.mT * 0.7 * 6**-0.5
        for row in range(2):
            sees = 9 if mask is None else int(real[row].sum())
            want = scores[row, :sees, :sees].softmax(dim=-1).mean(dim=0)
            torch.testing.assert_close(found[row, :sees, 0], want, rtol=0, atol=1e-6)
            assert not found[row, sees:, 0].any()


def test_nothing_is_read_that_was_not_asked_for() -> None:
    built = model()
    view = look(built, request(built, [1]).inputs, Reads()).view
    assert not view.layers
    more = (view.joined, view.joined_keys)
    for what in (view.received, view.given, view.keys, view.projected, view.relevance, *more):
        assert what is None


def test_features_of_several_layers() -> None:
    """Of a model that joins the outputs of layers, the feature layer is the last of them."""
    built = model(vision_feature_layer=[-3, -2])
    spy = look(built, request(built, [1, 1]).inputs, Reads(layers=(1,), projected=True))
    assert spy.seen[0] == (3, 1) and spy.view.features.shape == (2, 16, 64)
    assert torch.equal(spy.view.layers[1], spy.view.attention)


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_models_that_no_record_knows(make: Callable[[], Any]) -> None:
    built = built_by(make)
    spy = look(built, unknown(built, [1, 2]), Reads(layers=(0, 1, 2), patches=2, projected=True))
    (depth, feature), view = spy.seen[0], spy.view
    # With a CLS token the feature layer scores, else the last.
    alike = [i for i in range(depth) if torch.equal(view.layers[i], view.attention)]
    assert alike == [feature if make is vipllava else depth - 1] and depth == 3
    assert view.received is not None and view.projected is not None
    assert view.projected[view.candidates].any(dim=1).all()
    if make is not vipllava:
        torch.testing.assert_close(view.received, view.attention, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_scored_layer_is_read_once_and_alike(attention: str) -> None:
    for kind in ("clip", "siglip"):
        built = model(attention=attention, kind=kind)
        number = 1 if kind == "clip" else 2
        view = look(built, request(built, [1, 2]).inputs, Reads(layers=(number,))).view
        assert torch.equal(view.layers[number], view.attention)


def test_qwen_frame_by_frame() -> None:
    """Groups of 2 x 2 patches, keys after rotary embedding, images and a video of unequal size."""
    entry = ZOO["qwen2_vl"]
    built = entry.build()
    req = entry.request(built, [["image", "video"], ["image"]])
    view = look(built, req.inputs, Reads(layers=(0,), patches=1, keys=2, projected=True)).view
    blocks = built.model.visual.blocks
    assert any(view.videos) and len(set(view.grids)) > 1

    found = []
    with torch.no_grad():
        for block in blocks:
            with eager(built, block.attn) as calls:
                # The host encodes images and videos apart; crops come in prompt order.
                names = ("pixel_values", "image_grid_thw")
                built.model.get_image_features(*(req.inputs[n] for n in names))
                images = list(calls)
                calls.clear()
                names = ("pixel_values_videos", "video_grid_thw")
                built.model.get_video_features(*(req.inputs[n] for n in names))
                found.append((images, list(calls)))
    for crop, (rows, columns) in enumerate(view.grids):
        cells, video = rows * columns, view.videos[view.images[crop]]
        alike = [c for c in range(crop) if view.videos[view.images[c]] == video]

        def at(block: int, video: bool = video, place: int = len(alike)) -> tuple[Tensor, Tensor]:
            return found[block][video][place]

        def groups(values: Tensor) -> Tensor:
            return values.unflatten(0, (-1, 4)).mean(dim=1)

        assert view.received is not None and view.given is not None and view.keys is not None
        for got, want in (
            (view.layers[0], at(0)[1][0].mean(dim=0).mean(dim=0)),
            (view.received, at(1)[1][0].mean(dim=0).mean(dim=0)),
            (view.given, at(1)[1][0].mean(dim=0).mean(dim=1)),
            (view.keys, at(2)[0][0].mean(dim=0)),
        ):
            assert len(groups(want)) == cells
            torch.testing.assert_close(got[crop, :cells], groups(want), rtol=0, atol=1e-5)
            assert not got[crop, cells:].any()
    assert (view.layers[0] - view.attention).abs().max() > 1e-3


def test_windows_are_refused_by_name_and_their_keys_are_not() -> None:
    entry = ZOO["qwen2_5_vl"]
    built = entry.build()
    req = entry.request(built, [["image"]])
    for wants in (Reads(layers=(0, 3)), Reads(patches=2)):
        with pytest.raises(
            VlmpruneError, match=r"see windows alone in Qwen2_5_VL.*layers that see"
        ):
            look(built, req.inputs, wants)
    view = look(built, req.inputs, Reads(layers=(3,), keys=3)).view
    assert torch.equal(view.layers[3], view.attention) and view.keys is not None
    # A token's key does not depend on what it sees, so windows do not matter.
    narrow = look(built, req.inputs, Reads(keys=2)).view.keys
    assert narrow is not None and narrow.shape == view.keys.shape
    with torch.no_grad(), eager(built, built.model.visual.blocks[2].attn) as calls:
        built.model.get_image_features(req.inputs["pixel_values"], req.inputs["image_grid_thw"])
    every = torch.cat([key[0].mean(dim=0) for key, _ in calls]).unflatten(0, (-1, 4)).mean(dim=1)
    assert len(calls) > 1
    # In the order of windows there, in that of the picture here.
    distances = torch.cdist(narrow[0].double(), every.double())
    assert distances.min(dim=1).values.max() < 1e-5
    assert sorted(distances.argmin(dim=1).tolist()) == list(range(len(every)))


def test_pixel_shuffle() -> None:
    """Means over 2 x 2 patches of each tile, behind the CLS token."""
    entry = ZOO["internvl"]
    built = entry.build()
    req = entry.request(built, [["image"], ["image"]])
    view = look(built, req.inputs, Reads(layers=(0,), patches=0, keys=0)).view
    layer = built.model.vision_tower.encoder.layer[0]
    with torch.no_grad(), eager(built, layer.attention) as calls:
        built.model.get_image_features(req.inputs["pixel_values"])
    ((key, weights),) = calls

    def squares(values: Tensor) -> Tensor:
        tiles = values.unflatten(1, (3, 2, 3, 2))
        return tiles.mean(dim=(2, 4)).flatten(1, 2)

    mean = weights.mean(dim=1)
    assert view.received is not None and view.given is not None and view.keys is not None
    for got, want in (
        (view.layers[0], mean[:, 0, 1:]),
        (view.received, mean[:, 1:, 1:].mean(dim=1)),
        (view.given, mean[:, 1:, 1:].mean(dim=2)),
        (view.keys, key.mean(dim=1)[:, 1:]),
    ):
        torch.testing.assert_close(got, squares(want), rtol=0, atol=1e-5)
    assert (view.layers[0] - view.attention).abs().max() > 1e-3
    assert (view.layers[0] - view.received).abs().max() > 1e-3


def test_layers_that_there_are_not() -> None:
    built = model()
    req = request(built, [1])
    for wants in (Reads(layers=(1, 3)), Reads(patches=-1), Reads(keys=7), Reads(joined=3)):
        with pytest.raises(VlmpruneError, match=r"has layers 0 to 2; change the method's settings"):
            look(built, req.inputs, wants)


def test_chained_stages_see_all_that_any_of_them_wants() -> None:
    built = model()
    first = Spy(keep=8, wants=Reads(layers=(2,), keys=1))
    second = Spy(keep=3, wants=Reads(layers=(0, 2), patches=1, projected=True))
    with torch.no_grad(), (first | second)(built) as handle:
        built(**request(built, [1, 1]).inputs)
    for spy in (first, second):
        assert set(spy.view.layers) == {0, 2}
        assert spy.view.keys is not None and spy.view.projected is not None
    assert torch.equal(second.view.candidates.sum(dim=1), torch.tensor([8, 8]))
    assert handle.report is not None and [len(k) for k in handle.report.kept] == [3, 3]
    for wants, what in (
        (Reads(keys=2), r"keys of another layer \(1, 2\)"),
        (Reads(joined=2), r"joined heads of another layer \(0, 2\)"),
        (Reads(relevance="auto"), r"relevance by another source \(auto, folder\)"),
    ):
        other = Spy(keep=3, wants=wants)
        chain = Spy(keep=8, wants=Reads(keys=1, joined=0, relevance="folder")) | other
        with chain(built), pytest.raises(VlmpruneError, match=what):
            built(**request(built, [1]).inputs)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vispruner", {}, "CLS attention, encoder layer 1"),
        ("vtc_cls", {"first_layer": 0}, "attention of encoder layers 0 to 2"),
        ("fopru", {}, "attention among patches, encoder layer 1"),
        ("visionzip", {}, "CLS attention, encoder layer 1; keys of encoder layer 1"),
        ("prumerge", {}, "attention and keys of encoder layer 2, all heads as one"),
        ("divprune", {}, "projected features"),
        ("random", {}, ""),
    ],
)
def test_the_report_says_what_was_looked_at(name: str, settings: dict[str, Any], said: str) -> None:
    built = model()
    with METHODS[name](keep=8, **settings)(built) as handle:
        built.generate(**request(built, [1]).inputs, max_new_tokens=1)
    assert handle.report is not None and handle.report.score == said
