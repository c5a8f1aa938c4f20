"""A tiny model of any class, made of its config's own defaults.

Every width is `WIDTH`, so that parts fit together whatever each calls its own; lists with one entry
a layer keep each kind of layer that they had.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from surveyed.sizes import (
    BOS,
    EOS,
    HEAD_DIM,
    HEADS,
    IMAGE,
    KV_HEADS,
    LAYERS,
    PAD,
    PATCH,
    SIDE,
    SPECIALS,
    TOWER_LAYERS,
    VOCABULARY,
    WIDTH,
)
from surveyed.special import SPECIAL, TEXTS

# Between a class and the language model that it is given in place of its usual one.
WITH = ":"

Values = dict[str, Any]

# How large what is called so becomes; the first form that fits the whole name counts.
SIZES: Sequence[tuple[str, int]] = (
    (
        r"(num_)?(key_value_heads|kv_heads|query_groups)|num_key_value_heads|.*_num_kv_heads",
        KV_HEADS,
    ),
    (r"num_attention_heads|num_heads|.*attention_heads|n_heads?|.*_n_heads|swa_.*heads", HEADS),
    (r"linear_num_((key|value)_)?heads|(mamba|ssm)_num_heads|mamba_n_heads|n_mamba_heads", HEADS),
    (r"(attention_|swa_|global_|mamba_)?head_dim|linear_((key|value)_)?head_dim", HEAD_DIM),
    (r"v_head_dim|index_head_dim|mamba_d_head", HEAD_DIM),
    (r"qk_(nope|rope)_head_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM),
    (r"codebook_dim|adapter_in(put)?_(dim|size)|adapter_.*_dim|.*_(input|output)_dim", WIDTH),
    (r"(kv|q|o)_lora_rank|.*lowrank|.*_lora_dim", 32),
    (r"(n|num)_(routed|local)?_?experts|moe_num_experts|num_zero_experts", 4),
    (r"(num_experts_per_(tok|token)|moe_topk|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (r"(.*vocab_size.*|codebook_size|num_embeds)", VOCABULARY),
    (r"(text_|max_|.*)max_position_embeddings|max_(text|seq|target|source)_(len|positions)", 1024),
    (r"(sliding|attention)_(window|window_size|chunk_size)|sliding_window_size", 1024),
    (r".*(intermediate|ffn|feedforward|expert|ff)_(size|dim|hidden_size|hidden_dim)", WIDTH),
    (
        r".*hidden_(size|dim|act_dim)|.*embed_dim|.*_embed_size|d_model|d_ff|d_inner|dim|width",
        WIDTH,
    ),
    (r"(projection|output|embedding|mlp|q_former|inner|text|vision|proj)_(dim|size)", WIDTH),
    (r".*projector.*(hidden|dim|size)|output_channels|mm_hidden|emb_dim", WIDTH),
    (r"patch_size|teacher_patch_size", PATCH),
    (r"image_size|img_size|input_size|crop_size|tile_size|max_img_size|force_image_size", SIDE),
    (r"temporal_patch_size", 2),
    (r"num_position_embeddings|position_embedding_size|num_patches|seq_len", 64),
    (r"mm_tokens_per_image", 16),
    (r"vision_soft_tokens_per_image|image_seq_(len|length)", 16),
    (r"num_query_tokens|num_queries|resampler_n_latents|.*n_latents", 8),
    (r"(decoder|encoder)_layers|num_decoder_layers", LAYERS),
    (r"ssm_state_size|mamba_d_state|(mamba_)?n_groups|ssm_n_groups|state_size", 2),
    (r"base_channels", 32),
    (r"index_topk|index_top_k", 1024),
)
LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "n_layers",
    "num_layer",
    "encoder_layers",
)
TOWER_PATH = re.compile(r"vision|sam|tower|visual|qformer|perceiver|audio|encoder|vq|protein")
SUBSCRIPTS = re.compile(r".*(_index(es)?|_indices|_layer|_layers|_idxs|layer_ids?|layers_idx)")


def shrunk(given: Mapping[str, Any], path: Sequence[str] = ()) -> Values:
    """A config's fields at tiny sizes, in the parts of it, too."""
    out: Values = dict(given)
    for name in ("transformers_version", "id2label", "label2id"):
        out.pop(name, None)
    given = dict(out)
    count = next((n for n in LAYER_COUNTS if isinstance(given.get(n), int)), None)
    before = int(given[count]) if count else 0
    wanted = TOWER_LAYERS if any(TOWER_PATH.search(part) for part in path) else LAYERS
    chosen = layers(given, before, wanted) if count else []
    for name, value in given.items():
        if is_table(value):
            out[name] = {
                str(new): shrunk(value[key], (*path, "layer"))
                for new, old in enumerate(chosen)
                for key in value
                if int(key) == old
            }
        elif str(name).startswith("rope_") and isinstance(value, Mapping):
            out[name] = rope(value)
        elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            out[name] = shrunk(value, (*path, name))
        elif name == count or (count and name in LAYER_COUNTS and value == before):
            out[name] = len(chosen)
        elif count and listed(name, value) and len(value) == before and before > 1:
            kept = [value[i] for i in chosen]
            out[name] = "".join(kept) if isinstance(value, str) else sized_all(name, kept)
        elif SUBSCRIPTS.fullmatch(name) and not name.endswith("token_index"):
            out[name] = subscripts(value, before, len(chosen))
        else:
            out[name] = sized(name, value, given)
    return out


def layers(given: Mapping[str, Any], before: int, wanted: int) -> list[int]:
    """Which layers stay: the first of each kind, then the first ones."""
    lists = [
        value for name, value in given.items() if listed(name, value) and len(value) == before > 1
    ]
    tables = [v for v in given.values() if is_table(v)]
    kinds: dict[str, int] = {}
    for i in range(before):
        kind = str([one[i] for one in lists] + [one.get(str(i), one.get(i)) for one in tables])
        kinds.setdefault(kind, i)
    first = sorted(kinds.values())[:wanted]
    return sorted({*first, *[i for i in range(before) if i not in first][: wanted - len(first)]})


def listed(name: str, value: Any) -> bool:
    """Whether it may hold an entry a layer; a pattern of letters alike."""
    return isinstance(value, list) or (isinstance(value, str) and "pattern" in name)


def is_table(value: Any) -> bool:
    """Whether it holds what single layers have of their own, by their numbers."""
    own = isinstance(value, Mapping) and value and all(str(k).isdigit() for k in value)
    return bool(own) and all(isinstance(one, Mapping) for one in value.values())


def sized_all(name: str, values: list[Any]) -> list[Any]:
    """A list of a layer's values each at the tiny size."""
    return [sized(name, value, {}) for value in values]


def sized(name: str, value: Any, among: Mapping[str, Any]) -> Any:
    """A field's value at the tiny size, where it has one."""
    if isinstance(value, bool) or value is None:
        return value
    if re.search(r"dropout|drop_path|layerdrop|_pdrop|drop_rate", name) and not isinstance(
        value, str
    ):
        return 0.0
    if name == "mrope_section":
        return section(value)
    if name == "num_key_value_heads" and among.get("kv_lora_rank"):
        return HEADS
    if name == "head_dim" and value is not None and value == among.get("qk_rope_head_dim"):
        return HEAD_DIM // 2
    if name == "partial_rotary_factor" and isinstance(value, float):
        return max(value, 0.5)
    size = next((size for form, size in SIZES if re.fullmatch(form, name)), None)
    if size is None:
        return value
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        return [size if v else v for v in value]
    return size if isinstance(value, int) and value > 0 else value


def rope(given: Mapping[str, Any]) -> Values:
    """Rotary settings for short heads."""
    out: Values = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            out[name] = rope(value)
        elif name == "mrope_section":
            out[name] = section(value)
        elif name in ("partial_rotary_factor", "rotary_dim"):
            out[name] = max(value, 0.5) if isinstance(value, float) else HEAD_DIM
        elif name in ("original_max_position_embeddings",):
            out[name] = 512
        elif name in ("short_factor", "long_factor"):
            out[name] = value[: HEAD_DIM // 2]
        else:
            out[name] = value
    # What has sections may turn half of a head alone.
    if "mrope_section" in out:
        half = HEAD_DIM // 2
        turned = int(half * float(out.get("partial_rotary_factor", 1.0)))
        parts = len(out["mrope_section"])
        out["mrope_section"] = [
            turned - (parts - 1) * (turned // parts),
            *[turned // parts] * (parts - 1),
        ]
    return out


def section(value: Sequence[int]) -> list[int]:
    """Rotary pairs of each of so many positions, of heads at the tiny size."""
    parts, half = len(value), HEAD_DIM // 2
    return [half - (parts - 1) * (half // parts), *[half // parts] * (parts - 1)]


def subscripts(value: Any, before: int, after: int) -> Any:
    """Numbers of layers, within fewer layers; negative ones stay."""
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        if all(v < 0 for v in value):
            return [max(v, -after) for v in value]
        return sorted({v if v < after else after - 1 - i for i, v in enumerate(value[:1])})
    if type(value) is int and value >= 0:
        return min(value, max(after - 1, 0)) if after else min(value, 1)
    return value


def identified(values: Values, names: Iterable[str]) -> str | None:
    """Give each special token a small id of its own; the field that names an image's placeholder.

    Args:
        values: a config's fields, changed in place, those of its parts alike.
        names: what placeholders may be called, the likeliest first.
    """
    ids: dict[str, int] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    own = [n for n in names if type(values.get(n)) is int]
    free = iter(SPECIALS)
    for name in own[:1]:
        ids[name] = IMAGE

    def walk(part: Values) -> None:
        for name, value in part.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, dict):
                walk(value)
            elif re.fullmatch(r".*(token_id|token_index|token_ids)", name):
                if isinstance(value, list):
                    part[name] = [next(free) for _ in value] if name not in ids else [ids[name]]
                elif type(value) is int:
                    ids.setdefault(name, next(free))
                    part[name] = ids[name]

    walk(values)
    for name in own[:1]:
        values[name] = IMAGE
    return own[0] if own else None


def config_of(kind: str) -> tuple[Any, str | None]:
    """A tiny config of a type of model, and the field that names an image's placeholder.

    Args:
        kind: its `model_type`; "llava:qwen3" is LLaVA with that language model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, _, decoder = kind.partition(WITH)
    cls = CONFIG_MAPPING[kind]
    special = SPECIAL.get(kind, {})
    start = special.get("start", lambda: cls().to_dict())()
    if decoder:
        start["text_config"] = CONFIG_MAPPING[decoder]().to_dict()
    text = start.get("text_config") or start
    kinds = any(name.endswith("_attention") for name in text.get("rope_parameters") or {})
    own = "text_config.rope_parameters" in special.get("config", {})
    if needs_sections(cls) and not kinds and not own:
        # Where none are said the code's own sections are for heads of full size.
        text["rope_parameters"] = dict(ROPE) | (text.get("rope_parameters") or {})
    values = shrunk(start)
    merge(values, special.get("config", {}))
    merge(values.get("text_config") or values, TEXTS.get(decoder, {}))
    field = identified(values, special.get("placeholder", PLACEHOLDERS))
    merge(values, special.get("after", {}))
    return cls.from_dict(values), field


ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}


def needs_sections(config: type) -> bool:
    """Whether the code of the models that take a config knows rotary sections."""
    parts = getattr(config, "sub_configs", {}).get("text_config")
    part = getattr(parts, "config_class", parts)
    return any('"mrope_section"' in source(one) for one in (config, part) if isinstance(one, type))


def source(config: type) -> str:
    """The code of the models that take a config; nothing where it has none of its own."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        return inspect.getsource(importlib.import_module(name))
    except ModuleNotFoundError:
        return ""


PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "image_patch_id",
    "img_context_token_id",
    "image_patch_token_id",
    "im_patch_id",
    "media_placeholder_token_id",
)


def merge(values: Values, changes: Mapping[str, Any]) -> None:
    """Set fields, those of parts by nested tables or dotted names; None of a part leaves it."""
    for name, value in changes.items():
        if "." in str(name):
            first, rest = name.split(".", 1)
            merge(values.setdefault(first, {}), {rest: value})
        elif isinstance(value, Mapping) and isinstance(values.get(name), dict):
            merge(values[name], value)
        else:
            values[name] = value


def built(kind: str, class_name: str, seed: int = 0) -> tuple[Any, str | None]:
    """A tiny model with loud weights, and the field that names an image's placeholder."""
    import transformers

    config, field = config_of(kind)
    torch.manual_seed(seed)
    model = loud(getattr(transformers, class_name)(config))
    return model, field


def loud(model: Any) -> Any:
    """Scale random weights up, so that a difference shows, and give attention unusual scales."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.8 / weight[0].numel() ** 0.5)
            elif "norm" not in name and not re.search(r"lambda|A_log|dt_bias|scale", name):
                weight.normal_(std=0.1)
    for number, module in enumerate(
        m for m in model.modules() if type(m).__name__.endswith("Attention")
    ):
        for name in ("scaling", "scale"):
            usual = getattr(module, name, None)
            if isinstance(usual, float):
                setattr(module, name, usual * (0.6, 1.7)[number % 2])
    if model.generation_config is not None:
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
    return model.eval()
