"""The oracle: pruned output equals the full model with the dropped visual tokens masked."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from tiny import dropped_columns, model, positions_of, request
from tiny_oracle import FAMILIES, STEPS, generate, masked
from vlmprune import VisPruner, VlmpruneError

pytestmark = pytest.mark.oracle

BATCHES = {
    "one image": [1],
    "several images": [3],
    "padded batch": [1, 2, 0],
}
cases = pytest.mark.parametrize(
    ("family", "attention", "batch", "policy"),
    list(product(FAMILIES, ["sdpa", "eager"], BATCHES, ["compact", "original"])),
)


@cases
def test_generate_equals_masking(family: str, attention: str, batch: str, policy: Any) -> None:
    built = model(family, attention)
    req = request(built, BATCHES[batch])
    pruner = VisPruner(keep=5, positions=policy)
    with pruner(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    kept = handle.report.kept
    assert [len(k) for k in kept] < req.lengths

    dropped = dropped_columns(req, kept)
    expected = masked(built, req, dropped, policy)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE

    # Controls: another choice of the same size, and the other position policy, must differ.
    others = [(n - 1 - k).flip(0) for k, n in zip(kept, req.lengths, strict=True)]
    assert distance(pruned, masked(built, req, dropped_columns(req, others), policy)) > DIFFERENT
    other = "compact" if policy == "original" else "original"
    assert distance(pruned, masked(built, req, dropped, other)) > DIFFERENT


@cases
def test_forward_equals_masking(family: str, attention: str, batch: str, policy: Any) -> None:
    built = model(family, attention)
    req = request(built, BATCHES[batch])
    with torch.no_grad(), VisPruner(keep=0.3, positions=policy)(built) as handle:
        pruned = built(**req.inputs)
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report.kept)
    mask = req.inputs["attention_mask"]
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    before = dropped.long().cumsum(1) if policy == "compact" else torch.zeros_like(columns)
    with torch.no_grad():
        full = built(
            **(req.inputs | {"attention_mask": mask * ~dropped, "position_ids": columns - before})
        )
    counts = (mask.bool() & ~dropped).sum(1).tolist()
    assert pruned.logits.shape[1] == max(counts) < mask.shape[1]
    for row, n in enumerate(counts):
        expected = full.logits[row][mask[row].bool() & ~dropped[row]]
        assert float((pruned.logits[row, -n:] - expected).abs().max()) < TOLERANCE
        # Control: the neighbouring column's logits are not as near.
        assert float((pruned.logits[row, -n:-1] - expected[1:]).abs().max()) > DIFFERENT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_other_towers(family: str, kind: str) -> None:
    built = model(family, kind=kind)
    req = request(built, [2, 1])
    with VisPruner(keep=4, positions="original")(built) as handle:
        pruned = generate(built, **req.inputs)
    assert handle.report is not None
    expected = masked(built, req, dropped_columns(req, handle.report.kept), "original")
    assert distance(pruned, expected) < TOLERANCE
    substitute = "attention received" in handle.report.score
    assert substitute == (kind == "siglip")


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_the_last_column_may_be_dropped(policy: Any) -> None:
    """A prompt that ends in an image: the position after it must not fall back."""
    built = model()
    req = request(built, [1], text=0)
    req.inputs = req.inputs | {k: req.inputs[k][:, :-3] for k in ("input_ids", "attention_mask")}
    assert req.inputs["input_ids"][0, -1] == 5
    ids = req.inputs["input_ids"]
    for seed in range(20):
        built = model(seed=seed)
        with VisPruner(keep=3, positions=policy)(built) as handle:
            pruned = generate(built, **req.inputs)
        assert handle.report is not None
        dropped = dropped_columns(req, handle.report.kept)
        if not dropped[0, -1]:
            continue
        # The step that a masked last column would make is the pruned prompt's last column's.
        positions = positions_of(torch.ones_like(ids), dropped, policy)
        at = int((~dropped[0]).nonzero()[-1])
        tokens = pruned.sequences[:, ids.shape[1] :]
        follow = torch.arange(STEPS)[None] + positions[0, -1] + 1
        with torch.no_grad():
            full = built(
                **{
                    "pixel_values": req.inputs["pixel_values"],
                    "input_ids": torch.cat((ids, tokens), 1),
                    "attention_mask": torch.cat((~dropped, torch.ones_like(tokens)), 1).long(),
                    "position_ids": torch.cat((positions, follow), 1),
                }
            ).logits[0]
        steps = [full[at], *full[ids.shape[1] : -1]]
        for got, wanted in zip(pruned.logits, steps, strict=True):
            assert float((got[0] - wanted).abs().max()) < TOLERANCE
        return
    raise AssertionError("no seed dropped the last column")


def test_the_pooling_heads_attention_may_score() -> None:
    """SigLIP's head attends with one learned query; restated from its weights."""
    built = model(kind="siglip")
    req = request(built, [2, 1])
    seen: list[Tensor] = []
    head = built.model.vision_tower.head
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with VisPruner(keep=4, important_ratio=1, score="pooling")(built) as handle:
        generate(built, **req.inputs)
    hook.remove()
    assert handle.report is not None and "pooling head" in handle.report.score
    heads, hidden = head.attention.num_heads, seen[0]
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    query = (head.probe @ weights[0].T + biases[0]).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = (hidden @ weights[1].T + biases[1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
    best = scores.topk(4).indices.sort().values
    assert [kept.tolist() for kept in handle.report.kept] == best.tolist()
    with VisPruner(keep=4, important_ratio=1)(built) as other:
        generate(built, **req.inputs)
    assert other.report is not None
    assert [k.tolist() for k in other.report.kept] != best.tolist()

    with (
        VisPruner(keep=4, score="pooling")(model()) as handle,
        pytest.raises(VlmpruneError, match="has no pooling head"),
    ):
        handle.model.generate(**request(model(), [1]).inputs, max_new_tokens=1)
    with pytest.raises(VlmpruneError, match="score='most' is not known"):
        VisPruner(keep=4, score="most")  # type: ignore[arg-type]
    with pytest.raises(VlmpruneError, match="ask for different scores"):
        VisPruner(keep=8, score="pooling") | VisPruner(keep=4)
