"""PLPHP in the model: decode over the cut cache equals a full cache with per-head masking."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    Qwen3NextConfig,
)

from answers import DIFFERENT, TOLERANCE, distance, generate
from cut_cache import SETTINGS, exchanged, telling
from masked import kept_columns, masking
from stock import CACHE, cache_of
from tiny import IMAGE, PAD, model, request, sliding_config, text_config
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.runtime.cache.ragged_layer import RaggedLayer

pytestmark = pytest.mark.oracle

BATCHES = {"one image": [1], "several images": [3], "padded batch": [1, 2, 0]}
OTHERS = [name for name in BATCHES if name != "padded batch"]


@pytest.mark.parametrize(
    ("family", "attention", "kv_heads", "per_head", "batch", "coverage"),
    [
        # All pairs in the hardest batch; of the others, every way of cutting.
        *product(
            ["llava"], ["sdpa", "eager"], [2, 4], ["equal", "adaptive"], ["padded batch"], [0, 0.5]
        ),
        *product(["llava"], ["sdpa"], [2], ["equal", "adaptive"], OTHERS, [0, 0.5]),
        *product(["llava_next"], ["sdpa"], [4], ["equal", "adaptive"], ["padded batch"], [0]),
        *product(["llava_next"], ["eager"], [2], ["equal", "adaptive"], OTHERS, [0]),
    ],
)
def test_decoding_equals_masking(
    family: str, attention: str, kv_heads: int, per_head: Any, batch: str, coverage: float
) -> None:
    built = model(family, attention, text_config=text_config(kv_heads))
    req = request(built, BATCHES[batch])
    settings = telling(built, req.inputs)
    with PLPHP(**settings, per_head=per_head, coverage=coverage)(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and len(report.layers) == 3
    ids = req.inputs["input_ids"]
    keep = kept_columns(report, ids, IMAGE)
    with masking(built, keep):
        expected = generate(built, req.inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert torch.equal(pruned.logits[0], expected.logits[0])
    assert distance(pruned, expected) < TOLERANCE

    # Every layer lost tokens; under one budget for all, heads hold unequal numbers.
    rates = {rate for layer in report.layers for rate in layer.retention if rate is not None}
    assert len(rates) > 1
    lengths = [[[len(k) for k in head] for head in layer.kept] for layer in report.layers]
    if per_head == "adaptive":
        assert any(first != head for layer in lengths for first, *rest in [layer] for head in rest)
    else:
        assert all(head == layer[0] for layer in lengths for head in layer)

    with masking(built, exchanged(keep, ids)):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT
    assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.parametrize("window", [1, 4, 99])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_choice_restated(window: int, kv_heads: int) -> None:
    """γ, rates and kept tokens from the model's own eager attention, in plain Python."""
    built = model(attention="eager", text_config=text_config(kv_heads))
    req = request(built, [2, 1, 0], text=[9, 4, 6])
    settings = telling(built, req.inputs, window)
    with PLPHP(**settings, window=window)(built) as handle:
        generate(built, req.inputs)
    assert handle.report is not None
    with torch.no_grad():
        full = built(**req.inputs, output_attentions=True)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"].bool()
    lengths = {0: [16, 16], 1: [16]}
    seen = set()
    for layer, attention in zip(handle.report.layers, full.attentions, strict=True):
        for row, images in lengths.items():
            real = mask[row].nonzero()[:, 0]
            rows = attention[row][:, real[-window:]].mean(1)
            visual = (ids[row] == IMAGE).nonzero()[:, 0]
            gamma = float(rows[:, visual].sum(1).mean())
            assert layer.gamma[row] == pytest.approx(gamma, abs=1e-5)
            rate = 0.7 if gamma >= settings["alpha"] else 0.1 if gamma < settings["beta"] else 0.4
            assert layer.retention[row] == pytest.approx(rate)
            seen.add(rate)
            per_head = rows[:, visual].unflatten(0, (kv_heads, -1)).mean(1)
            for head in range(kv_heads):
                wanted, start = [], 0
                for n in images:
                    count = max(1, int(rate * n + 0.5))
                    scores = per_head[head, start : start + n].tolist()
                    best = sorted(range(n), key=lambda i: -scores[i])[:count]
                    wanted += sorted(start + i for i in best)
                    start += n
                assert layer.kept[head][row].tolist() == wanted
        assert layer.gamma[2] is None and layer.retention[2] is None
    assert len(seen) > 1


def test_first_layers_may_stay_whole() -> None:
    built = model()
    req = request(built, [2, 1])
    with PLPHP(**SETTINGS, first_pruned_layer=2)(built) as handle:
        pruned = generate(built, req.inputs)
    assert handle.report is not None
    assert [layer.index for layer in handle.report.layers] == [2]
    with masking(built, kept_columns(handle.report, req.inputs["input_ids"], IMAGE)):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_chained_after_an_encoder_side_method(family: str, policy: Any) -> None:
    """Equal to the first method alone with per-head masking of what it kept."""
    built = model(family)
    req = request(built, [1, 2, 0])
    first = VisPruner(keep=8, positions=policy)
    with (first | PLPHP(**SETTINGS))(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.visual_tokens_after < report.visual_tokens_before
    # The masks are over the shortened prompt, so numbers are taken back to it.
    rows, image = [], 0
    for images in [1, 2, 0]:
        before, numbers = 0, []
        for _ in range(images):
            numbers += (report.kept[image] + before).tolist()
            before += req.lengths[image]
            image += 1
        rows.append(numbers)
    for layer in report.layers:
        for head in layer.kept:
            assert all(set(k.tolist()) <= set(n) for k, n in zip(head, rows, strict=True))
    seen = []
    with first(built):
        hook = built.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        generate(built, req.inputs, max_new_tokens=1)
        hook.remove()
        # Columns of the shortened prompt: padding, text, and as many visual tokens as were kept.
        short = []
        for row, ids in enumerate(req.inputs["input_ids"].tolist()):
            ids = [t for t, m in zip(ids, req.inputs["attention_mask"][row], strict=True) if m]
            count, line = -1, []
            for token in ids:
                count += token == IMAGE
                if token != IMAGE or count in rows[row]:
                    line.append(token)
            short.append([PAD] * (seen[0] - len(line)) + line)
        for layer in report.layers:
            object.__setattr__(layer, "numbers", [torch.arange(len(numbers)) for numbers in rows])
        with masking(built, kept_columns(report, torch.tensor(short), IMAGE)):
            expected = generate(built, req.inputs)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE


@pytest.mark.parametrize("given", [False, True])
def test_sliding_layers_stay_whole(given: bool) -> None:
    config = sliding_config()
    built = model(text_config=config)
    req = request(built, [1, 1])
    # A cache that was made without the config has no sliding layers, but the attention has.
    more = {CACHE: DynamicCache()} if given else {}
    with PLPHP(**SETTINGS)(built) as handle:
        pruned = generate(built, {**req.inputs, **more})
    assert handle.report is not None
    assert [layer.index for layer in handle.report.layers] == [0, 2]
    kinds = [isinstance(layer, RaggedLayer) for layer in cache_of(pruned).layers]
    assert kinds == [True, False, True]
    with masking(built, kept_columns(handle.report, req.inputs["input_ids"], IMAGE)):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE


def test_linear_attention_layers_stay_whole() -> None:
    config = Qwen3NextConfig(
        **{
            **{k: v for k, v in text_config().to_dict().items() if k != "model_type"},
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    )
    built = model(text_config=config)
    req = request(built, [1, 1])
    with PLPHP(**SETTINGS)(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and [layer.index for layer in report.layers] == [1, 3]
    kept = sum(len(k) for layer in report.layers for head in layer.kept for k in head)
    assert report.kv_bytes_after == kept * 2 * 8 * 4
    assert report.kv_bytes_before == 2 * 16 * 2 * 2 * 2 * 8 * 4
    with masking(built, kept_columns(report, req.inputs["input_ids"], IMAGE)):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE


def test_a_model_without_full_attention_is_refused() -> None:
    config = MistralConfig(
        **{
            **{k: v for k, v in text_config().to_dict().items() if k != "model_type"},
            "sliding_window": 12,
        }
    )
    with pytest.raises(VlmpruneError, match="has layers of sliding attention, all of which"):
        PLPHP().attach(model(text_config=config))


def test_a_model_that_overflows_is_told() -> None:
    built = model()
    req = request(built, [1])
    with torch.no_grad():
        built.model.language_model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(VlmpruneError, match="is not a number"), PLPHP()(built):
        generate(built, req.inputs)
