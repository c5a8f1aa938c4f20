"""Methods that drop rows inside the language model: their choices and their answers."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from answers import DIFFERENT, TOLERANCE
from plain import best, of_image, raters, recycled, unlike
from stepwise import Decide, Outcome, Seen, samples, stepwise
from tiny import EOS, PAD, VOCABULARY, model, request, tower
from vlmprune import DART, GSearch, PSigmoid, SparseVLM, VisionZip, VlmpruneError, embedded
from vlmprune.methods.sparsevlm import stages

LAYERS, TOKENS, STEPS = 5, 64, 4
BATCH = [1, 2, 0]
RATES = (1.0, 0.6, 0.35, 0.35, 0.1)


@cache
def built(attention: str = "sdpa", depth: int = LAYERS) -> Any:
    """Five decoder layers, and images of 64 tokens."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    vision = tower()
    vision.patch_size = 7
    one = model("llava", attention, text_config=text, vision_config=vision)
    with torch.no_grad():
        # A norm whose weights are all one would change no cosine.
        weight = one.get_decoder().norm.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).exp())
    return one


def generate(one: Any, **inputs: Any) -> Any:
    return one.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def share(rate: float, n: int) -> int:
    return max(1, int(rate * n + 0.5))


def by_rates(rates: tuple[float, ...]) -> Decide:
    """G-Search and P-Sigmoid, restated."""

    def decide(layer: int, seen: Seen) -> tuple[list[int], Tensor] | None:
        if rates[layer] == rates[layer - 1] or max(seen.images) < 0:
            return None
        rows = seen.own() if layer == 1 else seen.attention
        assert rows is not None
        scores = rows[len(seen.images) - 1].tolist()
        kept = of_image(seen.images, -1)
        for image in range(max(seen.images) + 1):
            kept += best(scores, of_image(seen.images, image), share(rates[layer], TOKENS))
        return sorted(kept), seen.hidden[sorted(kept)]

    return decide


def by_pivots(keep: int, at: int, normed: bool = True) -> Decide:
    """DART, restated."""

    def decide(layer: int, seen: Seen) -> tuple[list[int], Tensor] | None:
        if layer != at or max(seen.images) < 0:
            return None
        assert seen.keys is not None
        states = seen.normed if normed else seen.hidden
        vectors, norms = states.tolist(), seen.keys.abs().sum(dim=1).tolist()
        words = [i for i in of_image(seen.images, -1) if i > seen.images.index(0)]
        kept = of_image(seen.images, -1)
        for image in range(max(seen.images) + 1):
            own = of_image(seen.images, image)
            parts = [[of[i] for i in places] for places in (own, words) for of in (vectors, norms)]
            kept += [own[i] for i in unlike(*parts, keep)]
        return sorted(kept), seen.hidden[sorted(kept)]

    return decide


def by_raters(counts: dict[int, int], part: float = 0.3) -> Decide:
    """SparseVLM, restated."""

    def decide(layer: int, seen: Seen) -> tuple[list[int], Tensor] | None:
        if layer not in counts or max(seen.images) < 0:
            return None
        assert seen.attention is not None
        embedded_prompt, first = seen.first
        words = [i for i in of_image(first, -1) if i > first.index(0)]
        visual = [i for i, one in enumerate(first) if one >= 0]
        rate = raters(embedded_prompt[visual].tolist(), embedded_prompt[words].tolist())
        asked = [w for w, yes in zip(words, rate, strict=True) if yes]
        assert 0 < len(asked) < len(words)
        # Text behind the first image is numbered from the end, for rows have gone before it.
        text, gone = of_image(seen.images, -1), len(of_image(first, -1))
        order = {w: text[i - gone] for i, w in enumerate(of_image(first, -1))}
        scores = seen.attention[[order[w] for w in asked]].mean(dim=0).tolist()
        places: list[int] = []
        states: list[list[float]] = []
        vectors = seen.hidden.tolist()
        for row, image in enumerate(seen.images):
            if image < 0:
                places.append(row)
                states.append(vectors[row])
            if image < 0 or (row and seen.images[row - 1] == image):
                continue
            own = of_image(seen.images, image)
            kept = sorted(best(scores, own, counts[layer]))
            dropped = [i for i in own if i not in kept]
            merged = recycled(vectors, scores, dropped, part) if part else []
            chosen = sorted(best(scores, dropped, int(len(dropped) * part) + 1))
            places += [*kept, *chosen[: len(merged)]]
            states += [vectors[i] for i in kept] + merged
        return places, torch.tensor(states)

    return decide


SIGMOID = PSigmoid(keep=0.4, k=0.8)
METHODS: dict[str, tuple[Any, Decide]] = {
    "gsearch": (GSearch(rates=RATES), by_rates(RATES)),
    "psigmoid": (SIGMOID, by_rates(SIGMOID.rates(LAYERS, 0.4))),
    "psigmoid of 20": (
        PSigmoid(keep=20, k=0.8),
        by_rates(SIGMOID.rates(LAYERS, 20 / TOKENS)),
    ),
    "dart": (DART(keep=21), by_pivots(21, 2)),
    "dart before the norm": (DART(keep=21, normed=False), by_pivots(21, 2, normed=False)),
    "sparsevlm": (SparseVLM(keep=12), by_raters({1: 29, 2: 8, 3: 3})),
    "sparsevlm without merging": (
        SparseVLM(keep=12, recycle=0),
        by_raters({1: 29, 2: 8, 3: 3}, 0),
    ),
}


def references(name: str, pruned: Any, compact: bool) -> list[Outcome]:
    """What each row of the batch should have come to."""
    eager = built("eager")
    req = request(eager, BATCH)
    new = pruned.sequences[:, req.inputs["input_ids"].shape[1] : -1]
    return [
        stepwise(eager, ids, pixels, prompt, METHODS[name][1], compact)
        for ids, pixels, prompt in samples(req, BATCH, new)
    ]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "attention"), list(product(METHODS, ["sdpa", "eager"])))
def test_equals_the_reference(name: str, attention: str) -> None:
    one, pruner = built(attention), METHODS[name][0]
    req = request(one, BATCH)
    with pruner(one) as handle:
        pruned = generate(one, **req.inputs)
    assert handle.report is not None
    compact = name.startswith("sparsevlm")
    expected = references(name, pruned, compact)
    for row, outcome in enumerate(expected):
        for step, logits in enumerate(pruned.logits):
            assert float((logits[row] - outcome.logits[step]).abs().max()) < TOLERANCE
    # The report names the tokens of each layer.
    for layer in handle.report.layers:
        kept = [one.tolist() for one in layer.kept]
        reached = [one for outcome in expected for one in outcome.reached[layer.index]]
        if "sparsevlm" not in name:
            assert kept == reached
        assert [len(one) for one in kept] == [len(one) for one in reached]
    # Controls: the model without pruning, and the other position policy, must differ.
    plain = generate(one, **req.inputs)
    assert float((pruned.logits[0][:2] - plain.logits[0][:2]).abs().max()) > DIFFERENT
    other = references(name, pruned, not compact)
    assert float((pruned.logits[0][0] - other[0].logits[0]).abs().max()) > DIFFERENT


def test_the_norm_changes_what_dart_keeps() -> None:
    one = built()
    req = request(one, BATCH)
    kept = []
    for normed in (True, False):
        with DART(keep=21, normed=normed)(one) as handle:
            generate(one, **req.inputs)
        assert handle.report is not None
        kept.append([k.tolist() for k in handle.report.kept])
    assert all(a != b for a, b in zip(*kept, strict=True))


def test_a_decoder_without_a_final_norm_is_refused() -> None:
    one = copy.deepcopy(built())
    del one.get_decoder().norm
    with pytest.raises(VlmpruneError, match=r"no final norm, so states .* set normed=False"):
        DART(keep=21).attach(one)
    DART(keep=21, normed=False).attach(one).detach()


def test_the_report_tells_where_merged_tokens_went() -> None:
    """By hand from what `drop` said at each stage; a token may go on inside a merged row."""
    one = built()
    req = request(one, BATCH)
    said: list[Any] = []

    class Told(SparseVLM):
        def drop(self, layer: int, view: Any) -> Any:
            found = super().drop(layer, view)
            said.append((view.images, found))
            return found

    with Told(keep=16)(one) as handle:
        generate(one, **req.inputs)
    assert handle.report is not None and len(said) == 3
    got = [into.tolist() for into in handle.report.members]
    for image, (row, own) in enumerate([(0, 0), (1, 0), (1, 1)]):
        present = list(range(TOKENS))
        ends = dict(zip(present, present, strict=True))
        for images, found in said:
            places = [v for v, i in enumerate(images[row].tolist()) if i == own]
            names = dict(zip(places, present, strict=True))
            step = {}
            for place, name in names.items():
                went = int(found.members[row, place])
                step[name] = name if found.kept[row, place] else names.get(went, -1)
            ends = {token: step.get(now, -1) for token, now in ends.items()}
            # Merged rows come behind the others.
            later = [v for v in places if found.kept[row, v] and found.last[row, v]]
            first = [v for v in places if found.kept[row, v] and v not in later]
            present = [names[v] for v in first + later]
        assert got[image] == [ends[token] for token in range(TOKENS)]
        kept = handle.report.kept[image].tolist()
        assert sorted(present) == kept and {i for i in got[image] if i >= 0} == set(kept)
        assert sum(i >= 0 for i in got[image]) > len(kept) and -1 in got[image]
    with SparseVLM(keep=16, recycle=0)(one) as handle:
        generate(one, **req.inputs)
    assert handle.report is not None and handle.report.members == []
    # Behind a stage that merges, tokens are followed through both.
    with (VisionZip(keep=32) | SparseVLM(keep=8))(one) as handle:
        generate(one, **req.inputs)
    assert handle.report is not None
    for into, left in zip(handle.report.members, handle.report.kept, strict=True):
        assert {i for i in into.tolist() if i >= 0} == set(left.tolist())
        assert into[left].tolist() == left.tolist()
    assert sum(int((one >= 0).sum()) for one in handle.report.members) > sum(
        len(one) for one in handle.report.kept
    )


def test_kept_sets_nest_and_the_mean_is_the_budget() -> None:
    one = built()
    req = request(one, BATCH)
    for keep in (0.1, 0.35, 0.8, 24):
        with PSigmoid(keep=keep)(one) as handle:
            generate(one, **req.inputs)
        assert handle.report is not None
        by_layer = [layer.kept for layer in handle.report.layers]
        for shallow, deep in pairwise(by_layer):
            for before, after in zip(shallow, deep, strict=True):
                assert set(after.tolist()) <= set(before.tolist())
        wanted = keep if isinstance(keep, int) else keep * TOKENS
        for image in range(3):
            mean = sum(len(kept[image]) for kept in by_layer) / (LAYERS - 1)
            # Each layer rounds by half a token at most.
            assert abs(mean - wanted) <= 0.5
            assert len(by_layer) == LAYERS - 1


def test_defaults_are_the_authors() -> None:
    dart = DART(keep=128)
    assert (dart.layer, dart.image_pivots, dart.text_pivots) == (2, 4, 4)
    assert dart.normed
    assert SparseVLM(keep=192).recycle == 0.3 and SparseVLM.released == "compact"
    assert DART.released == GSearch.released == PSigmoid.released == "original"
    # Layers 2, 6 and 15 of 32 are pruned behind.
    assert stages(32) == [3, 7, 16]
    assert {layer: (a.attention, a.queries) for layer, a in SparseVLM(keep=1).asks(32).items()} == {
        3: ("previous", "raters"),
        7: ("previous", "raters"),
        16: ("previous", "raters"),
    }


def test_wrong_settings_are_refused() -> None:
    for wrong, words in (
        (lambda: DART(keep=0), "keep=0 leaves no visual tokens"),
        (lambda: DART(keep=4, layer=0), "layer=0 is not a whole number of 1 or more"),
        (lambda: DART(keep=4, image_pivots=0), "image_pivots=0"),
        (lambda: DART(keep=4, text_pivots=1.5), "text_pivots=1.5"),
        (lambda: DART(keep=4, normed=1), "normed=1 is neither"),
        (lambda: SparseVLM(keep=1.5), "keep=1.5 is a fraction outside"),
        (lambda: SparseVLM(keep=4, recycle=2), "recycle=2 is not a share"),
        (lambda: PSigmoid(keep=4, k=0), "k=0 is not a number above 0"),
        (lambda: PSigmoid(keep=0.5, positions="gaps"), "positions='gaps'"),
        (lambda: GSearch(rates="1", positions="gaps"), "positions='gaps'"),
    ):
        with pytest.raises(VlmpruneError, match=words):
            wrong()
    one = built()
    for pruner, words in (
        (DART(keep=4, layer=5), "layer=5 is not among this model's 5 decoder layers; use 1 to 4"),
        (GSearch(rates="1;0.5;0.5"), "for 3 decoder layers and this model has 5"),
        (GSearch(rates=RATES, calibrated_on="another"), "another"),
    ):
        with pytest.raises(VlmpruneError, match=words):
            pruner.attach(one)
    for pruner in (SparseVLM(keep=0.5), PSigmoid(keep=0.5)):
        with pytest.raises(VlmpruneError, match="needs 2 decoder layers or more"):
            pruner.attach(built(depth=1))
    # The architecture that it was found on is taken.
    GSearch(rates=RATES, calibrated_on=SparseVLM(keep=4).attach(one).architecture).attach(one)


@pytest.mark.parametrize(
    ("pruner", "counts"),
    [
        (DART(keep=0.25), [1, 1, 0.25, 0.25, 0.25]),
        (GSearch(rates=(1, 0.5, 0.25, 0.25, 0.1)), [1, 0.5, 0.25, 0.25, 0.1]),
        (PSigmoid(keep=0.3), None),
        (SparseVLM(keep=1 / 9, recycle=0), [1, 66 / 576, 30 / 576, 17 / 576, 17 / 576]),
    ],
)
def test_on_the_embedded_model(pruner: Any, counts: list[float] | None) -> None:
    one, processor = embedded.load()
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[0, 20:40, 10:30] = 255
    text = "USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor(text=text, images=picture, return_tensors="pt")
    with pruner(one) as handle:
        out = generate(one, **inputs)
    report = handle.report
    assert report is not None and len(out.sequences[0]) > inputs["input_ids"].shape[1]
    n = report.visual_tokens_before
    rates = counts or list(pruner.rates(LAYERS, pruner.keep))
    seen = [n] * LAYERS
    for layer in report.layers:
        seen[layer.index] = len(layer.kept[0])
    assert seen == [share(rate, n) for rate in rates]
    assert report.visual_tokens_after == seen[-1]
    assert report.flops_after < report.flops_before
    assert report.kv_bytes_after * n * LAYERS == report.kv_bytes_before * sum(seen)
