"""What a report says of tokens dropped between decoder layers, worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from deep import deep, generate
from tiny import model, request
from vlmprune import VisPruner, costs
from vlmprune.methods import FastV, PyramidDrop


def test_flops_layer_by_layer_equal_the_whole() -> None:
    config = deep().config
    for n in (0, 1, 576, 2880):
        assert costs.layered_flops(config, [n] * 5) == costs.prefill_flops(config, n)
    # One layer on 10 tokens: hidden 32, 4 heads and 2 KV heads of 8, feed-forward 64.
    one = 2 * (2 * 10 * 32 * 32 + 2 * 10 * 32 * 16 + 2 * 100 * 32 + 3 * 10 * 32 * 64)
    assert costs.layered_flops(config, [10, 0, 0, 0, 0]) == one
    with pytest.raises(ValueError, match="negative"):
        costs.layered_flops(config, [-1])


def test_the_report_counts_layer_by_layer() -> None:
    """Two images and one, 16 tokens each: all in layer 0, then 8, 4 and 2 of each."""
    built = deep()
    req = request(built, [2, 1, 0])
    with PyramidDrop()(built) as handle:
        generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.positions == "compact"
    # Stages of five layers: before layers 1, 2 and 3.
    assert [layer.index for layer in report.layers] == [1, 2, 3, 4]
    counts = [[len(one) for one in layer.kept] for layer in report.layers]
    assert counts == [[8] * 3, [4] * 3, [2] * 3, [2] * 3]
    assert report.visual_tokens_before == 48 and report.visual_tokens_after == 6
    for earlier, later in zip(report.layers, report.layers[1:], strict=False):
        for old, new in zip(earlier.kept, later.kept, strict=True):
            assert set(new.tolist()) <= set(old.tolist())
    assert all(map(torch.equal, report.kept, report.layers[-1].kept))
    # A token's key and value in a layer: 2 heads of 8 numbers of 4 bytes, twice.
    assert report.kv_bytes_after == 128 * (48 + 24 + 12 + 6 + 6)
    assert report.kv_bytes_before == 128 * 5 * 48
    two = [costs.layered_flops(built.config, [16 * n, 8 * n, 4 * n, 2 * n, 2 * n]) for n in (1, 2)]
    encoder = report.flops_before - costs.prefill_flops(built.config, 32)
    encoder -= costs.prefill_flops(built.config, 16)
    assert report.flops_after == pytest.approx(encoder + sum(two))
    assert report.decoder_flops_after == pytest.approx(sum(two))
    # Parts of an image by where they left; with what goes all the way they are the whole.
    for number, roles in enumerate(report.roles):
        assert [int(mask.sum()) for mask in roles.values()] == [8, 4, 2]
        left = torch.stack(list(roles.values())).sum(0)
        assert left.max() == 1 and left[report.kept[number]].sum() == 0
    found = json.loads(report.json())["layers"]
    assert found[0] == {"layer": 1, "kept": [8, 8, 8], "kv_bytes": 128 * 24}
    assert "48 → 6 visual tokens" in str(report) and "compact positions" in str(report)


def test_a_chains_report_counts_from_the_beginning() -> None:
    built = deep()
    req = request(built, [1])
    with VisPruner(keep=8, positions="compact")(built) as first:
        generate(built, req.inputs)
    with (VisPruner(keep=8, positions="compact") | FastV(keep=3))(built) as handle:
        generate(built, req.inputs)
    assert handle.report is not None and first.report is not None
    assert len(handle.report.kept[0]) == 3
    assert set(handle.report.kept[0].tolist()) < set(first.report.kept[0].tolist())
    roles = handle.report.roles[0]
    assert int((roles["important"] | roles["diverse"]).sum()) == 3
    assert int(roles["left before layer 2"].sum()) == 5
    assert handle.report.kv_bytes_after == 128 * (8 * 2 + 3 * 3)


def test_positions_are_told_of_each_end_that_chooses() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    early = VisPruner(keep=8)
    for pruner, told in (
        (FastV(keep=4), "original"),
        (early | FastV(keep=4), "compact, inside the language model original"),
        (early, "compact"),
    ):
        with pruner(built) as handle:
            built.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.report.positions == told
