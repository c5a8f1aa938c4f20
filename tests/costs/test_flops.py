"""The cost formulas against published tables and against torch's own count."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from vlmprune import costs

MIB = 2**20
LLAMA_7B = SimpleNamespace(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
CLIP_336 = SimpleNamespace(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
LLAVA_7B = SimpleNamespace(text_config=LLAMA_7B, vision_config=CLIP_336)


def total_tera(visual_tokens: int, crops: int) -> float:
    flops = costs.prefill_flops(LLAVA_7B, visual_tokens) + costs.encoder_flops(LLAVA_7B, crops)
    return flops / 1e12


@pytest.mark.parametrize(
    ("tokens", "printed"),
    [
        (2880, "43.6"),
        (720, "11.5"),  # the row that is called 640
        (290, "5.71"),
        (145, "3.8"),  # the row that is called 160
        (640, "10.4"),
        (160, "4.0"),
    ],
)
def test_llava_next_7b_tflops(tokens: int, printed: str) -> None:
    digits = len(printed.split(".")[1])
    assert f"{total_tera(tokens, 5):.{digits}f}" == printed


# FasterVLM prints 32.35 and 21.66 where the formula gives 32.33 and 21.64, a difference that no
# other row shows: it is in the fourth digit, and the formula's own figures are pinned here.
@pytest.mark.parametrize(
    ("tokens", "printed", "ours"), [(2160, 32.35, 32.33), (1440, 21.66, 21.64)]
)
def test_llava_next_7b_rows_that_fit_to_a_thousandth(
    tokens: int, printed: float, ours: float
) -> None:
    assert round(total_tera(tokens, 5), 2) == ours
    assert total_tera(tokens, 5) == pytest.approx(printed, rel=1e-3)


# The row called 160 prints "80", which is the cache of a true 160 tokens, although its 3.8 TFLOPs
# are those of 145 tokens, whose cache is 72.5 MiB.
@pytest.mark.parametrize(("tokens", "mib"), [(2880, 1440), (720, 360), (145, 72.5), (160, 80)])
def test_llava_next_7b_kv(tokens: int, mib: float) -> None:
    assert costs.kv_bytes(LLAVA_7B, tokens) == mib * MIB


@pytest.mark.parametrize(
    ("tokens", "printed"),
    [(576, "8.02"), (192, "2.89"), (128, "2.05"), (64, "1.21"), (32, "0.80")],
)
def test_llava_15_7b_tflops(tokens: int, printed: str) -> None:
    assert f"{total_tera(tokens, 1):.2f}" == printed


def test_language_model_alone() -> None:
    assert f"{costs.prefill_flops(LLAVA_7B, 2880) / 1e12:.1f}" == "41.7"
    assert f"{costs.prefill_flops(LLAVA_7B, 320) / 1e12:.1f}" == "4.2"
    assert costs.prefill_flops(LLAVA_7B, 320) == costs.prefill_flops(LLAMA_7B, 320)


def test_clip_per_crop() -> None:
    assert f"{costs.encoder_flops(CLIP_336) / 1e12:.3f}" == "0.381"
    assert costs.encoder_flops(LLAVA_7B, 5) == pytest.approx(5 * costs.encoder_flops(CLIP_336))


@given(
    st.integers(0, 3000),
    st.integers(1, 16),
    st.integers(1, 8),
    st.sampled_from([8, 64]),
    st.integers(1, 500),
    st.integers(1, 5),
)
def test_mha_is_the_published_formula_and_gqa_saves_only_keys_and_values(
    n: int, kv_heads: int, group: int, head_dim: int, m: int, layers: int
) -> None:
    heads = kv_heads * group
    d = heads * head_dim
    mha = SimpleNamespace(
        hidden_size=d, intermediate_size=m, num_hidden_layers=layers, num_attention_heads=heads
    )
    gqa = SimpleNamespace(**vars(mha), num_key_value_heads=kv_heads)
    published = layers * 2 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m)
    saved = layers * 2 * 2 * n * d * (d - kv_heads * head_dim)
    assert costs.prefill_flops(mha, n) == published
    assert costs.prefill_flops(gqa, n) == published - saved
    assert costs.kv_bytes(gqa, n) * group == costs.kv_bytes(mha, n)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 8), (2, 8), (1, 16)])
def test_equals_torch_count_of_a_real_decoder(
    implementation: str, kv_heads: int, head_dim: int
) -> None:
    n, d, m, heads, layers = 10, 32, 48, 4, 3
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=d,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    model = LlamaModel(config).eval()
    model.set_attn_implementation(implementation)
    # torch does not count the fused CPU kernel; the math backend does the same products openly.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(inputs_embeds=torch.randn(1, n, d), use_cache=False)
    by_module = counter.get_flop_counts()
    counted = sum(sum(by_module[f"LlamaModel.layers.{i}"].values()) for i in range(layers))
    in_linears = 2 * n * sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    in_attention = layers * heads * 2 * (2 * n * n * head_dim)
    assert counted == in_linears + in_attention
    assert costs.prefill_flops(config, n) == counted


def test_equals_torch_count_of_a_real_tower() -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    model = CLIPVisionModel(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=torch.randn(2, 3, 28, 28))
    # All but the patch embedding, the one convolution.
    operators = counter.get_flop_counts()["Global"]
    counted = sum(flops for name, flops in operators.items() if "convolution" not in str(name))
    assert costs.encoder_flops(config, crops=2) == counted


def test_input_size_may_differ_from_the_config() -> None:
    dinov2 = SimpleNamespace(
        model_type="dinov2",
        hidden_size=384,
        mlp_ratio=4,
        num_hidden_layers=12,
        image_size=518,
        patch_size=14,
    )
    n, d = 16 * 16 + 1, 384
    expected = 12 * 2 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * 4 * d)
    assert costs.encoder_flops(dinov2, pixels=224) == expected
    assert costs.encoder_flops(dinov2, patches=256) == expected
    assert costs.encoder_flops(dinov2, pixels=(112, 448)) == costs.encoder_flops(
        dinov2, patches=8 * 32
    )
    assert costs.encoder_flops(dinov2) > expected
    assert costs.patch_count(dinov2) == 37**2


@pytest.mark.parametrize("patches", [9, 16, 64])
def test_a_tower_with_windows_by_hand(patches: int) -> None:
    """One of four layers sees all patches, the others windows of 4 x 4 of them."""
    tower = SimpleNamespace(
        model_type="qwen2_5_vl",
        hidden_size=32,
        intermediate_size=48,
        depth=4,
        patch_size=14,
        window_size=56,
        fullatt_block_indexes=[1, 7],
    )
    linear = 4 * (4 * patches * 32 * 32 + 3 * patches * 32 * 48)
    seen = patches + 3 * min(patches, 16)
    expected = 2 * (linear + 2 * patches * seen * 32)
    assert costs.encoder_flops(tower, patches=patches) == expected
    assert costs.encoder_flops(tower, 3, patches=patches) == 3 * expected


def test_towers_with_other_prefixes_and_feed_forwards() -> None:
    siglip = SimpleNamespace(**{**vars(CLIP_336), "model_type": "siglip_vision_model"})
    n, d, m = 576, 1024, 4096
    without_cls = 24 * 2 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    assert costs.encoder_flops(siglip) == without_cls < costs.encoder_flops(CLIP_336)
    registers = SimpleNamespace(**vars(CLIP_336), num_register_tokens=4)
    assert costs.encoder_flops(registers) == costs.encoder_flops(CLIP_336, patches=580)
    gated = SimpleNamespace(
        hidden_size=384, mlp_ratio=4, num_hidden_layers=1, patch_size=14, use_swiglu_ffn=True
    )
    n, d = 257, 384
    assert costs.encoder_flops(gated, pixels=224) == 2 * (
        4 * n * d**2 + 2 * n**2 * d + 3 * n * d * 1024
    )


@given(st.integers(0, 5000), st.integers(1, 100))
def test_more_tokens_cost_more(tokens: int, more: int) -> None:
    assert costs.prefill_flops(LLAVA_7B, tokens) < costs.prefill_flops(LLAVA_7B, tokens + more)
    assert costs.kv_bytes(LLAVA_7B, tokens) < costs.kv_bytes(LLAVA_7B, tokens + more)
    assert costs.encoder_flops(LLAVA_7B, tokens) < costs.encoder_flops(LLAVA_7B, tokens + more)


def test_nothing_costs_nothing() -> None:
    assert costs.prefill_flops(LLAVA_7B, 0) == 0
    assert costs.kv_bytes(LLAVA_7B, 0) == 0
    assert costs.encoder_flops(LLAVA_7B, 0) == 0
    assert costs.kv_bytes(LLAVA_7B, 10, 4) == 2 * costs.kv_bytes(LLAVA_7B, 10)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="visual_tokens=-1 is negative"):
        costs.prefill_flops(LLAVA_7B, -1)
    with pytest.raises(ValueError, match="tokens=-1 is negative"):
        costs.kv_bytes(LLAVA_7B, -1)
    with pytest.raises(ValueError, match="crops=-1 is negative"):
        costs.encoder_flops(LLAVA_7B, -1)
    with pytest.raises(ValueError, match="bytes_per_value=0"):
        costs.kv_bytes(LLAVA_7B, 1, 0)
    with pytest.raises(ValueError, match="not both"):
        costs.encoder_flops(LLAVA_7B, patches=1, pixels=14)
    with pytest.raises(ValueError, match="pixels="):
        costs.encoder_flops(LLAVA_7B, pixels=(1, 2, 3))


@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_without_a_field_the_decoder_is_unknown(name: str) -> None:
    config = SimpleNamespace(**{k: v for k, v in vars(LLAMA_7B).items() if k != name})
    assert math.isnan(costs.prefill_flops(config, 1))
    # A cache holds no feed-forward.
    assert math.isnan(costs.kv_bytes(config, 1)) is (name != "intermediate_size")


@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"]
)
def test_without_a_field_the_tower_is_unknown(name: str) -> None:
    config = SimpleNamespace(**{k: v for k, v in vars(CLIP_336).items() if k != name})
    assert math.isnan(costs.encoder_flops(config))
    beside = costs.beside_flops(config, 1, 576, 4, 2)
    assert math.isnan(beside) is (name in ("hidden_size", "intermediate_size"))


def test_one_for_a_multiply_and_an_add_is_half() -> None:
    for figure in (costs.prefill_flops(LLAVA_7B, 576), costs.encoder_flops(LLAVA_7B)):
        assert figure in (
            2 * costs.prefill_flops(LLAVA_7B, 576, 1),
            2 * costs.encoder_flops(LLAVA_7B, per_multiply_add=1),
        )
    assert costs.spent(LLAVA_7B, [64, 5], 2, 1).flops * 2 == costs.spent(LLAVA_7B, [64, 5]).flops
