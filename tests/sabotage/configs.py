"""Rows about configs: fields that are missing, which the host keeps elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from pytest import MonkeyPatch

from sabotage.attention import tower
from sabotage.hosts import Row
from sabotage.tools import hide, recast

Change = Callable[[Any, MonkeyPatch], None]


def _top(*fields: str) -> Change:
    """Fields of the model's config that the base model reads under another name."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        base = model.model
        methods = ("forward", "get_image_features", "get_placeholder_mask", "get_rope_index")
        found = tuple(name for name in methods if hasattr(type(base), name))
        hide(model.config, *fields, shown={base: found})

    return change


def _vision(*fields: str) -> Change:
    """Fields of the tower's config."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        base, found = model.model, tower(model)
        methods = ("get_image_features", "get_rope_index")
        shown = {base: tuple(n for n in methods if hasattr(type(base), n)), found: ("forward",)}
        hide(model.config.vision_config, *fields, shown=shown)

    return change


def _text(*fields: str) -> Change:
    """Fields of the language model's config."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        shown = {model.get_decoder(): ("forward",), model: ("_prepare_cache_for_generation",)}
        hide(model.config.text_config, *fields, shown=shown)

    return change


def _strategy(model: Any, patch: MonkeyPatch) -> None:
    """The config says that the CLS token goes on, and the code drops it."""
    base = model.model
    plain = type(base).get_image_features

    @wraps(plain)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs | {"vision_feature_select_strategy": "default"})

    recast(base, get_image_features=features)
    model.config.vision_feature_select_strategy = "full"


def _wrong(part: str, field: str, value: Any) -> Change:
    """A field that says something else than what the host, built before, does."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        setattr(getattr(model.config, part), field, value)

    return change


ROWS: list[Row] = [
    Row("vision_feature_layer is missing", _top("vision_feature_layer")),
    Row(
        "vision_feature_layer is missing, tiles",
        _top("vision_feature_layer"),
        host="llava_next",
    ),
    Row("vision_feature_select_strategy is missing", _top("vision_feature_select_strategy")),
    Row("vision_feature_select_strategy says another one", _strategy),
    Row("image_token_id is missing", _top("image_token_id")),
    Row("image_grid_pinpoints is missing", _top("image_grid_pinpoints"), host="llava_next"),
    Row("image_size is missing", _vision("image_size"), host="llava_next"),
    Row("the tower's num_hidden_layers is missing", _vision("num_hidden_layers")),
    Row("patch_size is missing", _vision("patch_size")),
    Row("window_size is missing", _vision("window_size"), host="qwen2_5_vl"),
    Row("fullatt_block_indexes is missing", _vision("fullatt_block_indexes"), host="windows"),
    Row("spatial_merge_size is missing", _vision("spatial_merge_size"), host="qwen2_5_vl"),
    Row("depth is missing", _vision("depth"), host="qwen2_5_vl"),
    Row(
        "fullatt_block_indexes says other blocks",
        _wrong("vision_config", "fullatt_block_indexes", [0, 2]),
        host="qwen2_5_vl",
    ),
    Row(
        "window_size says other windows",
        _wrong("vision_config", "window_size", 16 * 4),
        host="qwen2_5_vl",
    ),
    Row(
        "deepstack_visual_indexes is missing", _vision("deepstack_visual_indexes"), host="qwen3_vl"
    ),
    Row("layer_types is missing", _text("layer_types"), host="gemma3"),
    Row("sliding_window is missing", _text("sliding_window"), host="windowed"),
    Row("num_hidden_layers is missing", _text("num_hidden_layers")),
    Row("num_key_value_heads is missing", _text("num_key_value_heads")),
    Row("intermediate_size is missing", _text("intermediate_size")),
]
