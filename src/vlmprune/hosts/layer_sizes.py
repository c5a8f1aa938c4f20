"""What each decoder layer of a language model works through for a token, by its config.

Layers of one model differ: mixtures of experts, windows, recurrences, keys and values that are
another layer's. What a config does not say, or says in a way that is not known here, is `UNKNOWN`;
nothing here raises because of a config. `tests/costs/test_decoders.py` counts the weights of every
class of language model in the installed release against this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config as configs
from vlmprune.hosts import sizes

UNKNOWN = math.nan
"""A figure that a config does not tell. It goes through sums and products and is printed in words;
ask `math.isnan`, since it equals nothing."""


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer.

    Attributes:
        weights: that each token is multiplied with, those of active experts only; neither routers,
            gates of a number a head, norms nor biases.
        pairs: multiply-adds for each pair of tokens of which one sees the other.
        window: how many tokens a token sees at most; None for all.
        states: multiply-adds for each token in a recurrence or a convolution.
        cached: numbers that the layer caches for each token.
    """

    weights: float = 0
    pairs: float = 0
    window: int | None = None
    states: float = 0
    cached: float = 0


NOTHING_KNOWN = LayerSizes(UNKNOWN, UNKNOWN, None, UNKNOWN, UNKNOWN)

UNTOLD = (
    VlmpruneError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a config that says too little comes to; fields may be properties that compute."""

_FULL = ("full_attention", "attention")
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Layers that are a feed-forward and nothing else, in models whose other layers have none.
_FEED_FORWARDS = ("moe", "mlp")

# What configs do not say, by type of language model.

# Feed-forwards without a gate, of two matrices instead of three.
# fmt: off
_TWO_MATRICES = frozenset((
    "apertus", "apertus1p5_text", "arcee", "bert", "bert-generation", "biogpt", "camembert",
    "cosmos3_edge_text", "data2vec-text", "electra", "ernie", "git", "gpt_neox", "jais2",
    "kosmos_2_5_text_model", "kosmos_2_text_model", "megatron-bert", "nanochat", "nemotron",
    "nemotron_h", "opt", "persimmon", "phi", "rembert", "roberta", "roberta-prelayernorm",
    "roc_bert", "roformer", "starcoder2", "xglm", "xlm-roberta", "xlm-roberta-xl",
))
# fmt: on
# Attention whose output is gated by a projection as wide as the queries.
# fmt: off
_GATED = frozenset((
    "afmoe", "muse_glimmer_text", "muse_spark_text", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next",
))
# fmt: on
# Visual tokens go through the second of two kinds of experts.
_SECOND_EXPERTS = frozenset({"ernie4_5_vl_moe_text"})
# Mixtures with one expert beside the others that is as wide as they are.
_ONE_SHARED = frozenset({"llama4_text"})
# Layers with cross-attention, parts or products that none of the fields below tell of.
# fmt: off
_ODD = frozenset((
    "beam", "big_bird", "blip_text_model", "doge", "dory", "evolla", "hrm_text", "idefics",
    "mimo_v2_flash", "moshi", "qwen4_exp_text", "recurrent_gemma", "t5gemma2_decoder", "xmod",
))
# fmt: on

# The same thing under several names.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
_DENSE_WIDTH = (
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "prefix_dense_intermediate_size",
)
_INNER = ("intermediate_size", "ffn_dim")
# Layers with windows have heads of their own.
_OTHER_HEADS = ("num_sliding_attention_heads", "swa_num_attention_heads", "swa_num_key_value_heads")
_EXPERT_INNER = ("moe_hidden_size", "moe_latent_size")
# Say which layers are mixtures in ways that are not read here.
_UNREAD_MIXTURES = ("moe_layer_start_index", "expert_layer_period", "zero_expert_num")


def layers(config: Any) -> list[LayerSizes] | None:
    """The decoder layers of a language model; None where not even their number is told.

    Args:
        config: of a whole model or of its language model.
    """
    try:
        text = configs.of_text(config)
        kinds = configs.layer_kinds(text)
    except UNTOLD:
        return None
    try:
        return _told_layers(text, kinds)
    except UNTOLD:
        return [NOTHING_KNOWN] * len(kinds)


def _told_layers(text: Any, kinds: Sequence[str]) -> list[LayerSizes]:
    """Each layer; raises what reading a config that says too little comes to."""
    if _is_odd(text):
        return [NOTHING_KNOWN] * len(kinds)
    owns = configs.own_caches(text) or [True] * len(kinds)
    each: Sequence[Any] = configs.each_layer(text) or [text] * len(kinds)
    single = any(kind in _FEED_FORWARDS for kind in kinds)
    # Layers that are told alike are worked out once; to look at 32 of them takes longer than that.
    known: dict[tuple[Any, ...], LayerSizes] = {}
    told: dict[int, tuple[bool, Any]] = {}
    found = []
    for number, (kind, own, part) in enumerate(zip(kinds, owns, each, strict=True)):
        if id(part) not in told:
            told[id(part)] = _mixes(part), getattr(part, "intermediate_size", None)
        mixes, inner = told[id(part)]
        sparse = mixes and _is_sparse(part, number)
        key = (id(part), kind, own, sparse, _entry(inner, number))
        if key not in known:
            known[key] = _layer(part, number, kind, own, sparse, single)
        found.append(known[key])
    return found


def _layer(
    text: Any, number: int, kind: str, own: bool, sparse: bool | None, single: bool
) -> LayerSizes:
    """One layer, whose parts may be unknown.

    Args:
        text: its config.
        number: of the layer.
        kind: how it attends.
        own: whether its keys and values are its own.
        sparse: whether its feed-forward is a mixture; None where that is not told.
        single: whether each layer of the model is either attention or a feed-forward.
    """
    inner = 0.0
    if not single or kind in _FEED_FORWARDS:
        sparse = kind == "moe" if single else sparse
        inner = _known(lambda: _feed_forward(text, number, own, sparse))
    if kind in _FEED_FORWARDS:
        return LayerSizes(inner)
    if kind in configs.RECURRENT:
        weights, states = _recurrence(text, kind)
        return LayerSizes(weights + inner, states=states)
    window = None
    if kind in _WINDOWS:
        window = _number(text, _WINDOWS[kind])
        if window is None or _number(text, *_OTHER_HEADS):
            return LayerSizes(UNKNOWN, UNKNOWN, None, 0, UNKNOWN)
    elif kind not in _FULL:
        return LayerSizes(UNKNOWN, UNKNOWN, None, UNKNOWN, UNKNOWN)
    try:
        weights, pairs, cached = _attention(text, kind, own)
    except UNTOLD:
        weights = pairs = cached = UNKNOWN
    return LayerSizes(weights + inner, pairs, window, 0, cached)


def _known(figure: Callable[[], float]) -> float:
    try:
        return figure()
    except UNTOLD:
        return UNKNOWN


def _is_odd(text: Any) -> bool:
    crossing = ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers")
    return configs.model_type(text) in _ODD or any(getattr(text, name, None) for name in crossing)


def _number(text: Any, *names: str) -> int | None:
    """The first of some fields that is a positive number."""
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value > 0:
            return int(value)
    return None


def _entry(value: Any, number: int) -> Any:
    """A field's value for a layer, where it is a list of one a layer; else the value."""
    return value[number] if isinstance(value, list | tuple) and len(value) > number else value


def _told(text: Any, *names: str) -> int:
    """As `_number`, where there must be one."""
    value = _number(text, *names)
    if value is None:
        return int(configs.required(text, names[0]))
    return value


# Attention.


def _attention(text: Any, kind: str, own: bool) -> tuple[float, float, float]:
    """Weights, multiply-adds for each pair, and numbers cached for each token."""
    width, heads = _told(text, "hidden_size"), _told(text, "num_attention_heads")
    if len(set(getattr(text, "num_attention_heads_per_layer", None) or (heads,))) > 1:
        return UNKNOWN, UNKNOWN, UNKNOWN
    latent = _number(text, "kv_lora_rank")
    if latent is not None:
        return _latent_attention(text, width, heads, latent)
    head = sizes.head_dim(text)
    value = _number(text, "v_head_dim") or head
    groups = sizes.kv_heads(text)
    shared = bool(getattr(text, "attention_k_eq_v", False)) and kind in _FULL
    keys = width * groups * head
    values = 0 if shared else width * groups * value
    weights = width * heads * head + heads * value * width
    weights += (keys + values) if own else 0
    if configs.model_type(text) in _GATED:
        weights += width * heads * value
    cached = groups * (head + value) if own else 0
    return weights, heads * (head + value), cached


def _latent_attention(text: Any, width: int, heads: int, latent: int) -> tuple[float, float, float]:
    """Attention whose keys and values are made of a latent, which is what gets cached."""
    plain = int(configs.required(text, "qk_nope_head_dim"))
    rotary = int(configs.required(text, "qk_rope_head_dim"))
    value = int(configs.required(text, "v_head_dim"))
    query = heads * (plain + rotary)
    rank = _number(text, "q_lora_rank")
    weights = width * query if rank is None else width * rank + rank * query
    weights += width * (latent + rotary) + latent * heads * (plain + value)
    weights += heads * value * width
    return weights, heads * (plain + rotary + value), latent + rotary


# Recurrences.


def _recurrence(text: Any, kind: str) -> tuple[float, float]:
    """Weights, and multiply-adds of the recurrence for each token."""
    for read in (_short_convolution, _delta_rule, _state_space):
        try:
            return read(text)
        except UNTOLD:
            continue
    return UNKNOWN, UNKNOWN


def _short_convolution(text: Any) -> tuple[float, float]:
    width = _told(text, "hidden_size")
    return 4 * width**2, width * _told(text, "conv_L_cache")


def _delta_rule(text: Any) -> tuple[float, float]:
    """A gated delta rule: the state decays, is corrected and is read once a token."""
    width, taps = _told(text, "hidden_size"), _told(text, "linear_conv_kernel_dim")
    heads = _told(text, "linear_num_value_heads")
    key = _told(text, "linear_key_head_dim")
    keys = key * _told(text, "linear_num_key_heads")
    values = heads * _told(text, "linear_value_head_dim")
    # In: queries, keys, values and a gate, with two numbers a head besides; out.
    weights = width * (2 * keys + 2 * values + 2 * heads) + values * width
    return weights, taps * (2 * keys + values) + 3 * key * values


def _state_space(text: Any) -> tuple[float, float]:
    """Mamba 2."""
    width = _told(text, "hidden_size")
    heads = _told(text, "mamba_num_heads", "mamba_n_heads")
    inner = heads * _told(text, "mamba_head_dim", "mamba_d_head")
    state = _told(text, "ssm_state_size", "mamba_d_state")
    groups = _told(text, "n_groups", "mamba_n_groups")
    taps = _told(text, "conv_kernel", "mamba_d_conv")
    weights = width * (2 * inner + 2 * groups * state + heads) + inner * width
    return weights, taps * (inner + 2 * groups * state) + 3 * inner * state


# Feed-forwards.


def _mixes(text: Any) -> bool:
    """Whether there are layers with a mixture of experts."""
    return (_number(text, *_EXPERTS) or 0) > 1 and getattr(text, "is_moe", True) is not False


def _is_sparse(text: Any, number: int) -> bool | None:
    """Whether a layer of a model with mixtures is one; None where that is not told."""
    listed = getattr(text, "mlp_layer_types", None)
    if listed is not None:
        return {"dense": False, "sparse": True}.get(listed[number])
    listed = getattr(text, "moe_layers", None)
    if listed is not None:
        return number in listed
    if any(getattr(text, name, None) is not None for name in _UNREAD_MIXTURES):
        return None
    if (getattr(text, "moe_layer_freq", None) or 1) != 1:
        return None
    first = _number(text, "first_k_dense_replace", "num_dense_layers") or 0
    step = _number(text, "decoder_sparse_step") or 1
    only = getattr(text, "mlp_only_layers", None) or ()
    return number >= first and number not in only and (number + 1) % step == 0


def _feed_forward(text: Any, number: int, own: bool, sparse: bool | None) -> float:
    """Weights of a layer's feed-forward, and of what stands beside it."""
    width = _told(text, "hidden_size")
    # Embeddings of each layer's own, and a shortcut of low rank.
    beside = _number(text, "hidden_size_per_layer_input") or 0
    beside += _number(text, "laurel_rank") or 0
    total: float = 2 * width * beside
    parallel = bool(getattr(text, "enable_moe_block", False))
    if sparse is None:
        return UNKNOWN
    if parallel or not sparse:
        total += _matrices(text) * width * _dense_width(text, number, own)
    if parallel or (sparse and getattr(text, "enable_moe_block", True)):
        total += _mixture(text, width)
    return total


def _matrices(text: Any) -> int:
    return 2 if configs.model_type(text) in _TWO_MATRICES else 3


def _dense_width(text: Any, number: int, own: bool) -> int:
    inner = _number(text, *_DENSE_WIDTH) or _entry(getattr(text, "intermediate_size", None), number)
    if inner is None:
        inner = _told(text, *_INNER)
    if getattr(text, "block_auto_adjust_ff_dim", False):
        # LFM's own rounding of a gated width.
        inner = int(2 * inner / 3)
        inner = int((getattr(text, "block_ffn_dim_multiplier", None) or 1) * inner)
        of = int(configs.required(text, "block_multiple_of"))
        inner = of * ((inner + of - 1) // of)
    doubled = bool(getattr(text, "use_double_wide_mlp", False)) and not own
    return int(inner) * (2 if doubled else 1)


def _mixture(text: Any, width: int) -> float:
    """Weights of the experts that a token goes through."""
    chosen = _told(text, *_CHOSEN)
    inner = getattr(text, "moe_intermediate_size", None)
    each = shared = inner if inner is not None else _told(text, "intermediate_size")
    if isinstance(inner, list | tuple):
        if configs.model_type(text) not in _SECOND_EXPERTS:
            return UNKNOWN
        shared, each = inner
    beside = _number(text, *_SHARED_WIDTH)
    if beside is None:
        count = 1 if configs.model_type(text) in _ONE_SHARED else _number(text, *_SHARED) or 0
        beside = count * shared
    own = _number(text, *_EXPERT_INNER)
    # Experts may work in a width of their own, which all tokens are brought to and from.
    between = 0 if own is None else 2 * width * own
    return _matrices(text) * (chosen * each * (own or width) + beside * width) + between
