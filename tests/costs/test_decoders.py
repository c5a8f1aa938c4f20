"""The decoder's costs by layer, against the weights and caches of Transformers' own classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlavaConfig,
    Qwen3_5TextConfig,
    Qwen3VLMoeTextConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlmprune import costs
from vlmprune.hosts import layer_sizes

PICTURES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
EVERY = sorted({*PICTURES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
# What a token does not go through as a matrix of the layer's width, or what is as small as a norm.
SMALL = ("router", "altup", "shared_expert_gate", "moe_statics", "conv1d", "conv.conv", "text_moe")
GATES = ("mlp.gate.", "mixer.gate.", "feed_forward.gate.", "vision_moe.gate.", "self_attn.g_proj.")


@cache
def made(kind: str) -> Any:
    """The config of a type with all that its class has by default; None where it has too little."""
    try:
        return CONFIG_MAPPING[kind]()
    except Exception:  # Some classes have no defaults, each in its own way.
        return None


def test_nearly_every_class_has_defaults() -> None:
    assert sum(made(kind) is None for kind in EVERY) < 10 < len(EVERY) / 10


@pytest.mark.parametrize("kind", EVERY)
def test_costs_never_raise_and_are_positive_or_unknown(kind: str) -> None:
    config = made(kind)
    if config is None:
        return
    figures = [
        costs.prefill_flops(config, 100),
        costs.prefill_flops(config, 100, 1),
        costs.encoder_flops(config, patches=16),
        costs.encoder_flops(config),
    ]
    spent = costs.spent(config, [7, 90])
    assert all(math.isnan(one) or one > 0 for one in (*figures, spent.flops))
    bytes_ = (costs.kv_bytes(config, 100), spent.kv_bytes)
    assert all(math.isnan(one) or one >= 0 for one in bytes_)
    assert costs.kv_layers(config) == sum(costs.caching_layers(config))
    assert costs.layered_flops(config, [0] * 3) == 0 or math.isnan(figures[0])


def on_paper(config: Any) -> Any:
    """The language model of a config without weights; None where its class has no defaults."""
    text = config.get_text_config(decoder=True)
    for make, given in (
        (AutoModelForCausalLM, text),
        (AutoModel, text),
        (AutoModelForImageTextToText, config),
    ):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make.from_config(given)
        except Exception:  # As above.
            continue
    return None


def layers_of(model: Any, count: int) -> Iterator[nn.Module]:
    lists = [
        part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count and "vis" not in name
    ]
    return iter(lists[0] if lists else ())


def weights(layer: nn.Module, chosen: int) -> int:
    """Weights that a token is multiplied with, as they stand in the layer."""
    total = 0
    for name, weight in layer.named_parameters():
        gate = any(part in name for part in GATES) and weight.shape[0] <= 512
        if weight.dim() < 2 or gate or any(part in name for part in SMALL):
            continue
        if weight.dim() == 3:
            total += weight[0].numel() * (len(weight) if "shared" in name else chosen)
        else:
            total += weight.numel()
    return total


def test_weights_are_those_of_the_layers() -> None:
    """Of every language model that the installed release pairs with pictures."""
    seen, counted = set(), 0
    for kind in PICTURES:
        config = made(kind)
        if config is None:
            continue
        text = config.get_text_config(decoder=True)
        found = layer_sizes.layers(config)
        if text.model_type in seen or found is None or all(math.isnan(f.weights) for f in found):
            continue
        seen.add(text.model_type)
        model = on_paper(config)
        if model is None:
            continue
        names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
        chosen = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
        compared = 0
        for layer, told in zip(layers_of(model, len(found)), found, strict=False):
            if not math.isnan(told.weights):
                assert weights(layer, chosen) == told.weights, text.model_type
                compared += 1
        counted += bool(compared)
    assert counted >= 35


def tiny(config: type, **more: Any) -> Any:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return config(**sizes | more)


ALTERNATING = ["sliding_attention", "full_attention"] * 2
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARING = {
    "layer_types": ALTERNATING,
    "sliding_window": 8,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 50,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        tiny(Gemma3TextConfig, layer_types=ALTERNATING, sliding_window=8, head_dim=8),
        tiny(Gemma3nTextConfig, laurel_rank=3, activation_sparsity_pattern=None, **SHARING),
        tiny(Gemma4TextConfig, global_head_dim=16, **SHARING),
        tiny(Qwen3_5TextConfig, **LINEAR),
        tiny(DeepseekV3Config, **LATENT),
        tiny(Lfm2Config, layer_types=["conv", "full_attention"] * 2),
        tiny(Llama4TextConfig, attention_chunk_size=8, head_dim=8, num_local_experts=2),
    ],
    ids=lambda config: str(config.model_type),
)
def test_bytes_are_those_that_the_host_caches(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids = torch.randint(1, 50, (2, 20))
    with torch.no_grad():
        held = model(input_ids=ids, use_cache=True)
    found = getattr(held, "cache", None) or held.past_key_values
    sizes = [
        0 if getattr(one, "keys", None) is None else one.keys.nbytes + one.values.nbytes
        for one in found.layers
    ]
    # Layers that use another's have no entry of their own, in some releases none at all.
    told = costs.spent(config, [20, 20], 4).kv_bytes_by_layer
    assert [*sizes, *[0] * (len(told) - len(sizes))] == list(told)
    assert (
        sum(sizes) == costs.spent(config, [20, 20], 4).kv_bytes == 2 * costs.kv_bytes(config, 20, 4)
    )
    assert any(costs.caching_layers(config))
    assert [one > 0 for one in told] == costs.caching_layers(config)


def test_a_mixture_of_experts_by_hand() -> None:
    """Four layers, the first dense; two of six experts of width 10."""
    config = tiny(
        Qwen3VLMoeTextConfig,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=10,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    )
    n = 7
    attention = 2 * n * 32 * 32 + 2 * n * 32 * 16 + 2 * n * n * 32
    dense, sparse = 3 * n * 32 * 64, 3 * n * 32 * 2 * 10
    assert costs.prefill_flops(config, n) == 2 * (4 * attention + dense + 3 * sparse)
    # All experts would be another figure.
    assert 3 * n * 32 * 6 * 10 != sparse


def test_shared_experts_and_a_latent_by_hand() -> None:
    config = tiny(DeepseekV3Config, n_shared_experts=1, **LATENT)
    n = 7
    projections = 32 * 10 + 10 * 4 * 12 + 32 * (6 + 4) + 6 * 4 * (8 + 5) + 4 * 5 * 32
    attention = n * projections + n * n * 4 * (12 + 5)
    dense, sparse = 3 * n * 32 * 64, 3 * n * 32 * (2 + 1) * 12
    assert costs.prefill_flops(config, n) == 2 * (4 * attention + dense + 3 * sparse)
    assert costs.kv_bytes(config, n) == 4 * n * (6 + 4) * 2


def test_a_hybrid_by_hand() -> None:
    """Three layers of a gated delta rule, one that attends, with a gate as wide as its queries."""
    config = tiny(Qwen3_5TextConfig, **LINEAR)
    n = 7
    feed_forward = 3 * n * 32 * 64
    keys, values = 2 * 4, 4 * 6
    linear = n * (32 * (2 * keys + 2 * values + 2 * 4) + values * 32)
    linear += n * (4 * (2 * keys + values) + 3 * 4 * values)
    full = 3 * n * 32 * 32 + 2 * n * 32 * 16 + 2 * n * n * 32
    assert costs.prefill_flops(config, n) == 2 * (3 * linear + full + 4 * feed_forward)
    assert costs.caching_layers(config) == [False] * 3 + [True]
    # Twice the tokens are twice the work but for the one layer.
    twice = costs.prefill_flops(config, 2 * n)
    assert twice - 2 * costs.prefill_flops(config, n) == 2 * (2 * (2 * n) ** 2 - 4 * n * n) * 32


@pytest.mark.parametrize("n", [5, 8, 50])
def test_windows_by_hand(n: int) -> None:
    config = tiny(Gemma3TextConfig, layer_types=ALTERNATING, sliding_window=8, head_dim=8)
    linear = 2 * n * 32 * 32 + 2 * n * 32 * 16 + 3 * n * 32 * 64
    seen = 2 * n * n + 2 * n * min(n, 8)
    assert costs.prefill_flops(config, n) == 2 * (4 * linear + 2 * seen * 32)
    assert costs.kv_bytes(config, n) == 2 * 2 * 2 * 16 * 2 * n / 2 + 2 * 2 * 16 * 2 * min(n, 7)
    whole = Gemma3Config(text_config=config)
    assert costs.prefill_flops(whole, n) == costs.prefill_flops(config, n)


def test_shared_keys_and_values_by_hand() -> None:
    """The last two of four layers have neither projections of keys and values nor a cache."""
    config = tiny(Gemma3nTextConfig, laurel_rank=3, activation_sparsity_pattern=None, **SHARING)
    n = 7
    alike = 2 * n * 32 * 32 + 2 * n * n * 32 + 3 * n * 32 * 64 + 2 * n * 32 * (4 + 3)
    own = 2 * n * 32 * 16
    assert costs.prefill_flops(config, n) == 2 * (4 * alike + 2 * own)
    assert costs.caching_layers(config) == [True, True, False, False]
    assert costs.kv_bytes(config, n) == 2 * 2 * 16 * 2 * n
    # Earlier releases say it by a number alone.
    names = ("hidden_size", "num_attention_heads", "head_dim", "num_hidden_layers")
    plain = {name: getattr(config, name) for name in (*names, "num_key_value_heads")}
    earlier = SimpleNamespace(**plain, num_kv_shared_layers=2, intermediate_size=64)
    assert costs.kv_bytes(earlier, n) == costs.kv_bytes(config, n)


@pytest.mark.parametrize(
    ("text", "flops", "held"),
    [
        ({"layer_types": ["hybrid", "full_attention"]}, False, False),
        ({"layer_types": ["linear_attention", "full_attention"]}, False, True),
        ({"num_experts": 8}, False, True),
        ({"num_experts": 8, "num_experts_per_tok": 2, "moe_layer_freq": 2}, False, True),
        ({"kv_lora_rank": 16}, False, False),
        ({"layer_types": ["sliding_attention", "full_attention"]}, False, False),
        ({"cross_attention_layers": [1]}, False, False),
        ({"is_encoder_decoder": True}, False, False),
        ({"num_experts": 8, "mlp_layer_types": ["dense"]}, False, False),
        ({"kv_sharing_modes": [None]}, False, False),
        ({"num_hidden_layers": "two"}, False, False),
        ({}, True, True),
    ],
)
def test_what_a_config_does_not_tell_is_unknown(
    text: dict[str, Any], flops: bool, held: bool
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = SimpleNamespace(**sizes | {"num_hidden_layers": 2} | text)
    assert math.isnan(costs.prefill_flops(config, 3)) is not flops
    assert math.isnan(costs.kv_bytes(config, 3)) is not held
    # No token costs nothing, whatever a layer is.
    assert costs.kv_bytes(config, 0) == 0


@pytest.mark.parametrize(
    ("stages", "printed"), [(1, "3.82"), (3, "2.13"), (4, "1.78")], ids=["all", "3", "4"]
)
def test_tables_that_count_one_for_a_multiply_and_an_add(stages: int, printed: str) -> None:
    """PyramidDrop's, of LLaVA-1.5-7B (arXiv 2410.17247, ablation of the number of stages)."""
    from vlmprune.costs.architectures import KNOWN

    tokens = [576 >> min(stages - 1, layer // (32 // stages)) for layer in range(32)]
    flops = costs.layered_flops(KNOWN["llava-1.5-7b"], tokens, 1)
    assert f"{flops / 1e12:.2f}" == printed
    # The other convention is another table.
    assert costs.layered_flops(KNOWN["llava-1.5-7b"], tokens) == 2 * flops


def test_a_convention_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="per_multiply_add=3"):
        costs.prefill_flops(LlavaConfig(), 1, 3)
