"""QueCC: against a slow re-statement, its windows, what its tokens do in a host, its gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from plain import tiled
from tiny import IMAGE, model, positions_of, request
from tiny import dropped_columns as dropped_of
from vlmprune import QueCC, VisPruner, VlmpruneError
from vlmprune.methods.quecc import Compressor, states_of
from vlmprune.select.windows import windows
from vlmprune.views import EncoderView, Selection

Vector = list[float]
SMALL = {
    "window": 2, "heads": 2, "hidden": 5, "states": [0, 2], "features": 8, "language": 6,
    "tower": 7, "activation": "gelu", "bias": True,
}  # fmt: skip


def loud(module: torch.nn.Module, seed: int = 0) -> Any:
    """With weights so large that errors show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise * 0.3 + name.endswith("weight"))
    return module.eval()


def quecc(built: Any, seed: int = 0, **hyper: Any) -> QueCC:
    pruner = QueCC.fresh(built, **{"window": 3, "heads": 4, **hyper})
    loud(pruner.module, seed)
    return pruner


# The slow re-statement: one number at a time, in Python's float64.


def dot(one: Vector, other: Vector) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def linear(weights: dict[str, Any], name: str, given: Vector) -> Vector:
    rows, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [dot(row, given) + b for row, b in zip(rows, bias, strict=True)]


def gelu(given: Vector) -> Vector:
    return [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in given]


def normed(weights: dict[str, Any], name: str, given: Vector) -> Vector:
    mean = sum(given) / len(given)
    spread = math.sqrt(sum((x - mean) ** 2 for x in given) / len(given) + 1e-6)
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [(x - mean) / spread * w + b for x, w, b in zip(given, scale, shift, strict=True)]


def perceptron(weights: dict[str, Any], name: str, given: Vector) -> Vector:
    inner = gelu(linear(weights, f"{name}.0", given))
    return normed(weights, f"{name}.3", linear(weights, f"{name}.2", inner))


def restated(
    module: Compressor, features: Tensor, deep: Tensor, question: Tensor, cells: list[list[int]]
) -> list[Vector]:
    """One token for each window of one crop; `cells` are the windows' cells that count."""
    weights = {name: w.double().tolist() for name, w in module.state_dict().items()}
    wide, heads = module.pool.weight.shape[0], module.attention.num_heads
    side = wide // heads
    text = normed(weights, "text.1", linear(weights, "text.0", question.tolist()))
    kernel, into = weights["pool.weight"], weights["attention.in_proj_weight"]
    width = round(math.sqrt(len(kernel[0][0]) * len(kernel[0][0][0])))
    found = []
    for window in cells:
        pooled = list(weights["pool.bias"])
        for place, cell in window:  # type: ignore[misc]
            asked = [x + t for x, t in zip(features[cell].tolist(), text, strict=True)]
            one = perceptron(weights, "queries", asked)
            for c in range(wide):
                pooled[c] += kernel[c][0][place // width][place % width] * one[c]

        def project(part: int, given: Vector) -> Vector:
            rows = into[part * wide : (part + 1) * wide]
            bias = weights["attention.in_proj_bias"][part * wide : (part + 1) * wide]
            return [dot(row, given) + b for row, b in zip(rows, bias, strict=True)]

        query = project(0, pooled)
        keys = [
            project(1, perceptron(weights, "keys", deep[c].tolist()))
            for _, c in window  # type: ignore[misc]
        ]
        values = [
            project(2, perceptron(weights, "values", deep[c].tolist()))
            for _, c in window  # type: ignore[misc]
        ]
        mixed: Vector = []
        for head in range(heads):
            own = range(head * side, (head + 1) * side)
            scores = [sum(query[i] * key[i] for i in own) / math.sqrt(side) for key in keys]
            paid = [math.exp(s - max(scores)) for s in scores]
            mixed += [
                sum(p * value[i] for p, value in zip(paid, values, strict=True)) / sum(paid)
                for i in own
            ]
        out = linear(weights, "attention.out_proj", mixed)
        hidden = gelu(linear(weights, "projector.linear_1", out))
        found.append(linear(weights, "projector.linear_2", hidden))
    return found


@pytest.mark.parametrize(("grid", "side"), [((3, 5), 2), ((4, 4), 2), ((2, 3), 4)])
def test_forward_is_the_slow_restatement(grid: tuple[int, int], side: int) -> None:
    """Windows that the side divides and that it does not, with cells that do not count."""
    module = loud(Compressor(SMALL | {"window": side}))
    generator = torch.Generator().manual_seed(1)
    cells = grid[0] * grid[1]
    features = torch.randn(2, cells, 8, generator=generator)
    deep = torch.randn(2, cells, 14, generator=generator)
    question = torch.randn(2, 6, generator=generator)
    seen = torch.ones(2, cells, dtype=torch.bool)
    seen[1, [0, cells - 1]] = False
    with torch.no_grad():
        found = module(features, deep, question, windows(grid, side), seen)
        other = module(features, deep, question.flip(0), windows(grid, side), seen)
        unasked = module(features, deep, question, windows(grid, side), torch.ones_like(seen))
    for crop in range(2):
        every = tiled(*grid, side)
        mine = [[(p, c) for p, c in window if seen[crop, c]] for window in every]
        real = [i for i, window in enumerate(mine) if window]
        want = restated(module, features[crop], deep[crop], question[crop], [mine[i] for i in real])
        torch.testing.assert_close(found[crop, real], torch.tensor(want), rtol=1e-4, atol=1e-5)
    # Another question, or cells that did not count, make other tokens.
    assert (found - other).abs().max() > 1e-3
    assert (found[1, 0] - unasked[1, 0]).abs().max() > 1e-3
    assert torch.equal(found[0], unasked[0])


def test_the_papers_states() -> None:
    assert states_of(24) == [11, 15, 21, 22], "hidden states 12, 16, 22, 23; 0 is the embedding"
    assert states_of(12) == [5, 7, 10] and states_of(3) == [0, 1] and states_of(1) == [0]


def shown(built: Any, pruner: QueCC, inputs: dict[str, Tensor]) -> tuple[EncoderView, Selection]:
    """What the method sees of a request, and chooses."""
    seen: list[Any] = []

    class Watched(QueCC):
        def select(self, view: EncoderView) -> Selection:
            seen.append((view, super().select(view)))
            return seen[-1][1]

    watched = object.__new__(Watched)
    vars(watched).update(vars(pruner))
    with torch.no_grad(), watched(built):
        built(**inputs)
    return seen[0]


@cache
def host(family: str = "llava", kind: str = "clip") -> Any:
    return model(family, kind=kind)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_stand_where_the_kept_cells_are(positions: Any, side: str) -> None:
    """Several images a prompt: the language model on embeddings that are put together by hand."""
    built = host()
    pruner = replace_positions(quecc(built), positions)
    req = request(built, [2, 0, 1], text=[3, 6, 4], side=side)
    with torch.no_grad(), pruner(built) as handle:
        found = built(**req.inputs).logits
    assert handle.report is not None
    kept = handle.report.kept
    # Of 4 x 4 cells windows of 3: sides 3 and 1.
    assert [k.tolist() for k in kept] == [[5, 7, 13, 15]] * 3
    view, selection = shown(built, pruner, req.inputs)
    assert selection.tokens is not None and selection.members is not None
    wide = [c + 16 * 2 for c in (5, 5, 5, 7, 5, 5, 5, 7, 5, 5, 5, 7, 13, 13, 13, 15)]
    assert selection.members[2].tolist() == wide
    dropped = dropped_of(req, kept)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    places = positions_of(mask, dropped, positions)

    def by_hand(tokens: Tensor) -> list[Tensor]:
        out = []
        embeds = built.get_input_embeddings()(ids)
        rows = tokens[selection.kept]
        embeds = embeds.masked_scatter(((ids == IMAGE) & ~dropped)[..., None], rows)
        for row in range(len(ids)):
            stays = mask[row].bool() & ~dropped[row]
            one = built.model.language_model(
                inputs_embeds=embeds[row, stays][None],
                position_ids=places[row, stays][None],
                attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.long),
            )
            out.append(built.lm_head(one.last_hidden_state)[0])
        return out

    with torch.no_grad():
        want = by_hand(selection.tokens)
        plain = by_hand(built.model.multi_modal_projector(view.features))
    real = mask.bool() & ~dropped
    for row, (one, other) in enumerate(zip(want, plain, strict=True)):
        length = int(real[row].sum())
        mine = found[row, -length:] if side == "left" else found[row, :length]
        torch.testing.assert_close(mine, one, rtol=0, atol=2e-5)
        assert (row == 1) == bool((mine - other).abs().max() < 1e-3)


def replace_positions(pruner: QueCC, positions: Any) -> QueCC:
    object.__setattr__(pruner, "positions", positions)
    return pruner


def test_any_resolution_with_padding_cut_away() -> None:
    """Crops of unpadded images: every window with a candidate leaves one of its candidates."""
    built = host("llava_next")
    pruner = quecc(built, window=2)
    req = request(built, [2, 1])
    view, selection = shown(built, pruner, req.inputs)
    assert not view.candidates.all()
    tiles = tiled(4, 4, 2)
    assert selection.members is not None
    for crop, (candidates, kept) in enumerate(zip(view.candidates, selection.kept, strict=True)):
        for window in tiles:
            cells = [c for _, c in window if candidates[c]]
            own = [c for c in cells if kept[c]]
            assert len(own) == bool(cells)
            assert {int(selection.members[crop, c]) for c in cells} == {16 * crop + c for c in own}
    assert (selection.members[~view.candidates] == -1).all()
    with pruner(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    assert handle.report is not None
    report = handle.report
    assert sum(map(len, report.kept)) == int(selection.kept.sum()) + report.newline_tokens


def test_another_question_gives_other_tokens_and_rows_are_independent() -> None:
    built = host()
    pruner = quecc(built)
    req = request(built, [1, 1], text=[6, 4])
    view, both = shown(built, pruner, req.inputs)
    assert view.question is not None and both.tokens is not None
    changed = dict(req.inputs)
    changed["input_ids"] = changed["input_ids"].clone()
    changed["input_ids"][1, -1] = changed["input_ids"][1, -1] % 50 + 7
    _, other = shown(built, pruner, changed)
    assert other.tokens is not None
    kept = both.kept
    torch.testing.assert_close(both.tokens[0], other.tokens[0], rtol=0, atol=1e-6)
    assert (both.tokens[1] - other.tokens[1])[kept[1]].abs().max() > 1e-3
    for row in range(2):
        real = req.inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": req.inputs["input_ids"][row][real][None],
            "pixel_values": req.inputs["pixel_values"][row][None],
        }
        _, single = shown(built, pruner, alone)
        assert single.tokens is not None
        torch.testing.assert_close(single.tokens[0], both.tokens[row], rtol=0, atol=1e-5)


def test_gradients_reach_the_module_and_nothing_that_is_replaced() -> None:
    """The loss moves the module and the language model; tower, projector and question do not."""
    built = model()
    pruner = quecc(built)
    req = request(built, [2, 1])
    labels = req.inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with pruner(built):
        loss = built(**req.inputs, labels=labels).loss
        loss.backward()
    moved = {n for n, p in pruner.module.named_parameters() if p.grad is not None}
    assert moved == {n for n, _ in pruner.module.named_parameters()}
    for name, weight in pruner.module.named_parameters():
        # What is added to all keys alike cancels in the softmax.
        if name not in ("keys.3.bias",):
            assert weight.grad is not None and weight.grad.abs().max() > 1e-6, name
    for name, weight in built.named_parameters():
        reached = weight.grad is not None and bool(weight.grad.abs().max() > 0)
        assert reached == ("language_model" in name or "lm_head" in name), name

    view, _ = shown(built, pruner, req.inputs)
    assert view.question is not None
    given = [view.question.clone().requires_grad_(), view.features.clone().requires_grad_()]
    states = {layer: s.clone().requires_grad_() for layer, s in view.states.items()}
    tokens = pruner.select(replace(view, question=given[0], states=states)).tokens
    assert tokens is not None and tokens.requires_grad
    found = torch.autograd.grad(tokens.sum(), [given[0], *states.values()], allow_unused=True)
    assert all(one is None for one in found)


def test_steps_lower_the_loss_on_a_fixed_batch() -> None:
    built = model()
    built.requires_grad_(False)
    pruner = quecc(built)
    req = request(built, [1, 1])
    labels = req.inputs["input_ids"].clone()
    labels[:, :-3] = -100
    optimizer = torch.optim.Adam(pruner.module.parameters(), lr=3e-3)
    losses = []
    with pruner(built):
        for _ in range(12):
            loss = built(**req.inputs, labels=labels).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0] - 0.2


def test_chains() -> None:
    """A later method chooses among the tokens; an earlier one leaves windows fewer cells."""
    built = host()
    pruner = quecc(built)
    req = request(built, [1])
    with torch.no_grad():
        with pruner(built) as handle:
            built(**req.inputs)
            all_kept = handle.report.kept[0].tolist()  # type: ignore[union-attr]
        with (pruner | VisPruner(keep=2))(built) as handle:
            built(**req.inputs)
            two = handle.report.kept[0].tolist()  # type: ignore[union-attr]
        with (VisPruner(keep=5) | pruner)(built) as handle:
            built(**req.inputs)
            few = handle.report.kept[0].tolist()  # type: ignore[union-attr]
        with VisPruner(keep=5)(built) as handle:
            built(**req.inputs)
            five = handle.report.kept[0].tolist()  # type: ignore[union-attr]
    assert len(two) == 2 and set(two) < set(all_kept)
    homes = {(cell // 4 // 3, cell % 4 // 3) for cell in five}
    assert set(few) <= set(five) and len(few) == len(homes)


def test_float16_hosts_get_tokens_of_their_type() -> None:
    built = model().to(torch.bfloat16)
    pruner = quecc(built)
    req = request(built, [1])
    inputs = req.inputs | {"pixel_values": req.inputs["pixel_values"].to(torch.bfloat16)}
    with pruner(built), torch.no_grad():
        assert built(**inputs).logits.dtype == torch.bfloat16
    assert {weight.dtype for weight in pruner.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("hyper", "said"),
    [
        ({"window": 0}, "window=0 is not a whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 is not a whole number"),
        ({"heads": 5}, "heads=5 does not divide the width of the features .* 32"),
        ({"side": 4}, "side=4 is no setting of quecc.*; it has window, heads, hidden"),
    ],
)
def test_refused_settings(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(VlmpruneError, match=said):
        QueCC.fresh(host(), **hyper)


def test_refused_hosts_and_reuse() -> None:
    from zoo import ZOO

    with pytest.raises(VlmpruneError, match="cell by cell, which the tower or the projector of"):
        QueCC.fresh(ZOO["qwen2_5_vl"].build())
    built = host()
    req = request(built, [1])
    with quecc(built)(built) as handle, pytest.raises(VlmpruneError, match="question"):
        handle.encode(**req.inputs)
