"""ZipVL in the model: attention among what a layer keeps equals masking it and zeroing its rows."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from answers import DIFFERENT, TOLERANCE, distance, generate
from stock import CACHE, cache_of
from tiny import IMAGE, model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError, ZipVL, embedded
from vlmprune.hosts.release import chunks_hold_images
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.views import Probes
from zipvl_reference import reference, stays, text_config
from zoo import ZOO
from zoo.base import IMAGE as ZOO_IMAGE

# Low enough that every layer of a random model loses tokens.
TAU = 0.6
BATCHES = {"one image": [1], "several images": [3], "padded batch": [1, 2, 0]}


def exchanged(keep: dict[int, Tensor], ids: Tensor) -> dict[int, Tensor]:
    """The same numbers of visual tokens, but others."""
    visual = ids == IMAGE
    return {
        i: torch.where(visual, (mask & visual).flip(1).roll(1, 1), mask) for i, mask in keep.items()
    }


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "attention", "batch"),
    list(product(["llava", "llava_next"], ["sdpa", "eager"], BATCHES)),
)
def test_equals_masking_columns_and_zeroing_rows(family: str, attention: str, batch: str) -> None:
    built = model(family, attention, text_config=text_config())
    req = request(built, BATCHES[batch])
    with ZipVL(TAU)(built) as handle:
        pruned = generate(built, req.inputs)
    report, ids = handle.report, req.inputs["input_ids"]
    assert report is not None and len(report.layers) == 3
    keep = stays(report, ids)
    with reference(built, keep):
        expected = generate(built, req.inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE

    # Every layer lost tokens, and samples and layers not as many.
    counts = {tuple(mask.sum(1).tolist()) for mask in keep.values()}
    assert len(counts) > 1
    images = torch.tensor(BATCHES[batch]) > 0
    assert all((~mask).any(1)[images].all() for mask in keep.values())
    with reference(built, exchanged(keep, ids)):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT
    assert distance(pruned, generate(built, req.inputs)) > DIFFERENT
    # Rows that are not zeroed, as in methods that cut after prefill, make a difference too.
    with PLPHP(r=0.5, dr=0)(built):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.oracle
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen2_5_vl"])
def test_families(name: str, attention: str) -> None:
    """Images that attend both ways, an attention of its own kind, three positions a column."""
    entry = ZOO[name]
    built = entry.build(attention)
    req = entry.request(built, [["image", "image"], ["image"], []])
    with ZipVL(TAU)(built) as handle:
        pruned = generate(built, req.inputs)
    assert handle.report is not None and handle.report.layers
    ids = req.inputs["input_ids"]
    keep = stays(handle.report, ids, token=ZOO_IMAGE)
    with reference(built, keep) as calls:
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE
    for index, mask in keep.items():
        query, key, visible = (t[1] for t in calls[index][0])
        real = req.inputs["attention_mask"][1].nonzero()[:, 0].tolist()
        found, _ = restated(query, key, visible, real, ZipVL(TAU))
        visual = (ids[1] == ZOO_IMAGE).nonzero()[:, 0].tolist()
        assert [i for i in visual if mask[1, i]] == [i for i in visual if i in found]
    assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


def restated(
    query: Tensor, key: Tensor, visible: Tensor, real: list[int], zipvl: ZipVL
) -> tuple[set[int], list[float]]:
    """The rule in plain Python: important columns of one sample, and what each column gets."""
    recent = real[-zipvl.recent :]
    rest = real[: len(real) - len(recent)]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(zipvl.seed))
    probes = recent + [rest[i] for i in drawn.tolist()[: zipvl.random]]
    heads, columns = query.shape[0], key.shape[1]
    ahead = columns - query.shape[1]
    gets, seen = [0.0] * columns, [0] * columns
    for row in probes:
        for head in range(heads):
            scores = key[head] @ query[head, row - ahead]
            scores = scores.masked_fill(~visible[0, row - ahead], -torch.inf).softmax(0)
            gets = [a + b / heads for a, b in zip(gets, scores.tolist(), strict=True)]
        seen = [n + int(visible[0, row - ahead, i]) for i, n in enumerate(seen)]
    p, held = 0, 0.0
    for value in sorted(gets, reverse=True):
        if held >= zipvl.tau * sum(gets):
            break
        p, held = p + 1, held + value
    ranked = sorted(real, key=lambda i: -gets[i] / max(seen[i], 1))
    return {*ranked[:p], real[-1]}, gets


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[2, 1, 0], [2]])
@pytest.mark.parametrize("probes", [(64, 64), (6, 5), (9, 0)])
def test_the_choice_restated(attention: str, images: list[int], probes: tuple[int, int]) -> None:
    built = model(attention=attention, text_config=text_config())
    req = request(built, images, text=[9, 4, 6][: len(images)])
    zipvl = ZipVL(0.7, *probes, seed=3)
    with zipvl(built) as handle:
        generate(built, req.inputs, max_new_tokens=1)
    report, ids = handle.report, req.inputs["input_ids"]
    assert report is not None
    seen = set()
    with reference(built, stays(report, ids)) as calls:
        generate(built, req.inputs, max_new_tokens=1)
    for layer in report.layers:
        query, key, visible = calls[layer.index][0]
        for row in range(len(images[:2])):
            real = req.inputs["attention_mask"][row].nonzero()[:, 0].tolist()
            found, gets = restated(query[row], key[row], visible[row], real, zipvl)
            visual = (ids[row] == IMAGE).nonzero()[:, 0].tolist()
            wanted = [n for n, column in enumerate(visual) if column in found]
            assert all(head[row].tolist() == wanted for head in layer.kept)
            share = sum(gets[i] for i in visual) / sum(gets)
            assert layer.gamma[row] == pytest.approx(share, abs=1e-5)
            assert layer.retention[row] == pytest.approx(len(wanted) / len(visual), abs=1e-6)
            seen.add(len(wanted) / len(visual))
        assert layer.gamma[2:] == layer.retention[2:] == [None] * len(images[2:])
    assert len(seen) > 1 or len(images) == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_forward(side: str) -> None:
    built = model(text_config=text_config())
    req = request(built, [1, 2, 0], side=side)
    real = req.inputs["attention_mask"].bool()
    with torch.no_grad(), ZipVL(TAU)(built) as handle:
        out = built(**req.inputs)
    assert all(isinstance(layer, RaggedLayer) for layer in cache_of(out).layers)
    keep = stays(handle.report, req.inputs["input_ids"])
    with torch.no_grad(), reference(built, keep):
        expected = built(**req.inputs).logits
    with torch.no_grad():
        whole = built(**req.inputs).logits
    assert float((out.logits - expected)[real].abs().max()) < TOLERANCE
    assert float((out.logits - whole)[real].abs().max()) > DIFFERENT


def test_the_side_of_the_padding_does_not_matter() -> None:
    built = model(text_config=text_config())
    found = []
    for side in ("left", "right"):
        req = request(built, [1, 2], side=side)
        with torch.no_grad(), ZipVL(TAU)(built) as handle:
            built(**req.inputs)
        assert handle.report is not None
        found.append(
            [(row.tolist(), layer.gamma) for layer in handle.report.layers for row in layer.kept[0]]
        )
    for (left, gamma), (right, other) in zip(*found, strict=True):
        assert left == right and gamma == pytest.approx(other, abs=1e-5)


def test_gradients_reach_what_attends() -> None:
    built = model(text_config=text_config())
    req = request(built, [1, 2])
    real = req.inputs["attention_mask"].bool()
    weight = built.model.language_model.layers[0].self_attn.v_proj.weight
    with ZipVL(TAU)(built) as handle:
        built(**req.inputs).logits[real].square().sum().backward()
    found, weight.grad = weight.grad, None
    with reference(built, stays(handle.report, req.inputs["input_ids"])):
        built(**req.inputs).logits[real].square().sum().backward()
    assert torch.allclose(found, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("images", [[1], [1, 2]])
def test_second_turn_with_a_new_image(images: list[int]) -> None:
    """The new prompt attends among its own tokens, and to what the first one left."""
    built = model(text_config=text_config())
    one, two = request(built, images), request(built, images[::-1], seed=7)
    new, new_mask = two.inputs["input_ids"], two.inputs["attention_mask"]

    def second(turn: Any) -> dict[str, Any]:
        first = torch.ones_like(turn.sequences)
        first[:, : one.inputs["attention_mask"].shape[1]] = one.inputs["attention_mask"]
        return {
            "input_ids": torch.cat((turn.sequences, new), 1),
            "attention_mask": torch.cat((first, new_mask), 1),
            "pixel_values": two.inputs["pixel_values"],
            CACHE: cache_of(turn),
        }

    with ZipVL(TAU)(built) as handle:
        turn = generate(built, one.inputs)
        first = handle.report
        again = generate(built, second(turn))
        later = handle.report
    keep = stays(first, one.inputs["input_ids"])
    with reference(built, keep):
        expected = generate(built, one.inputs)
    full = second(expected)
    both = stays(later, full["input_ids"], before=turn.sequences.shape[1] - 1)
    for index, mask in keep.items():
        both[index][:, : mask.shape[1]] &= mask
    with reference(built, both):
        expected = generate(built, full)
    assert torch.equal(again.sequences, expected.sequences)
    assert distance(again, expected) < TOLERANCE
    assert len({int(mask.sum()) for mask in both.values()}) > 1


def test_after_a_turn_without_an_image() -> None:
    """Columns that a cache holds uncut are not rows of the prompt, but may be attended to."""
    built = model(text_config=text_config())
    text = {"input_ids": torch.randint(6, 60, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    req = request(built, [2, 1])
    with ZipVL(TAU)(built) as handle:
        turn = generate(built, text)
        ids = torch.cat((turn.sequences, req.inputs["input_ids"]), 1)
        mask = torch.cat((torch.ones_like(turn.sequences), req.inputs["attention_mask"]), 1)
        inputs = {**req.inputs, "input_ids": ids, "attention_mask": mask}
        pruned = generate(built, {**inputs, CACHE: cache_of(turn)})
    turn = generate(built, text)
    with reference(built, stays(handle.report, ids)):
        expected = generate(built, {**inputs, CACHE: cache_of(turn)})
    assert distance(pruned, expected) < TOLERANCE


def test_chained_after_an_encoder_side_method() -> None:
    built = model(text_config=text_config())
    req = request(built, [1, 2, 0])
    with (VisPruner(keep=8, positions="original") | ZipVL(TAU))(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.visual_tokens_after == 24
    # What never enters is hidden in every layer, and the rest of its row does not matter.
    ids = req.inputs["input_ids"]
    with reference(built, stays(report, ids)):
        expected = generate(built, req.inputs)
    assert distance(pruned, expected) < TOLERANCE


def test_sliding_layers_stay_whole() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sliding = {"use_sliding_window": True, "sliding_window": 12, "layer_types": kinds}
    built = model(text_config=text_config(Qwen2Config, **sliding))
    req = request(built, [1, 1])
    with ZipVL(TAU)(built) as handle:
        pruned = generate(built, req.inputs)
    keep = stays(handle.report, req.inputs["input_ids"])
    assert sorted(keep) == [0, 2]
    with reference(built, keep):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE


def test_flops_and_bytes_after() -> None:
    built = model(text_config=text_config())
    req = request(built, [1, 2])
    with ZipVL(TAU)(built) as handle:
        generate(built, req.inputs, max_new_tokens=1)
    report = handle.report
    assert report is not None
    saved = size = 0
    for layer in report.layers:
        kept = [len(row) for row in layer.kept[0]]
        # Scores and sums over 4 heads of width 8, a multiply and an add each.
        saved += sum(2 * 2 * (n * n - k * k) * 32 for n, k in zip([16, 32], kept, strict=True))
        size += sum(kept) * 2 * 2 * 8 * 4
    assert report.flops_before - report.flops_after == pytest.approx(saved) and saved > 0
    assert report.kv_bytes_after == size < report.kv_bytes_before
    assert "3 layers cut (vision attention 0." in str(report)


def test_what_it_cannot_do() -> None:
    built = model(text_config=text_config())
    req = request(built, [1])
    with ZipVL()(built):
        with pytest.raises(VlmpruneError, match="needs one; leave out use_cache=False"):
            built(**req.inputs, use_cache=False)
        said = (
            r"^ZipVL\(.* chooses among all tokens of a prompt, which comes in parts here; leave out"
        )
        if not chunks_hold_images():
            said = "loses images"
        with pytest.raises(ValueError, match=said):
            generate(built, req.inputs, prefill_chunk_size=16)
        with pytest.raises(VlmpruneError, match="leave out output_attentions"):
            generate(built, req.inputs, output_attentions=True)
    for settings, match in (
        ({"tau": 0}, "tau=0 is not a number above 0"),
        ({"tau": 1.1}, "tau=1.1 is not"),
        ({"tau": True}, "tau=True is not"),
        ({"recent": 0}, "recent=0 is not a whole number of 1 or more"),
        ({"random": -1}, "random=-1 is not a whole number of 0 or more"),
        ({"seed": 0.5}, "seed=0.5 is not"),
    ):
        with pytest.raises(VlmpruneError, match=match):
            ZipVL(**settings)
    with pytest.raises(VlmpruneError, match="would both cut the KV cache"):
        PLPHP() | ZipVL()
    assert (VisPruner(keep=8) | ZipVL(recent=3)).probes == Probes(3, 64)
    assert (ZipVL().tau, ZipVL().recent, ZipVL().random) == (0.975, 64, 64)


def test_the_embedded_model_answers() -> None:
    from PIL import Image

    built, processor = embedded.load()
    path = sorted(embedded.scenes().glob("*.jpg"))[0]
    text = "USER: <image>\nWhat do you see? ASSISTANT:"
    inputs = processor(text=text, images=Image.open(path), return_tensors="pt")
    with ZipVL()(built) as handle:
        out = built.generate(**inputs, max_new_tokens=8)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    report = handle.report
    assert report is not None and report.kv_bytes_after < report.kv_bytes_before
    assert report.flops_after < report.flops_before
    assert all(0 < rate <= 1 for layer in report.layers for rate in layer.retention)
