"""PLPHP in the model: decode over the cut cache equals a full cache with per-head masking."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
    TextStreamer,
)

from masked import kept_columns, masking
from stock import CACHE, cache_of
from tiny import EOS, IMAGE, PAD, VOCABULARY, model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images
from vlmprune.runtime.cache.ragged_layer import RaggedLayer

pytestmark = pytest.mark.oracle
STEPS = 6
TOLERANCE = 1e-5
DIFFERENT = 1e-3

# Low enough that every layer of a random model loses tokens, and thresholds that tell layers apart.
SETTINGS = {"r": 0.4, "dr": 0.3, "alpha": 0.65, "beta": 0.6}
BATCHES = {"one image": [1], "several images": [3], "padded batch": [1, 2, 0]}


def text_config(kv_heads: int = 2, **changes: Any) -> Any:
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            **changes,
        }
    )


def generate(built: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, **more}
    return built.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def telling(built: Any, inputs: dict[str, Tensor], window: int = 1) -> dict[str, float]:
    """Settings whose thresholds tell this request's layers apart, since random models' γ vary."""
    with PLPHP(window=window)(built) as handle:
        generate(built, inputs, max_new_tokens=1)
    assert handle.report is not None
    gammas = sorted(g for layer in handle.report.layers for g in layer.gamma if g is not None)
    return {"r": 0.4, "dr": 0.3, "alpha": gammas[-1] - 1e-4, "beta": gammas[1] - 1e-4}


def distance(left: Any, right: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left.logits, right.logits, strict=True))


def exchanged(keep: dict[int, Tensor], ids: Tensor) -> dict[int, Tensor]:
    """The same numbers of visual tokens, but others."""
    visual = (ids == IMAGE)[:, None]
    return {
        i: torch.where(visual, (mask & visual).flip(2).roll(1, 2), mask) for i, mask in keep.items()
    }


@pytest.mark.parametrize(
    ("family", "attention", "kv_heads", "per_head", "batch"),
    list(
        product(["llava", "llava_next"], ["sdpa", "eager"], [2, 4], ["equal", "adaptive"], BATCHES)
    ),
)
def test_decoding_equals_masking(
    family: str, attention: str, kv_heads: int, per_head: Any, batch: str
) -> None:
    built = model(family, attention, text_config=text_config(kv_heads))
    req = request(built, BATCHES[batch])
    settings = telling(built, req.inputs)
    with PLPHP(**settings, per_head=per_head)(built) as handle:
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


@pytest.mark.parametrize(
    ("family", "attention"), list(product(["llava", "llava_next"], ["sdpa", "eager"]))
)
@pytest.mark.parametrize("batch", BATCHES)
def test_keeping_everything_changes_no_bit(family: str, attention: str, batch: str) -> None:
    built = model(family, attention)
    req = request(built, BATCHES[batch])
    plain = generate(built, req.inputs)
    with PLPHP(r=1, dr=0)(built) as handle:
        same = generate(built, req.inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    assert handle.report is not None
    assert handle.report.kv_bytes_after == handle.report.kv_bytes_before
    with PLPHP(r=0.9, dr=0)(built):
        assert distance(plain, generate(built, req.inputs)) > 0


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[1], [1, 2]])
def test_second_turn_with_a_new_image(attention: str, images: list[int]) -> None:
    built = model(attention=attention)
    one, two = request(built, images), request(built, images[::-1], seed=7)
    pruner = PLPHP(**SETTINGS, per_head="adaptive")
    new = two.inputs["input_ids"]
    new_mask = two.inputs["attention_mask"]

    def second(turn: Any) -> dict[str, Any]:
        ids = torch.cat((turn.sequences, new), 1)
        first = torch.ones_like(turn.sequences)
        first[:, : one.inputs["attention_mask"].shape[1]] = one.inputs["attention_mask"]
        return {
            "input_ids": ids,
            "attention_mask": torch.cat((first, new_mask), 1),
            "pixel_values": two.inputs["pixel_values"],
            CACHE: cache_of(turn),
        }

    with pruner(built) as handle:
        turn = generate(built, one.inputs)
        report = handle.report
        again = generate(built, second(turn))
        later = handle.report
    assert report is not None and later is not None and later is not report
    keep = kept_columns(report, one.inputs["input_ids"], IMAGE)
    with masking(built, keep):
        expected = generate(built, one.inputs)
        assert distance(turn, expected) < TOLERANCE
        # The second prompt is read over the first one's cut cache.
        full = second(expected)
        start = turn.sequences.shape[1] - 1
        both = kept_columns(later, full["input_ids"], IMAGE, before=start)
        for index, mask in keep.items():
            both[index][:, :, : mask.shape[2]] &= mask
        state = copy.deepcopy(full[CACHE])
        prefill = generate(built, full, max_new_tokens=1)
    assert float((again.logits[0] - prefill.logits[0]).abs().max()) < TOLERANCE

    class Both(dict):
        """The first turn's masks while the second prompt is read, then those of both turns."""

        def get(self, index: int, default: Any = None) -> Any:
            return both.get(index) if self.read else keep.get(index, default)

    masks = Both({0: None})
    masks.read = False
    hook = built.register_forward_hook(lambda *_: setattr(masks, "read", True))
    with masking(built, masks):
        expected = generate(built, full | {CACHE: state})
    hook.remove()
    assert torch.equal(again.sequences, expected.sequences)
    assert distance(again, expected) < TOLERANCE
    lengths = {k.shape[0] for layer in later.layers for head in layer.kept for k in head}
    assert len(lengths) > 1


def test_second_turn_without_an_image() -> None:
    built = model()
    req = request(built, [1, 2])
    more = torch.randint(6, 60, (2, 4))
    with PLPHP(**SETTINGS)(built) as handle:
        turn = generate(built, req.inputs)
        report = handle.report
        first = torch.ones_like(turn.sequences)
        first[:, : req.inputs["attention_mask"].shape[1]] = req.inputs["attention_mask"]
        ids = torch.cat((turn.sequences, more), 1)
        mask = torch.cat((first, torch.ones_like(more)), 1)
        again = generate(
            built,
            {"input_ids": ids, "attention_mask": mask, CACHE: cache_of(turn)},
        )
    assert report is not None
    with masking(built, kept_columns(report, req.inputs["input_ids"], IMAGE)):
        plain = generate(built, req.inputs)
        expected = generate(
            built,
            {"input_ids": ids, "attention_mask": mask, CACHE: cache_of(plain)},
        )
    assert distance(again, expected) < TOLERANCE


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search(beams: int) -> None:
    built = model()
    # One image a row: with more, releases before 5.18 repeat images in another order than rows.
    req = request(built, [1, 1], text=[5, 9])
    settings = {"num_beams": beams, "num_return_sequences": 2}
    with PLPHP(**SETTINGS, per_head="adaptive")(built) as handle:
        pruned = generate(built, req.inputs, **settings)
    assert handle.report is not None
    keep = kept_columns(handle.report, req.inputs["input_ids"], IMAGE)
    with masking(built, keep):
        expected = generate(built, req.inputs, **settings)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, generate(built, req.inputs, **settings)) > DIFFERENT


def test_sampling_and_several_sequences() -> None:
    built = model()
    req = request(built, [1, 1], text=[5, 9])
    settings = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    with PLPHP(**SETTINGS)(built) as handle:
        pruned = generate(built, req.inputs, **settings)
    assert handle.report is not None
    assert len(handle.report.layers[0].gamma) == 2
    torch.manual_seed(5)
    with masking(built, kept_columns(handle.report, req.inputs["input_ids"], IMAGE)):
        expected = generate(built, req.inputs, **settings)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < TOLERANCE


def test_streaming() -> None:
    built = model()
    req = request(built, [1])
    seen: list[Tensor] = []

    class Streamer(TextStreamer):
        def __init__(self) -> None: ...

        def put(self, value: Tensor) -> None:
            seen.append(value.flatten())

        def end(self) -> None: ...

    with PLPHP(**SETTINGS)(built):
        out = generate(built, req.inputs, streamer=Streamer())
    assert torch.cat(seen).tolist() == out.sequences[0].tolist()


def test_plain_forward_and_steps_by_hand() -> None:
    built = model()
    req = request(built, [1, 2])
    mask = req.inputs["attention_mask"]
    with torch.no_grad():
        whole = built(**req.inputs)
        with PLPHP(**SETTINGS)(built) as handle:
            first = built(**req.inputs)
            assert torch.equal(first.logits, whole.logits)
            report, cache = handle.report, cache_of(first)
            steps = []
            for _ in range(3):
                token = torch.full((2, 1), 9)
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                steps.append(built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits)
        assert report is not None and len(report.layers) == 3
        assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)
        mask, cache = req.inputs["attention_mask"], cache_of(whole)
        with masking(built, kept_columns(report, req.inputs["input_ids"], IMAGE)):
            for step in steps:
                mask = torch.cat((mask, torch.ones_like(token)), 1)
                own = built(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
                assert float((step - own).abs().max()) < TOLERANCE


def test_a_prompt_read_in_chunks() -> None:
    built = model()
    req = request(built, [2, 1])
    with PLPHP(**SETTINGS)(built) as handle:
        whole = generate(built, req.inputs)
        kept = handle.report.layers[0].kept if handle.report else []
        if not chunks_hold_images():
            with pytest.raises(VlmpruneError, match="loses images"):
                generate(built, req.inputs, prefill_chunk_size=16)
            return
        chunks = generate(built, req.inputs, prefill_chunk_size=16)
    assert distance(whole, chunks) < TOLERANCE
    assert handle.report is not None and kept
    for one, other in zip(kept, handle.report.layers[0].kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert cache_of(chunks).layers[0].prefix is not None


def test_a_copied_cache_goes_its_own_way() -> None:
    built = model()
    req = request(built, [1])
    with PLPHP(**SETTINGS)(built):
        turn = generate(built, req.inputs)
        twin = copy.deepcopy(cache_of(turn))
        ids = torch.cat((turn.sequences, torch.tensor([[7, 8]])), 1)
        one = generate(built, {"input_ids": ids, CACHE: cache_of(turn)})
        other = generate(built, {"input_ids": ids, CACHE: twin})
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_sliding_layers_stay_whole(given: bool) -> None:
    config = Qwen2Config(
        **{
            **text_config().to_dict(),
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        }
    )
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
    with pytest.raises(VlmpruneError, match="every layer of LlavaForConditionalGeneration has"):
        PLPHP().attach(model(text_config=config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    built = model().to(dtype)
    req = request(model(), [1, 2])
    req.inputs["pixel_values"] = req.inputs["pixel_values"].to(dtype)
    with PLPHP(**SETTINGS)(built) as handle:
        pruned = generate(built, req.inputs, max_new_tokens=2)
    assert handle.report is not None
    keep = kept_columns(handle.report, req.inputs["input_ids"], IMAGE)
    with masking(built, keep):
        near = generate(built, req.inputs, max_new_tokens=2)
    with masking(built, exchanged(keep, req.inputs["input_ids"])):
        far = generate(built, req.inputs, max_new_tokens=2)
    assert torch.equal(pruned.logits[0], near.logits[0])
    assert distance(pruned, near) < 0.05 and distance(pruned, far) > 4 * distance(pruned, near)


def test_a_model_that_overflows_is_told() -> None:
    built = model()
    req = request(built, [1])
    with torch.no_grad():
        built.model.language_model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(VlmpruneError, match="is not a number"), PLPHP()(built):
        generate(built, req.inputs)
