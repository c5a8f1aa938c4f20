"""Recall in all the ways in which a model is called, against the full cache masked step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance, generate
from step_masks import exchanged, masking_steps, masks_of
from stock import CACHE, cache_of
from tiny import IMAGE, model, request, text_config
from vlmprune import PLPHP, Recall, VisPruner, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images
from vlmprune.runtime.cache.recall_layer import RecallLayer

pytestmark = pytest.mark.oracle

# Nothing stands for what is not read, so that a mask says all that a step sees.
WATCHED: dict[str, Any] = {"read": 0.2, "floor": 0, "rest": "none", "watch": "tokens"}


def visual(inputs: dict[str, Tensor]) -> Tensor:
    """[B, L] bool; the placeholders of a request."""
    return inputs["input_ids"] == IMAGE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("images", [[1], [1, 2, 1]])
@pytest.mark.parametrize("sketch", ["exact", "int4"])
def test_equals_the_full_cache_masked_to_what_was_read(
    attention: str, heads: int, images: list[int], sketch: Any
) -> None:
    built = model(attention=attention, text_config=text_config(kv_heads=heads))
    req = request(built, images, text=list(range(5, 5 + 2 * len(images), 2)))
    bare = generate(built, req.inputs)
    with Recall(**WATCHED, sketch=sketch)(built) as handle:
        found = generate(built, req.inputs)
    reading = handle.report.reading
    assert len(reading.steps) == 5 and reading.layers == (0, 1, 2)
    assert reading.read == [[3] * n for n in images]
    masks = masks_of(reading, visual(req.inputs), cache_of(found))
    with masking_steps(built, masks):
        expected = generate(built, req.inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert distance(found, expected) < TOLERANCE
    # The first token is the unpruned model's, bit for bit; later ones are not.
    assert torch.equal(found.logits[0], bare.logits[0])
    assert distance(found, bare) > DIFFERENT
    # A KV head reads its own tokens, and another step others.
    own = [step.index[1][0, :, :].sort(dim=1).values for step in reading.steps]
    assert heads == 1 or any(not torch.equal(one[0], one[-1]) for one in own)
    assert any(not torch.equal(own[0], one) for one in own[1:])
    with masking_steps(built, exchanged(masks, visual(req.inputs))):
        assert distance(generate(built, req.inputs), found) > DIFFERENT


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("settings", [{"read": 1.0}, {"read": 16}, {"read": 0.2}])
def test_reading_everything_is_the_unpruned_model(store: Any, settings: dict[str, Any]) -> None:
    built = model()
    req = request(built, [1, 2])
    bare = generate(built, req.inputs)
    with Recall(**settings, floor=17 if settings["read"] == 0.2 else 0, store=store)(built) as one:
        assert distance(generate(built, req.inputs), bare) == 0
    assert one.report.reading is None and one.report.kv_bytes_after == one.report.kv_bytes_before


def test_a_row_that_reads_everything_beside_one_that_does_not() -> None:
    """Where only one image is large the other is put away as well, and read whole."""
    built = model("llava_next")
    req = request(built, [1, 1])
    longest, shortest = max(req.lengths), min(req.lengths)
    assert longest > shortest
    bare = generate(built, req.inputs)
    with Recall(read=2, floor=longest, watch="tokens")(built) as handle:
        found = generate(built, req.inputs)
    reading = handle.report.reading
    small = req.lengths.index(shortest)
    assert reading.read[small] == [shortest] and reading.read[1 - small] == [2]
    apart = [
        max(
            float((a[row] - b[row]).abs().max())
            for a, b in zip(found.logits, bare.logits, strict=True)
        )
        for row in (small, 1 - small)
    ]
    assert apart[0] < TOLERANCE and apart[1] > DIFFERENT


@pytest.mark.parametrize("sketch", ["int2", "int8"])
def test_stores_and_sketches_choose_alike(sketch: Any) -> None:
    built = model()
    req = request(built, [2, 1])
    with Recall(**WATCHED, sketch=sketch)(built) as one:
        near = generate(built, req.inputs)
    with Recall(**WATCHED, sketch=sketch, store="host")(built) as other:
        far = generate(built, req.inputs)
    assert distance(near, far) < 1e-6
    for a, b in zip(one.report.reading.steps, other.report.reading.steps, strict=True):
        assert all(torch.equal(a.index[layer], b.index[layer]) for layer in range(3))
        assert a.bytes_read == b.bytes_read and a.bytes_fetched == 0 < b.bytes_fetched


def test_what_is_held_is_counted_from_storages() -> None:
    built = model()
    req = request(built, [1])
    for store in ("device", "host"):
        with Recall(**WATCHED, store=store)(built) as handle:
            cache = cache_of(generate(built, req.inputs))
        reading = handle.report.reading
        layers = cache.layers
        assert all(isinstance(layer, RecallLayer) for layer in layers)
        sketches = sum(layer.prefix.sketch.nbytes for layer in layers)
        full = sum(t.nbytes for x in layers for t in (x.prefix.store.keys, x.prefix.store.values))
        # 16 tokens, 2 heads, keys and values of 8 channels in float32, 3 layers.
        assert full == reading.dense_bytes == 16 * 2 * 2 * 8 * 4 * 3
        assert reading.sketch_bytes == sketches
        if store == "device":
            assert (reading.device_bytes, reading.host_bytes) == (full + sketches, 0)
        else:
            assert (reading.device_bytes, reading.host_bytes) == (sketches, full)
        step = reading.steps[0]
        # Three tokens a head, and the sketch.
        assert step.bytes_read == 3 * 2 * 2 * 8 * 4 * 3 + sketches
        assert step.bytes_fetched == (3 * 2 * 2 * 8 * 4 * 3 if store == "host" else 0)
        assert step.bytes_dense == full
        held = sum(layer.nbytes() for layer in layers)
        assert held > reading.device_bytes
        assert sum(layer.host_nbytes() for layer in layers) == reading.host_bytes


def test_the_share_of_attention_that_is_read() -> None:
    built = model()
    req = request(built, [1, 2])
    shares = []
    for read in (1, 4, 12):
        with Recall(read=read, floor=0, watch="mass")(built) as handle:
            generate(built, req.inputs)
        steps = handle.report.reading.steps
        assert all(0 < one <= 1 for step in steps for row in step.mass.values() for one in row)
        assert set(steps[0].mass) == {0, 1, 2} and len(steps[0].mass[0]) == 2
        shares.append(handle.report.reading.share_of_attention)
    assert shares[0] < shares[1] < shares[2] < 1


def test_beam_search_with_keys_on_the_host() -> None:
    built, beams = model(), 3
    req = request(built, [1, 1], text=[5, 9])
    settings = {"num_beams": beams, "num_return_sequences": 2}
    with Recall(**WATCHED, store="host")(built) as handle:
        pruned = generate(built, req.inputs, **settings)
    masks = masks_of(handle.report.reading, visual(req.inputs), cache_of(pruned))
    assert len(masks[0][0]) == 2 * beams
    with masking_steps(built, masks):
        expected = generate(built, req.inputs, **settings)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, generate(built, req.inputs, **settings)) > DIFFERENT


def test_sampling_and_several_sequences() -> None:
    built = model()
    req = request(built, [1, 1], text=[5, 9])
    settings = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    with Recall(**WATCHED)(built) as handle:
        pruned = generate(built, req.inputs, **settings)
    assert handle.report.reading.dense_bytes == 2 * 16 * 2 * 2 * 8 * 4 * 3
    torch.manual_seed(5)
    with masking_steps(
        built, masks_of(handle.report.reading, visual(req.inputs), cache_of(pruned))
    ):
        expected = generate(built, req.inputs, **settings)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE


def turns(first: Any, req: Any, more: Any) -> dict[str, Any]:
    """A later turn on the cache of one before."""
    before = torch.ones_like(first.sequences)
    before[:, : req.inputs["attention_mask"].shape[1]] = req.inputs["attention_mask"]
    given = {
        "input_ids": torch.cat((first.sequences, more["input_ids"]), 1),
        "attention_mask": torch.cat((before, more["attention_mask"]), 1),
        CACHE: cache_of(first),
    }
    return given | {n: v for n, v in more.items() if n not in given}


@pytest.mark.parametrize(
    ("attention", "images", "store"),
    [
        ("sdpa", [1, 2], "device"),
        ("eager", [1], "device"),
        ("eager", [1, 2], "host"),
        ("sdpa", [1], "host"),
    ],
)
def test_three_turns_two_of_them_with_images(attention: str, images: list[int], store: Any) -> None:
    """A later turn reads all that came before, and its steps a few of all images."""
    built = model(attention=attention)
    one, two = request(built, images), request(built, images[::-1], seed=7)
    words = torch.randint(6, 60, (len(images), 4))
    three = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    with Recall(**WATCHED, store=store)(built) as handle:
        first = generate(built, one.inputs)
        masks = masks_of(handle.report.reading, visual(one.inputs), cache_of(first))
        given = turns(first, one, two.inputs)
        second = generate(built, given)
        both = given["input_ids"] == IMAGE
        later = masks_of(handle.report.reading, both, cache_of(second))
        reading = handle.report.reading
        assert reading.layers == (0, 1, 2)
        request_two = type(two)(inputs=given, lengths=two.lengths)
        last = generate(built, turns(second, request_two, three))
        # A turn of text alone has no report of its own; the steps go on in the one before.
        final = masks_of(reading, both, cache_of(last))
        assert len(final) == 2 * len(later) == 10
    with masking_steps(built, masks):
        plain = generate(built, one.inputs)
    assert distance(first, plain) < TOLERANCE
    given = turns(plain, one, two.inputs)
    with masking_steps(built, later):
        again = generate(built, given)
    assert torch.equal(second.sequences, again.sequences)
    assert distance(second, again) < TOLERANCE
    request_two = type(two)(inputs=given, lengths=two.lengths)
    state = copy.deepcopy(again)
    with masking_steps(built, final[5:]):
        end = generate(built, turns(again, request_two, three))
    assert torch.equal(last.sequences, end.sequences)
    assert distance(last, end) < TOLERANCE
    with masking_steps(built, exchanged(final[5:], both)):
        assert distance(generate(built, turns(state, request_two, three)), last) > DIFFERENT


def test_plain_forward_and_steps_by_hand() -> None:
    built = model()
    req = request(built, [1, 2])
    mask = req.inputs["attention_mask"]
    token = torch.full((2, 1), 9)
    steps = []
    with torch.no_grad():
        whole = built(**req.inputs)
        with Recall(**WATCHED)(built) as handle:
            first = built(**req.inputs)
            assert torch.equal(first.logits, whole.logits)
            cache, reading = cache_of(first), handle.report.reading
            for _ in range(3):
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                steps.append(built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits)
        assert len(reading.steps) == 3 and reading.share_read < 1
        mask, cache = req.inputs["attention_mask"], cache_of(whole)
        masks = masks_of(reading, visual(req.inputs), cache_of(first))
        with masking_steps(built, masks, before=0):
            for step in steps:
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                own = built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
                assert float((step - own).abs().max()) < TOLERANCE


def test_a_prompt_read_in_chunks() -> None:
    built = model()
    req = request(built, [2, 1])
    with Recall(**WATCHED)(built) as handle:
        whole = generate(built, req.inputs)
        if not chunks_hold_images():
            with pytest.raises(VlmpruneError, match="loses images"):
                generate(built, req.inputs, prefill_chunk_size=16)
            return
        # The last chunk is one token, which reads everything all the same.
        columns = req.inputs["input_ids"].shape[1]
        for size in (16, columns - 1):
            chunks = generate(built, req.inputs, prefill_chunk_size=size)
            assert distance(whole, chunks) < TOLERANCE
    assert isinstance(cache_of(chunks).layers[0], RecallLayer) and handle.report.reading


def test_behind_a_method_before_the_language_model() -> None:
    built = model()
    req = request(built, [1, 2])
    pruner = VisPruner(keep=8) | Recall(**WATCHED)
    with pruner(built) as handle:
        found = generate(built, req.inputs)
    report = handle.report
    assert report.visual_tokens_after == 24 and report.reading.read == [[2], [2, 2]]
    for image, lit in zip(report.kept, report.reading.lit(0), strict=True):
        assert set(lit.nonzero()[:, 0].tolist()) <= set(image.tolist()) and float(lit.sum()) > 0
    short, cache = req.inputs | {}, cache_of(found)
    layer = cache.layers[0]
    assert layer.prefix.tokens.tolist() == [[8, 0], [8, 8]] and short
    with VisPruner(keep=8)(built):
        bare = generate(built, req.inputs)
    assert torch.equal(bare.logits[0], found.logits[0]) and distance(bare, found) > DIFFERENT


def test_layers_before_the_first_are_read_whole() -> None:
    built = model()
    req = request(built, [1])
    with Recall(**WATCHED, first_layer=2)(built) as handle:
        cache = cache_of(generate(built, req.inputs))
    assert handle.report.reading.layers == (2,)
    assert [layer.prefix is None for layer in cache.layers] == [True, True, False]
    assert cache.layers[0].keys.shape[2] > 16


def test_a_layer_steps_aside_where_reading_all_is_faster() -> None:
    """So few tokens take a CPU longer to choose among than to read; it says so, and is exact."""
    built = model()
    req = request(built, [1, 2])
    bare = generate(built, req.inputs)
    with Recall(read=2, floor=0)(built) as handle:
        aside = generate(built, req.inputs)
    reading = handle.report.reading
    assert reading.aside == 3 and reading.share_read == 1 and reading.sketch_bytes == 0
    assert "0 layers read in part, 3 whole, which is faster there" in str(handle.report)
    assert distance(aside, bare) < TOLERANCE
    for kept_on in ({"always": True}, {"store": "host"}, {"watch": "tokens"}):
        with Recall(read=2, floor=0, **kept_on)(built) as handle:
            assert distance(generate(built, req.inputs), bare) > DIFFERENT
        assert handle.report.reading.aside == 0


def test_a_copied_cache_goes_its_own_way() -> None:
    built = model()
    req = request(built, [1])
    for store in ("device", "host"):
        with Recall(**WATCHED, store=store)(built):
            turn = generate(built, req.inputs)
            twin = copy.deepcopy(cache_of(turn))
            ids = torch.cat((turn.sequences, torch.tensor([[7, 8]])), 1)
            one = generate(built, {"input_ids": ids, CACHE: cache_of(turn)})
            other = generate(built, {"input_ids": ids, CACHE: twin})
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def test_caches_that_another_method_cut_are_refused() -> None:
    built = model()
    req = request(built, [1])
    with PLPHP(r=0.4)(built):
        turn = generate(built, req.inputs)
    ids = torch.cat((turn.sequences, torch.tensor([[7, 8]])), 1)
    with (
        Recall(**WATCHED)(built),
        pytest.raises(VlmpruneError, match="cannot read in part a DynamicCache of RaggedLayers"),
    ):
        generate(built, {"input_ids": ids, CACHE: cache_of(turn)})
    with Recall(**WATCHED)(built):
        turn = generate(built, req.inputs)
    with pytest.raises(VlmpruneError, match="has its visual tokens put away"), torch.no_grad():
        built(input_ids=torch.tensor([[7]]), **{CACHE: cache_of(turn)})
