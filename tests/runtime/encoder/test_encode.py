"""Methods that choose before the language model, run on models.

What is kept as it is equals the full model with the rest masked; what is merged equals features
that are summed, projected and lined up by hand.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import answers
import zoo_oracle
from answers import DIFFERENT, TOLERANCE, distance
from plain_merging import Sums, by_prumerge, by_visionzip
from tiny import IMAGE, PAD, dropped_columns, model, request
from tiny_oracle import FAMILIES, generate, masked
from vlmprune import EVS, AveragePooling, CDPruner, PruMerge, VisionZip, embedded
from vlmprune.methods import METHODS
from zoo import ZOO

pytestmark = pytest.mark.oracle

PLAIN: dict[str, dict[str, Any]] = {
    "fastervlm": {"keep": 5},
    "vtc_cls": {"keep": 5, "first_layer": 0},
    "fopru": {"keep": 5},
    "fopru by rows": {"keep": 5, "choose": "row"},
    "divprune": {"keep": 5},
    "cdpruner": {"keep": 5},
    "random": {"keep": 5},
    "uniform": {"keep": 5, "budget": "image"},
}


@pytest.mark.parametrize(("family", "name"), list(product(FAMILIES, PLAIN)))
def test_what_is_kept_equals_masking(family: str, name: str) -> None:
    """A padded batch with a row of two images and one of none."""
    built = model(family)
    req = request(built, [1, 2, 0])
    with METHODS[name.partition(" ")[0]](**PLAIN[name])(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    kept = handle.report.kept
    assert all(0 < len(k) < n for k, n in zip(kept, req.lengths, strict=True))
    expected = masked(built, req, dropped_columns(req, kept), "compact")
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE

    # Control: as many others.
    away = [(n - 1 - k).flip(0) for k, n in zip(kept, req.lengths, strict=True)]
    if all(torch.equal(a, k) for a, k in zip(away, kept, strict=True)):
        away = [(k + 1) % n for k, n in zip(kept, req.lengths, strict=True)]
    control = masked(built, req, dropped_columns(req, away), "compact")
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_evs_equals_masking(name: str) -> None:
    """A video beside an image, a video between images, and a row without any."""
    entry = ZOO[name]
    built = entry.build("sdpa")
    req = entry.request(built, [["video", "image"], ["image", "video"], []])
    with EVS(keep=0.6, positions="original")(built) as handle:
        pruned = answers.generate(built, req.inputs)
    report = handle.report
    assert report is not None
    for layout, kept in zip(report.layouts, report.kept, strict=True):
        count = int((layout.labels[kept] >= 0).sum())
        if layout.kind == "video":
            cells = layout.crops * layout.patches
            assert count == int(0.6 * cells) > layout.patches
        else:
            assert len(kept) == len(layout.labels)
    expected = zoo_oracle.masked(built, req, zoo_oracle.dropped_columns(req, report), "original")
    assert distance(pruned, expected) < TOLERANCE
    dropped = zoo_oracle.dropped_columns(req, report, zoo_oracle.others(report))
    control = zoo_oracle.masked(built, req, dropped, "original")
    assert distance(pruned, control) > DIFFERENT


def seen_of(built: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Features, CLS attention and keys of the tower, by its own outputs and a hook."""
    tower = built.model.vision_tower
    keys: dict[int, Tensor] = {}
    whole: dict[str, Tensor] = {}
    last = tower.encoder.layers[-1].self_attn
    hooks = [
        projection.register_forward_hook(lambda _, __, out, name=name: whole.update({name: out}))
        for name, projection in (("q", last.q_proj), ("k", last.k_proj))
    ]
    hooks += [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _, __, out, i=i: keys.__setitem__(i, out.unflatten(-1, (4, 8)).mean(2)[:, 1:])
        )
        for i, layer in enumerate(tower.encoder.layers)
    ]
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    # Four heads; a head's scale is not the usual one here.
    joined = whole["q"] @ whole["k"].mT * last.scale * 4**-0.5
    rows = [attention[:, :, 0, 1:].mean(1) for attention in out.attentions]
    return {
        "features": out.hidden_states[-2][:, 1:],
        "attention": rows[1],
        "keys": keys[1],
        "last attention": rows[2],
        "last keys": keys[2],
        "joined attention": joined.softmax(-1)[:, 0, 1:],
        "joined keys": whole["k"][:, 1:],
    }


def zipped(seen: dict[str, Tensor], i: int) -> tuple[list[int], Sums]:
    """VisionZip at 5 of 16, two of them contextual: the tokens in order, and their sums."""
    best, made = by_visionzip(seen["attention"][i].tolist(), seen["keys"][i].tolist(), 5, 2)
    return [*sorted(best), *sorted(made)], made


def outlying(seen: dict[str, Tensor], i: int) -> tuple[list[int], Sums]:
    """PruMerge at 4 of 16: three by attention, each with three others, and one for the rest."""
    return outlying_by(seen["joined attention"][i], seen["joined keys"][i])


def outlying_of_means(seen: dict[str, Tensor], i: int) -> tuple[list[int], Sums]:
    """The same by attention and keys averaged over heads."""
    return outlying_by(seen["last attention"][i], seen["last keys"][i])


def outlying_by(row: Tensor, keys: Tensor) -> tuple[list[int], Sums]:
    attention = row.tolist()
    chosen = sorted(sorted(range(16), key=lambda j: -attention[j])[:3])
    made, host = by_prumerge(attention, keys.tolist(), chosen, 3)
    assert host is not None
    return [*chosen, host], made


def averaged(seen: dict[str, Tensor], i: int) -> tuple[list[int], Sums]:
    """The four quarters of a 4 × 4 grid, each at its first cell."""
    made: Sums = {}
    for top in (0, 8):
        for left in (top, top + 2):
            made[left] = dict.fromkeys((left, left + 1, left + 4, left + 5), 0.25)
    return list(made), made


@pytest.mark.parametrize(
    ("pruner", "by_hand"),
    [
        (VisionZip(keep=5, contextual_ratio=0.4), zipped),
        (PruMerge(keep=4, plus=False, neighbours=3), outlying),
        (PruMerge(4, False, neighbours=3, heads="mean"), outlying_of_means),
        (AveragePooling(keep=4), averaged),
        (AveragePooling(keep=4, where="projected"), averaged),
    ],
    ids=["visionzip", "prumerge", "prumerge of means", "pooled features", "pooled projections"],
)
def test_what_is_merged_equals_sums_by_hand(pruner: Any, by_hand: Any) -> None:
    built = model(attention="eager")
    req = request(built, [1, 2, 0])
    with torch.no_grad(), pruner(built) as handle:
        logits = built(**req.inputs).logits
    assert handle.report is not None

    seen = seen_of(built, req.inputs["pixel_values"])
    project = built.model.multi_modal_projector
    made, plain = [], []
    for i, features in enumerate(seen["features"]):
        order, sums = by_hand(seen, i)
        assert sorted(order) == handle.report.kept[i].tolist()
        source = project(features) if getattr(pruner, "where", "") == "projected" else features
        rows = []
        for token in order:
            weights = sums.get(token, {token: 1.0})
            rows.append(sum(w * source[j] for j, w in weights.items()))
        total = torch.stack(rows)
        made.append(total if source is not features else project(total))
        plain.append(project(features[order]))
    expected = lined_up(built, req.inputs, made)
    assert logits.shape == expected.shape
    real = logits.shape[1] - lengths(req.inputs, made)
    for row, start in enumerate(real.tolist()):
        assert float((logits - expected)[row, start:].abs().max()) < TOLERANCE
    # Controls: kept tokens as they were, and the last ones in their own places.
    control = lined_up(built, req.inputs, plain)
    assert float((logits - control)[1, real[1] :].abs().max()) > DIFFERENT
    if by_hand is not averaged:
        turned = lined_up(built, req.inputs, [m.roll(1, 0) for m in made])
        assert float((logits - turned)[1, real[1] :].abs().max()) > DIFFERENT


def lengths(inputs: dict[str, Tensor], made: list[Tensor]) -> Tensor:
    """Columns of each row once its images are shortened; all have the same number of tokens."""
    images = (inputs["input_ids"] == IMAGE).sum(1) // 16
    return inputs["attention_mask"].sum(1) - images * (16 - len(made[0]))


def lined_up(built: Any, inputs: dict[str, Tensor], made: list[Tensor]) -> Tensor:
    """Logits of prompts whose images are given as embeddings, padded left, renumbered."""
    images, rows = list(made), []
    embed = built.get_input_embeddings()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        parts, run = [], 0
        for token in ids[mask.bool()].tolist():
            if token != IMAGE:
                parts.append(embed(torch.tensor([token])))
                continue
            if run % 16 == 0:
                parts.append(images.pop(0))
            run += 1
        rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    blank = embed(torch.tensor([PAD]))
    padded = [torch.cat((blank.expand(longest - len(row), -1), row)) for row in rows]
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        states = built.model.language_model(
            inputs_embeds=torch.stack(padded),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state
        return built.lm_head(states)


def test_cdpruner_answers_to_the_question() -> None:
    built = model()
    req = request(built, [1])
    kept = []
    for ids in (req.inputs["input_ids"], req.inputs["input_ids"].clone()):
        if kept:
            ids[0, -5:] = torch.tensor([9, 33, 21, 47, 58])
        with torch.no_grad(), CDPruner(keep=5)(built) as handle:
            built(**(req.inputs | {"input_ids": ids}))
        assert handle.report is not None and "text embeddings" in handle.report.score
        kept.append(handle.report.kept[0].tolist())
    assert kept[0] != kept[1]


def test_the_embedded_model_answers() -> None:
    """Every method at 64 of 256 tokens; a video method lets the image pass."""
    built, processor = embedded.load()
    picture = Image.open(sorted(embedded.scenes().glob("*.jpg"))[0])
    inputs = processor(
        text="USER: <image>\nwhere is the cat? ASSISTANT:", images=picture, return_tensors="pt"
    )
    names = {name.partition(" ")[0] for name in PLAIN} | {
        "visionzip",
        "prumerge",
        "average_pooling",
    }
    for name in sorted(names):
        with METHODS[name](keep=64)(built) as handle:
            out = built.generate(**inputs, max_new_tokens=3)
        assert handle.report is not None
        assert [len(kept) for kept in handle.report.kept] == [64], name
        new = out[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip(), name
    with EVS(keep=64)(built) as handle:
        built.generate(**inputs, max_new_tokens=1)
    assert handle.report is not None and len(handle.report.kept[0]) == 256
    assert bool(handle.report.roles[0]["whole"].all())
