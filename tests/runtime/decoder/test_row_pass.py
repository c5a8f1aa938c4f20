"""Rows dropped between decoder layers: equal to masking, and to layers run by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from deep import STEPS, Ordered, deep, dropped_by_layer, generate
from hidden import hiding
from tiny import IMAGE, Request, request
from vlmprune.methods import FastV, PyramidDrop
from vlmprune.pruner import Pruner
from vlmprune.views import Ask, RowView

pytestmark = pytest.mark.oracle


METHODS = {
    "FastV": FastV(keep=5),
    "FastV after the first layer": FastV(keep=0.3, layer=1),
    "PyramidDrop": PyramidDrop(positions="original"),
    "PyramidDrop in two stages": PyramidDrop(ratio=0.4, stages=2, positions="original"),
}
BATCHES = {"one image": [1], "several images": [3], "padded batch": [2, 1, 0]}


@pytest.mark.parametrize(
    ("method", "attention", "batch"), list(product(METHODS, ["sdpa", "eager"], BATCHES))
)
def test_dropping_equals_masking(method: str, attention: str, batch: str) -> None:
    """Through `generate`, with caches of unequal length."""
    built, pruner = deep(attention), METHODS[method]
    req = request(built, BATCHES[batch])
    with pruner(built) as handle:
        pruned = generate(built, req.inputs)
    assert handle.report is not None
    dropped = dropped_by_layer(req, handle.report)
    assert min(dropped) == min(pruner.asks(5)) and max(dropped) == 4
    with hiding(built, dropped):
        expected = generate(built, req.inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE
    # Controls: other tokens dropped, and one layer later.
    with hiding(built, {layer: one.flip(1) for layer, one in dropped.items()}):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT
    with hiding(built, {layer: one for layer, one in dropped.items() if layer > min(dropped)}):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.parametrize(("attention", "side"), list(product(["sdpa", "eager"], ["left", "right"])))
def test_a_plain_forward_equals_masking(attention: str, side: str) -> None:
    """At every row that went all the way, with padding on either side."""
    built = deep(attention)
    req = request(built, [2, 1, 0], text=[3, 6, 9], side=side)
    for pruner in (FastV(keep=4), PyramidDrop(positions="original")):
        with torch.no_grad(), pruner(built) as handle:
            pruned = built(**req.inputs).logits
        assert handle.report is not None
        dropped = dropped_by_layer(req, handle.report)
        with torch.no_grad(), hiding(built, dropped):
            expected = built(**req.inputs).logits
        going = req.inputs["attention_mask"].bool() & ~dropped[4]
        assert pruned.shape == expected.shape
        assert float((pruned - expected)[going].abs().max()) < TOLERANCE
        assert float((pruned - expected)[dropped[4]].abs().max()) > DIFFERENT


# How a prompt goes on, by hand: one sample, no padding, no cache, each layer on its own.


def by_hand(
    built: Any, embedded: Tensor, tokens: list[int], stages: dict[int, Any], policy: str
) -> Tensor:
    """Logits of the last position after a prompt and some tokens.

    Args:
        built: the model.
        embedded: [1, n, D] the prompt.
        tokens: what came after it.
        stages: by layer, (columns so far, states) → (columns in their new order, states).
        policy: of positions.
    """
    decoder = built.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    new = built.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
    hidden = torch.cat((embedded, new), dim=1)
    columns = list(range(embedded.shape[1]))
    positions = list(range(hidden.shape[1]))
    for index, layer in enumerate(decoder.layers):
        if index in stages:
            count = len(columns)
            before = dict(zip(columns, positions[:count], strict=True))
            prompt, rest = hidden[:, :count], hidden[:, count:]
            columns, prompt = stages[index](columns, prompt)
            hidden = torch.cat((prompt, rest), dim=1)
            later = positions[count:]
            positions = [before[c] for c in columns] + later
            if policy == "compact":
                positions = list(range(hidden.shape[1]))
        n = hidden.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if built.config.get_text_config()._attn_implementation == "eager":
            causal = torch.zeros(1, 1, n, n).masked_fill(~causal, torch.finfo(torch.float32).min)
        angles = decoder.rotary_emb(hidden, position_ids=torch.tensor([positions]))
        hidden = layer(hidden, attention_mask=causal, position_embeddings=angles)
    return built.lm_head(decoder.norm(hidden))[0, -1]


def embedded_rows(built: Any, req: Request) -> list[Tensor]:
    """[1, n, D] of each sample without its padding, as the first layer gets it."""
    seen: list[Tensor] = []
    decoder = built.get_decoder()
    first = getattr(decoder, "model", decoder).layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        built(**req.inputs)
    hook.remove()
    mask = req.inputs["attention_mask"].bool()
    return [seen[0][row, mask[row]][None] for row in range(len(mask))]


def ordered_by_hand(images: list[list[int]]) -> dict[int, Any]:
    """The same stages for one sample, whose images have these columns."""

    def first(columns: list[int], hidden: Tensor) -> tuple[list[int], Tensor]:
        visual = [c for image in images for c in image]
        kept = [c for i, c in enumerate(visual) if i % 3 != 0]
        last = [c for i, c in enumerate(visual) if i % 4 == 1 and c in kept]
        order: list[int] = []
        for image in images:
            own = [c for c in image if c in kept]
            order += [c for c in own if c not in last] + [c for c in own if c in last]
        places = iter(order)
        out = [next(places) if c in kept else c for c in columns if c in kept or c not in visual]
        states = torch.stack([hidden[0, c] * (2 if c in last else 1) for c in out])[None]
        return out, states

    def second(columns: list[int], hidden: Tensor) -> tuple[list[int], Tensor]:
        visual = [c for c in columns if any(c in image for image in images)]
        kept = visual[::2]
        places = [i for i, c in enumerate(columns) if c in kept or c not in visual]
        return [columns[i] for i in places], hidden[:, places]

    return {1: first, 3: second}


@pytest.mark.parametrize(
    ("attention", "policy"), list(product(["sdpa", "eager"], ["compact", "original"]))
)
@torch.no_grad()
def test_order_states_and_positions_equal_layers_run_by_hand(attention: str, policy: str) -> None:
    """A padded batch through `generate`, against each sample alone without any cache."""
    built = deep(attention)
    req = request(built, [2, 1, 0])
    embedded = embedded_rows(built, req)
    with Ordered(positions=policy)(built) as handle:
        pruned = generate(built, req.inputs)
    assert handle.report is not None and handle.report.positions == policy
    prompt = req.inputs["input_ids"].shape[1]
    far = 0.0
    for row, states in enumerate(embedded):
        ids = req.inputs["input_ids"][row, req.inputs["attention_mask"][row].bool()].tolist()
        visual = [c for c, token in enumerate(ids) if token == IMAGE]
        images = [visual[i : i + 16] for i in range(0, len(visual), 16)]
        stages = ordered_by_hand(images)
        tokens = pruned.sequences[row, prompt:].tolist()
        for step in range(STEPS):
            got = pruned.logits[step][row]
            expected = by_hand(built, states, tokens[:step], stages, policy)
            assert float((got - expected).abs().max()) < TOLERANCE
            if visual:
                other = "compact" if policy == "original" else "original"
                control = by_hand(built, states, tokens[:step], stages, other)
                far = max(far, float((got - control).abs().max()))
                # Order matters too: merged rows in their own places are another model.
                plain = {3: stages[3], 1: _in_order(stages[1])}
                control = by_hand(built, states, tokens[:step], plain, policy)
                assert float((got - control).abs().max()) > DIFFERENT
    assert far > DIFFERENT


class Shown(Pruner):
    """Drops nothing and keeps what it was shown."""

    stage: ClassVar[str] = "inside the language model"

    def __init__(self, asks: dict[int, Ask]) -> None:
        self.asked, self.views = asks, dict[int, RowView]()
        self.embedded: RowView | None = None

    def asks(self, depth: int) -> Mapping[int, Ask]:
        return self.asked

    def raters(self, view: RowView) -> Tensor:
        self.embedded = view
        return view.after & (torch.arange(view.text.shape[1]) % 2 == 0)

    def drop(self, layer: int, view: RowView) -> None:
        self.views[layer] = view


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_method_sees(attention: str, side: str) -> None:
    """Against the weights that eager attention returns, and the states between layers."""
    built = deep("eager")
    req = request(built, [2, 1, 0], text=[3, 6, 9], side=side)
    full = built(**req.inputs, output_attentions=True, output_hidden_states=True)
    built.set_attn_implementation(attention)
    own, rated = Ask("own"), Ask("previous", "raters", keys=True)
    pruner = Shown({2: Ask("previous"), 3: own, 4: rated})
    with pruner(built):
        assert torch.equal(built(**req.inputs).logits, built(**req.inputs).logits)
    decoder = built.get_decoder()
    layers = getattr(decoder, "model", decoder).layers
    places = (req.inputs["input_ids"] == IMAGE, req.inputs["attention_mask"].bool())
    for row in range(3):
        visual = (places[0][row] & places[1][row]).nonzero()[:, 0]
        text = (~places[0][row] & places[1][row]).nonzero()[:, 0]
        last = int(places[1][row].nonzero()[-1])
        first = int(visual[0]) if len(visual) else 10**6
        raters = text[::2][text[::2] > first]
        n = len(visual)
        for layer, queries in ((2, [last]), (3, [last]), (4, raters.tolist())):
            view = pruner.views[layer]
            weights = full.attentions[layer if layer == 3 else layer - 1][row].mean(0)
            assert view.attention is not None
            got = view.attention[row]
            assert torch.allclose(got[:n], weights[queries][:, visual].mean(0), atol=1e-6) or not n
            assert not bool(got[n:].any())
            states = full.hidden_states[layer][row]
            assert torch.allclose(view.hidden[row, :n], states[visual], atol=1e-5)
            assert torch.allclose(view.text_hidden[row, : len(text)], states[text], atol=1e-5)
            assert view.images[row].tolist() == ([0] * 16 + [1] * 16)[:n] + [-1] * (32 - n)
            assert (
                view.counts[row].tolist()
                == view.before[row].tolist()
                == [16 * (n > 15), 16 * (n > 16)]
            )
            assert view.text[row].tolist() == [True] * len(text) + [False] * (
                view.text.shape[1] - len(text)
            )
            assert view.after[row, : len(text)].tolist() == [c > first for c in text.tolist()]
        keys = pruner.views[4]
        assert pruner.views[2].keys is None and keys.keys is not None and keys.text_keys is not None
        # Keys before rotary embedding differ, of the same norm in every pair; heads side by side.
        states = layers[3].input_layernorm(full.hidden_states[3][row])
        plain = layers[3].self_attn.k_proj(states).view(len(states), 2, 8)
        for got, columns in ((keys.keys, visual), (keys.text_keys, text)):
            norm = got[row, : len(columns)].view(-1, 2, 2, 4).pow(2).sum(2)
            wanted = plain[columns].view(-1, 2, 2, 4).pow(2).sum(2)
            assert torch.allclose(norm, wanted, atol=1e-4)
    assert pruner.embedded is not None and pruner.embedded.attention is None
    assert [view.depth for view in (pruner.embedded, *pruner.views.values())] == [5] * 4


@torch.no_grad()
def test_the_methods_keep_what_the_last_token_attends_to() -> None:
    """Worked out from eager attention, by plain sorting."""
    built = deep("eager")
    req = request(built, [2, 1])
    full = built(**req.inputs, output_attentions=True)
    for pruner, index in ((FastV(keep=5, layer=3), 2), (PyramidDrop(stages=1), 2)):
        with pruner(built) as handle:
            built(**req.inputs)
        assert handle.report is not None
        kept, found = list(handle.report.kept), []
        for row, images in enumerate((2, 1)):
            weights = full.attentions[index][row].mean(0)[-1]
            visual = (req.inputs["input_ids"][row] == IMAGE).nonzero()[:, 0].tolist()
            parts = [visual[i : i + 16] for i in range(0, 16 * images, 16)]
            if isinstance(pruner, FastV):
                best = sorted(visual, key=lambda c: -float(weights[c]))[: 5 * images]
            else:
                best = [
                    c for own in parts for c in sorted(own, key=lambda c: -float(weights[c]))[:8]
                ]
            found += [[i for i, c in enumerate(own) if c in best] for own in parts]
        assert [one.tolist() for one in kept] == found


def _in_order(stage: Any) -> Any:
    """A stage whose rows stay in the order of their columns."""

    def sorted_stage(columns: list[int], hidden: Tensor) -> tuple[list[int], Tensor]:
        columns, hidden = stage(columns, hidden)
        order = sorted(range(len(columns)), key=lambda i: columns[i])
        return [columns[i] for i in order], hidden[:, order]

    return sorted_stage
