"""Tokens that skip single decoder layers: equal to layers run by hand, one sample at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from deep import deep, generate
from sieve import Sieve, best, direction
from stock import CACHE, cache_of
from tiny import IMAGE, Request, request
from vlmprune import VisPruner
from vlmprune.runtime.cache.gapped_layer import GappedLayer
from vlmprune.runtime.geometry import frames_of
from zoo import ZOO

pytestmark = pytest.mark.oracle


# By hand: one sample, no padding, no cache, each layer on its own and on all rows.


@torch.no_grad()
def by_hand(
    built: Any,
    ids: Tensor,
    pixels: Tensor | None,
    method: Sieve,
    seen_as_keys: bool = False,
) -> tuple[Tensor, dict[int, list[list[int]]]]:
    """Logits [n, vocabulary], and by layer the visual tokens of each image that it works on."""
    decoder = built.get_decoder()
    hidden = built.get_input_embeddings()(ids).clone()
    visual = (ids == IMAGE).nonzero()[:, 0].tolist()
    frames: list[list[int]] = []
    if pixels is not None and visual:
        features = built.get_image_features(pixel_values=pixels).pooler_output
        flat = torch.cat([f.reshape(-1, hidden.shape[-1]) for f in features])
        hidden[visual] = flat
        size = len(flat) // len(pixels)
        frames = [visual[i : i + size] for i in range(0, len(visual), size)]
    count = len(ids)
    angles = decoder.rotary_emb(hidden[None], position_ids=torch.arange(count)[None])
    worked: dict[int, list[list[int]]] = {}
    for index, layer in enumerate(decoder.layers):
        mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
        routed = index in method.layers and frames
        if routed:
            scores = hidden @ direction(index, hidden.shape[-1]) + 0.5
            chosen = [best(scores, frame, method.keep) for frame in frames]
            worked[index] = [
                [frame.index(place) for place in sorted(one)]
                for frame, one in zip(frames, chosen, strict=True)
            ]
            taken = {place for one in chosen for place in one}
            absent = [place for place in visual if place not in taken]
            if not seen_as_keys:
                mask[:, absent] = torch.finfo(torch.float32).min
        out = layer(hidden[None], attention_mask=mask[None, None], position_embeddings=angles)
        out = (out[0] if isinstance(out, tuple) else out)[0]
        if routed:
            for place in visual:
                if place not in taken:
                    out[place] = hidden[place]
                elif method.weighted:
                    out[place] = hidden[place] + scores[place] * (out[place] - hidden[place])
        hidden = out
    return built.lm_head(decoder.norm(hidden)), worked


def each(req: Request, images: list[int]) -> list[tuple[int, Tensor, Tensor | None]]:
    """Each row's number, its ids without padding, and its pixels."""
    mask, out, start = req.inputs["attention_mask"].bool(), [], 0
    for row, count in enumerate(images):
        pixels = req.inputs["pixel_values"][start : start + count] if count else None
        out.append((row, req.inputs["input_ids"][row][mask[row]], pixels))
        start += count
    return out


def hand_distance(
    built: Any, req: Request, images: list[int], result: Any, method: Sieve, **other: Any
) -> float:
    """How far the logits of `generate` are from those by hand, all rows and steps."""
    steps = torch.stack(result.logits, dim=1)
    length = req.inputs["input_ids"].shape[1]
    found = []
    for row, ids, pixels in each(req, images):
        whole = torch.cat((ids, result.sequences[row, length:]))
        logits = by_hand(built, whole, pixels, method, **other)[0]
        found.append(float((logits[len(ids) - 1 : -1] - steps[row]).abs().max()))
    return max(found)


BATCHES = {"one image": [1], "several images": [3], "padded batch": [2, 1, 0]}


@pytest.mark.parametrize(("attention", "batch"), list(product(["sdpa", "eager"], BATCHES)))
def test_generate_equals_layers_by_hand(attention: str, batch: str) -> None:
    """Prompt and steps, with caches of unequal length; and what each layer worked on."""
    built, images = deep(attention), BATCHES[batch]
    req = request(built, images)
    method = Sieve()
    with method(built) as handle:
        result = generate(built, req.inputs)
    assert hand_distance(built, req, images, result, method) < TOLERANCE
    # Controls: another share, no weights, other layers, and skipped tokens seen as keys.
    for other in (Sieve(keep=0.5), Sieve(weighted=False), Sieve(layers=(1,))):
        assert hand_distance(built, req, images, result, other) > DIFFERENT
    seen = hand_distance(built, req, images, result, method, seen_as_keys=True)
    assert seen > DIFFERENT
    report = handle.report
    assert report is not None and [one.index for one in report.layers] == [0, 1, 2, 3, 4]
    wanted = [by_hand(built, ids, pixels, method)[1] for _, ids, pixels in each(req, images)]
    for one in report.layers:
        kept = [k.tolist() for k in one.kept]
        if one.index not in method.layers:
            assert kept == [list(range(16))] * len(req.lengths)
        else:
            assert kept == [image for row in wanted for image in row.get(one.index, [])]
    # Every token reaches the last layer.
    assert [len(k) for k in report.kept] == req.lengths
    assert report.visual_tokens_after == report.visual_tokens_before


@pytest.mark.parametrize(("attention", "side"), list(product(["sdpa", "eager"], ["left", "right"])))
def test_a_plain_forward_equals_layers_by_hand(attention: str, side: str) -> None:
    """At every column, padding on either side, with and without a cache; hidden states too."""
    built, images = deep(attention), [2, 1, 0]
    req = request(built, images, text=[3, 6, 9], side=side)
    method = Sieve(keep=0.3)
    mask = req.inputs["attention_mask"].bool()
    with torch.no_grad(), method(built):
        runs = [built(**req.inputs, use_cache=cached).logits for cached in (True, False)]
        states = built(**req.inputs, output_hidden_states=True).hidden_states
    assert all(one.shape == states[0].shape for one in states)
    for (row, ids, pixels), logits in product(each(req, images), runs):
        wanted = by_hand(built, ids, pixels, method)[0]
        assert float((wanted - logits[row][mask[row]]).abs().max()) < TOLERANCE
        if pixels is not None:
            wanted = by_hand(built, ids, pixels, Sieve(keep=0.3, weighted=False))[0]
            assert float((wanted - logits[row][mask[row]]).abs().max()) > DIFFERENT
    # Behind a routed layer a token that skipped it has the state that it had before.
    with torch.no_grad(), method(built) as handle:
        states = built(**req.inputs, output_hidden_states=True).hidden_states
    assert handle.report is not None
    kept = torch.cat([torch.isin(torch.arange(16), k) for k in handle.report.layers[3].kept])
    same = (states[4] == states[3]).all(dim=-1)[req.inputs["input_ids"] == IMAGE]
    assert torch.equal(same, ~kept)


def test_each_layers_cache_holds_what_it_worked_on() -> None:
    """Lengths and bytes by layer, and the keys of the right tokens at the right places."""
    built = deep()
    req = request(built, [2])
    text = req.inputs["input_ids"].shape[1] - 32
    with torch.no_grad(), Sieve(keep=0.25)(built) as handle:
        cache = cache_of(built(**req.inputs))
        report = handle.report
    plain = cache_of(built(**req.inputs))
    assert report is not None
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [text + 32, text + 8, text + 32, text + 8, text + 32]
    assert [layer.get_seq_length() for layer in cache.layers] == [text + 32] * 5
    assert [isinstance(layer, GappedLayer) for layer in cache.layers] == [False, True] * 2 + [False]
    for mine, theirs, told in zip(cache.layers, plain.layers, report.layers, strict=True):
        saved = theirs.keys.nbytes + theirs.values.nbytes - mine.keys.nbytes - mine.values.nbytes
        each_token = 2 * 2 * 8 * 4
        visual = sum(len(k) for k in told.kept)
        assert told.kv_bytes == visual * each_token and saved == (32 - visual) * each_token
    assert report.kv_bytes_after == sum(told.kv_bytes for told in report.layers)
    assert report.kv_bytes_after / report.kv_bytes_before == (3 + 2 * 0.25) / 5
    assert report.flops_before - report.flops_after > 0
    # Layer 1 is the first to be skipped, so its keys are the plain run's.
    columns = (req.inputs["input_ids"][0] != IMAGE).clone()
    places = (req.inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    kept = torch.cat([k + 16 * i for i, k in enumerate(report.layers[1].kept)])
    columns[places[kept]] = True
    theirs = plain.layers[1].keys[:, :, columns]
    assert float((cache.layers[1].keys - theirs).detach().abs().max()) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_after_a_prompt_equal_one_forward(attention: str) -> None:
    built = deep(attention)
    req = request(built, [2, 1])
    more = torch.randint(6, 64, (2, 6), generator=torch.Generator().manual_seed(5))
    mask, ids = req.inputs["attention_mask"], req.inputs["input_ids"]
    whole = req.inputs | {
        "input_ids": torch.cat((ids, more), dim=1),
        "attention_mask": torch.cat((mask, torch.ones_like(more)), dim=1),
    }
    with torch.no_grad(), Sieve()(built):
        wanted = built(**whole).logits[:, -7:]
        out = built(**req.inputs)
        cache, found = cache_of(out), [out.logits[:, -1:]]
        # One token, then three together, then two more.
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            given = torch.cat((mask, torch.ones_like(more[:, :stop])), dim=1)
            step = built(input_ids=more[:, start:stop], attention_mask=given, **{CACHE: cache})
            found.append(step.logits)
    assert float((torch.cat(found, dim=1) - wanted).abs().max()) < TOLERANCE


def test_frames_that_come_one_by_one_are_routed_alike() -> None:
    """What a frame keeps depends on no later frame, so a stream may be fed as it comes."""
    built = deep()
    req = request(built, [3])
    ids, pixels = req.inputs["input_ids"], req.inputs["pixel_values"]
    ends = (ids[0] == IMAGE).nonzero()[:, 0].view(3, 16)[:, -1].tolist()
    cuts = [0, ends[0] + 2, ends[1] + 2, ids.shape[1]]
    with torch.no_grad(), Sieve()(built) as handle:
        whole = built(**req.inputs)
        report = handle.report
        assert report is not None
        at_once = [[k.tolist() for k in one.kept] for one in report.layers]
        cache, logits = None, []
        for i in range(3):
            part = built(
                input_ids=ids[:, cuts[i] : cuts[i + 1]],
                attention_mask=torch.ones(1, cuts[i + 1], dtype=torch.long),
                pixel_values=pixels[i : i + 1],
                **{CACHE: cache},
                use_cache=True,
            )
            cache = cache_of(part)
            logits.append(part.logits)
            assert handle.report is not None
            parted = [[k.tolist() for k in one.kept] for one in handle.report.layers]
            assert parted == [one[i : i + 1] for one in at_once]
        # Another last frame changes nothing before it.
        changed = req.inputs | {"pixel_values": torch.cat((pixels[:2], -pixels[2:]))}
        other = built(**changed)
        assert handle.report is not None
        later = [[k.tolist() for k in one.kept] for one in handle.report.layers]
    assert [one[:2] for one in later] == [one[:2] for one in at_once]
    assert [one[2] for one in later] != [one[2] for one in at_once]
    assert float((torch.cat(logits, dim=1) - whole.logits).abs().max()) < TOLERANCE
    before = cuts[2]
    assert float((other.logits - whole.logits)[:, :before].abs().max()) < TOLERANCE
    assert float((other.logits - whole.logits)[:, before:].abs().max()) > DIFFERENT


def test_beams() -> None:
    """Rows are repeated and reordered, and their routed caches with them."""
    built = deep()
    req = request(built, [1, 1])
    more = {"num_beams": 3, "num_return_sequences": 2}
    with Sieve()(built):
        kept = generate(built, req.inputs, **more)
        again = generate(built, req.inputs, **more, use_cache=False)
    plain = generate(built, req.inputs, **more)
    assert torch.equal(kept.sequences, again.sequences)
    assert distance(kept, again) < TOLERANCE < DIFFERENT < distance(kept, plain)


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl", "gemma3"])
def test_other_families(name: str) -> None:
    """Videos by frame, three positions a token, sliding windows: steps equal one forward."""
    entry = ZOO[name]
    built = entry.build("sdpa")
    rows: list[list[Any]] = [["image", "image"], ["image"]]
    if "video" in entry.modalities:
        rows = [["video", "image"], ["image"]]
    req = entry.request(built, rows)
    method = Sieve(keep=0.3, layers=(1,))
    with method(built) as handle:
        cached = generate(built, req.inputs)
        report = handle.report
        afresh = generate(built, req.inputs, use_cache=False)
    assert report is not None and torch.equal(cached.sequences, afresh.sequences)
    assert distance(cached, afresh) < TOLERANCE
    assert distance(cached, generate(built, req.inputs)) > DIFFERENT
    for layout, kept in zip(report.layouts, report.layers[1].kept, strict=True):
        frames = frames_of(layout, torch.arange(len(layout.labels)))
        for frame in range(int(frames.max()) + 1):
            n = int((frames == frame).sum())
            assert int((frames[kept] == frame).sum()) == max(1, int(0.3 * n + 0.5))


def test_behind_a_pruner_before_the_language_model() -> None:
    """The frames are of what is left, and the report counts from the beginning."""
    built = deep()
    req = request(built, [2, 1])
    with VisPruner(keep=10, positions="original")(built) as alone:
        generate(built, req.inputs)
    with (VisPruner(keep=10, positions="original") | Sieve(keep=0.5))(built) as handle:
        cached = generate(built, req.inputs)
        report = handle.report
        afresh = generate(built, req.inputs, use_cache=False)
    assert distance(cached, afresh) < TOLERANCE
    assert report is not None and alone.report is not None
    for whole, kept, some in zip(
        alone.report.kept, report.kept, report.layers[1].kept, strict=True
    ):
        assert torch.equal(whole, kept) and len(some) == 5
        assert set(some.tolist()) < set(kept.tolist())
