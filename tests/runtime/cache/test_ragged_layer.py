"""The ragged cache layer: what it stores, and every operation that Transformers' caches have."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from answers import DIFFERENT, TOLERANCE
from masked import kept_columns, masking
from stock import CACHE, cache_of
from tiny import IMAGE, model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.runtime.cache import bound_cache, one_piece
from vlmprune.runtime.cache.binding import Binding
from vlmprune.runtime.cache.bound_cache import binding_of
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.decoder import cache_cut

SETTINGS: dict[str, Any] = {"r": 0.4, "dr": 0.3, "alpha": 0.65, "beta": 0.6, "per_head": "adaptive"}


def filled(built: Any, images: list[int]) -> tuple[Any, Any, dict[int, Tensor], Tensor]:
    """A cut cache and a full one after the same prompt and two steps, masks, 2-D mask."""
    req = request(built, images)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with PLPHP(**SETTINGS)(built) as handle:
        cut = built.generate(**req.inputs, **settings)
    keep = kept_columns(handle.report, req.inputs["input_ids"], IMAGE)
    with masking(built, keep):
        full = built.generate(**req.inputs, **settings)
    assert torch.equal(cut.sequences, full.sequences)
    mask = torch.ones(len(images), cache_of(cut).get_seq_length())
    mask[:, : req.inputs["attention_mask"].shape[1]] = req.inputs["attention_mask"]
    return cache_of(cut), cache_of(full), keep, mask.long()


def step(built: Any, held: Any, mask: Tensor, keep: dict[int, Tensor], new: int) -> Tensor:
    """Logits of `new` further tokens over a cache."""
    ids = torch.arange(10, 10 + new).repeat(mask.shape[0], 1)
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    positions = mask.cumsum(1)[:, -new:] - 1
    with torch.no_grad(), masking(built, keep):
        return built(
            input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: held}
        ).logits


def operate(held: Any, mask: Tensor, keep: dict[int, Tensor], name: str) -> tuple[Any, Any]:
    """Apply an operation to a cache; returns the mask and the kept columns after it."""
    rows = {"reorder": [1, 0], "repeat": [0, 0, 0, 1, 1, 1], "select": [1]}.get(name)
    if name == "reorder":
        held.reorder_cache(torch.tensor(rows))
    elif name == "repeat":
        held.batch_repeat_interleave(3)
    elif name == "select":
        held.batch_select_indices(torch.tensor(rows))
    elif name == "crop the tail":
        held.crop(-1)
        mask = mask[:, :-1]
    elif name == "crop the prompt":
        held.crop(-9)
        mask = mask[:, :-9]
        keep = {i: k[:, :, : mask.shape[1]] for i, k in keep.items()}
    elif name == "offload":
        for layer in held.layers:
            layer.offload()
            layer.prefetch()
    if rows is not None:
        mask, keep = mask[rows], {i: k[rows] for i, k in keep.items()}
    return mask, keep


OPERATIONS = ["none", "reorder", "repeat", "select", "crop the tail", "crop the prompt", "offload"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("laid", ["in one piece", "apart"])
def test_operations_equal_those_of_a_masked_cache(
    name: str, new: int, laid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if laid == "apart":
        monkeypatch.setattr(one_piece, "serves", lambda prefix: False)
    built = model()
    cut, full, keep, mask = filled(built, [1, 2])
    assert all((layer.piece is None) == (laid == "apart") for layer in cut.layers)
    before = mask
    mask, keep_after = operate(cut, before, keep, name)
    operate(full, before, keep, name)
    assert cut.get_seq_length() == full.get_seq_length() == mask.shape[1]
    # Twice, so that the tail goes on growing after the operation.
    for _ in range(2):
        unmasked = step(built, copy.deepcopy(full), mask, {}, new)
        ours = driven(built, cut, mask, new)
        theirs = step(built, full, mask, keep_after, new)
        assert float((ours - theirs).abs().max()) < TOLERANCE
        assert float((ours - unmasked).abs().max()) > DIFFERENT
        mask = torch.cat((mask, torch.ones(mask.shape[0], new, dtype=torch.long)), 1)


def driven(built: Any, held: Any, mask: Tensor, new: int) -> Tensor:
    """`step` over a cut cache, without a pruner's record of whole prompts."""
    layers = built.model.language_model.layers
    with bound_cache.attending(held, {i: x.self_attn for i, x in enumerate(layers)}, None):
        return step(built, held, mask, {}, new)


def test_a_length_to_crop_to_is_refused() -> None:
    cut, _, _, _ = filled(model(), [1])
    said = r"^crop\(3\) on a cut cache is ambiguous; pass minus the number of columns to remove"
    with pytest.raises(VlmpruneError, match=said):
        cut.crop(3)


def test_reset_forgets_everything() -> None:
    built = model()
    cut, _, _, _ = filled(built, [1])
    cut.reset()
    assert cut.get_seq_length() == 0 and all(layer.nbytes() == 0 for layer in cut.layers)
    req = request(built, [1])
    with PLPHP(**SETTINGS)(built):
        again = built.generate(**req.inputs, max_new_tokens=3, **{CACHE: cut})
        fresh = built.generate(**req.inputs, max_new_tokens=3)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("per_head", ["equal", "adaptive"])
def test_bytes_are_those_of_the_tensors_held(per_head: Any) -> None:
    built = model()
    images = [1, 2, 0]
    req = request(built, images)
    settings = {**SETTINGS, "per_head": per_head}
    with torch.no_grad(), PLPHP(**settings)(built) as handle:
        held = cache_of(built(**req.inputs))
    report = handle.report
    assert report is not None
    heads, dim, size = 2, 8, 4
    text = int((req.inputs["attention_mask"].bool() & (req.inputs["input_ids"] != IMAGE)).sum())
    visual = 0
    for layer, about in zip(held.layers, report.layers, strict=True):
        kept = sum(len(k) for head in about.kept for k in head)
        tokens = text * heads + kept
        # Keys, values, a 4-byte column a token, and the cumulative lengths.
        formula = tokens * (2 * dim * size + 4) + 4 * (len(images) * heads + 1)
        assert layer.nbytes() == about.bytes_after == formula
        assert about.bytes_before == req.inputs["input_ids"].numel() * heads * 2 * dim * size
        own = layer.prefix
        tensors = [own.keys, own.values, own.columns, own.offsets]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == formula
        assert about.kv_bytes == kept * 2 * dim * size
        visual += about.kv_bytes
        assert layer.get_seq_length() == req.inputs["input_ids"].shape[1]
    assert report.kv_bytes_after == visual < report.kv_bytes_before
    assert report.kv_bytes_before == 48 * heads * 2 * dim * size * 3


def dense_layers(monkeypatch: Any, held: int) -> list[int]:
    """How many layers are dense as each of three has run, of which so many bytes may wait."""
    built = model()
    req = request(built, [2])
    dense = []
    monkeypatch.setattr(cache_cut, "HELD", held)

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layers = kwargs[CACHE].layers
        dense.append(sum(not layer.cut and layer.get_seq_length() > 0 for layer in layers))

    hooks = [
        layer.register_forward_hook(look, with_kwargs=True)
        for layer in built.model.language_model.layers
    ]
    with torch.no_grad(), PLPHP(**SETTINGS)(built):
        out = built(**req.inputs)
    for hook in hooks:
        hook.remove()
    assert all(layer.cut for layer in cache_of(out).layers)
    return dense


def test_layers_wait_for_their_cut_within_a_bound(monkeypatch: Any) -> None:
    """Peak: what was kept so far, and dense layers of so many bytes, one where it is larger."""
    assert dense_layers(monkeypatch, 0) == [0, 0, 0]
    assert dense_layers(monkeypatch, 2**28) == [1, 2, 3]
    two = next(n for n in range(0, 2**20, 256) if dense_layers(monkeypatch, n) != [0] * 3)
    # As soon as two fit they are cut together, and there is no room for a third.
    assert dense_layers(monkeypatch, two) == [1, 0, 1]


def test_the_tail_grows_in_steps() -> None:
    layer = cut_layer(length=5)
    layer.binding.open = True
    sizes = set()
    for count in range(1, 60):
        new = torch.full((1, 2, 1, 4), float(count))
        keys, values = layer.update(new, -new)
        layer.binding.waiting = None  # as its attention leaves it
        # In one piece with the prompt, of which the longer head keeps all five columns.
        assert keys.shape == values.shape == (1, 2, 5 + count, 4)
        assert torch.equal(keys[0, 0, 5:, 0], torch.arange(1.0, count + 1))
        assert torch.equal(values[:, :, 5:], -keys[:, :, 5:])
        assert torch.equal(layer.keys, keys[:, :, 5:]) and layer.keys.shape[2] == count
        assert layer.get_seq_length() == 5 + count
        sizes.add(layer.nbytes())
    assert len(sizes) < 8


def cut_layer(length: int) -> RaggedLayer:
    layer = RaggedLayer(Binding(), 0)
    states = torch.randn(1, 2, length, 4)
    layer.update(states, states)
    keep = torch.ones(1, 2, length, dtype=torch.bool)
    keep[0, 1, 1] = False
    layer.set_prefix(Ragged.cut(states, states, keep), length)
    return layer


def test_what_a_layer_attends_to_at_once() -> None:
    """Steps of one query behind the first; the whole call is asked for elsewhere."""
    layer = cut_layer(length=5)
    layer.binding.open = True
    new = torch.randn(1, 2, 1, 4)
    layer.update(new, new)
    shown = layer.binding.waiting
    assert shown is not None and layer.piece is not None
    query = torch.randn(1, 4, 1, 4)
    asked = list[int]()

    def host() -> str:
        asked.append(1)
        return "the host's"

    assert layer.at_once(shown, query, host) is None
    layer._scale = 0.5
    assert layer.at_once(shown, query.expand(-1, -1, 2, -1), host) is None and not asked
    # One head keeps a column less, whose place the host would see.
    found, _ = layer.at_once(shown, query, host)
    keys, values = shown.keys.repeat_interleave(2, dim=1), shown.values.repeat_interleave(2, dim=1)
    seen = layer.piece.seen
    assert seen is not None and not asked
    mask = seen[:, :, :6].repeat_interleave(2, dim=1)[:, :, None]
    due = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=0.5)
    assert torch.allclose(found, due.transpose(1, 2), atol=1e-6)
    layer.piece.seen = None
    assert layer.at_once(shown, query, host) == "the host's" and asked == [1]


def test_gradients_reach_tokens_after_the_cut() -> None:
    layer = cut_layer(length=5)
    layer.binding.open = True
    new = torch.randn(1, 2, 2, 4, requires_grad=True)
    keys, _ = layer.update(new, new)
    layer.binding.waiting = None  # as its attention leaves it
    keys, _ = layer.update(new * 2, new)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.full_like(new, 3.0))


def test_an_uncut_layer_is_an_ordinary_one() -> None:
    ours, stock = RaggedLayer(Binding(), 0), DynamicLayer()
    for tokens in (4, 1, 2):
        states = torch.randn(2, 2, tokens, 4)
        for a, b in zip(ours.update(states, states), stock.update(states, states), strict=True):
            assert torch.equal(a, b)
    assert ours.get_seq_length() == stock.get_seq_length() == 7
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    ours.crop(-2)
    ours.reorder_cache(torch.tensor([1, 0]))
    assert ours.get_seq_length() == 5
    assert torch.equal(ours.keys, stock.keys[[1, 0], :, :5])


def test_a_cut_cache_needs_a_pruner() -> None:
    built = model()
    cut, _, _, mask = filled(built, [1])
    ids = torch.tensor([[9]])
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    with pytest.raises(VlmpruneError, match="cannot attend to heads of unequal length"):
        built(input_ids=ids, attention_mask=mask, **{CACHE: cut})
    # Any pruner will do, for what was cut stays cut.
    with VisPruner(keep=4)(built), torch.no_grad():
        built(input_ids=ids, attention_mask=mask, **{CACHE: cut})
    binding = binding_of(cut)
    assert binding is not None and not binding.open and binding.cutter is None


def test_attention_outside_the_registry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that would read the tail alone as if it were the whole cache."""
    built = model()
    cut, _, _, mask = filled(built, [1])
    ids = torch.tensor([[9]])
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    monkeypatch.setattr(bound_cache, "intercepting", lambda *_: nullcontext())
    with (
        pytest.raises(VlmpruneError, match="does not attend through the attention registry"),
        PLPHP(**SETTINGS)(built),
    ):
        built(input_ids=ids, attention_mask=mask, **{CACHE: cut})
    binding = binding_of(cut)
    assert binding is not None and not binding.open and binding.waiting is None


def refused(match: str, pruner: Any = None, call: dict[str, Any] | None = None) -> None:
    built = model()
    req = request(built, [1])
    encoded = []
    built.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    pruner = pruner or PLPHP(**SETTINGS)
    with pytest.raises(VlmpruneError, match=match), pruner(built):
        built.generate(**req.inputs, max_new_tokens=2, **(call or {}))
    assert not encoded, "refused only after work was done"


def test_refusals() -> None:
    config = model().config.get_text_config()
    static = StaticCache(config=config, max_cache_len=64)
    refused("cannot cut a StaticCache of StaticLayers", call={CACHE: static})
    refused("cache_implementation='static'", call={"cache_implementation": "static"})
    refused("cache_implementation='quantized'", call={"cache_implementation": "quantized"})
    refused("leave out use_cache=False", call={"use_cache": False})
    refused("leave out output_attentions", call={"output_attentions": True})
    refused("use at least", PLPHP(max_layer_bytes=100))


def test_a_cache_that_is_quantised_is_refused() -> None:
    class QuantizedLayer(DynamicLayer):
        pass

    held = DynamicCache()
    held.layers.append(QuantizedLayer())
    refused("cannot cut a DynamicCache of QuantizedLayers", call={CACHE: held})
    refused("cannot cut a object", call={CACHE: object()})


@given(
    limit=st.integers(1500, 12000),
    per_head=st.sampled_from(["equal", "adaptive"]),
    coverage=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_limit_of_bytes_holds_for_every_sample_and_layer(
    limit: int, per_head: Any, coverage: float
) -> None:
    built = model()
    req = request(built, [1, 3])
    token = 2 * 8 * 4
    text = req.inputs["attention_mask"].bool() & (req.inputs["input_ids"] != IMAGE)
    least = max(2 * token * (int(text[row].sum()) + images) for row, images in ((0, 1), (1, 3)))
    settings: dict[str, Any] = {"r": 0.6, "dr": 0.2, "per_head": per_head, "coverage": coverage}
    pruner = PLPHP(**settings, max_layer_bytes=limit)
    if limit < least:
        with pytest.raises(VlmpruneError, match=rf"below the {least} bytes"), pruner(built):
            built(**req.inputs)
        return
    with torch.no_grad(), pruner(built) as handle:
        built(**req.inputs)
    with torch.no_grad(), PLPHP(**settings)(built) as free:
        built(**req.inputs)
    assert handle.report is not None and free.report is not None
    for layer, without in zip(handle.report.layers, free.report.layers, strict=True):
        for row, images in ((0, 1), (1, 3)):
            kept = sum(len(head[row]) for head in layer.kept)
            stored = (2 * int(text[row].sum()) + kept) * token
            assert stored <= limit
            unlimited = sum(len(head[row]) for head in without.kept)
            if (2 * int(text[row].sum()) + unlimited) * token <= limit:
                assert kept == unlimited
            else:
                # No more is given away than rounding costs: less than a token an image and head.
                assert limit - stored < (images + 1) * 2 * token
            for head in layer.kept:
                numbers = head[row]
                assert {int(n) // 16 for n in numbers} == set(range(images))
