"""What a budget costs on a real architecture: token counts, FLOPs and KV bytes, with no weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmprune import costs
from vlmprune.costs.architectures import (
    ANY_SIZE_TOKENS,
    CROPS,
    SHAPES,
    Architecture,
    QwenTower,
    grid_of,
)
from vlmprune.costs.units import TERA, ready
from vlmprune.errors import VlmpruneError, meant, reason
from vlmprune.files import is_file, is_folder, parsed, path_of
from vlmprune.hosts.config import required
from vlmprune.select.budget import Budget, Newlines, exceeds, kept_of
from vlmprune.select.settings import check_choice

# `image_seq_length` that the LLaVA config classes have when nobody sets it.
_DEFAULT_SEQUENCE = 576
# Each is counted by itself; no model cuts an image into as many.
_MOST_CROPS = 10_000


@dataclass(frozen=True)
class Plan:
    """Costs of one image before and after pruning.

    Token counts are visual tokens of the whole image, newline tokens included; those alone are in
    `newline_tokens_*`, and `tokens_per_crop` is without them. FLOPs are in TFLOPs (1e12);
    `kv_bytes_*` are bytes of the visual tokens' keys and values over all layers. What the config
    does not tell is `costs.UNKNOWN`, and None in `as_dict`; so are shares of it. Of
    `crops_below_keep`, which have fewer tokens than an int `keep`, all are kept; where the budget
    is the image's, those are all of its crops or none.
    """

    model: str
    keep: int | float | None
    budget: Budget
    crops: int
    tokens_per_crop: int
    visual_tokens_before: int
    visual_tokens_after: int
    llm_tflops_before: float
    llm_tflops_after: float
    encoder_tflops: float
    kv_bytes_before: float
    kv_bytes_after: float
    newlines: Newlines = "keep"
    newline_tokens_before: int = 0
    newline_tokens_after: int = 0
    size: tuple[int, int] | None = None
    flops_per_multiply_add: int = costs.PER_MULTIPLY_ADD
    crops_below_keep: int = 0

    @property
    def total_tflops_before(self) -> float:
        """Language model and encoder, full."""
        return self.llm_tflops_before + self.encoder_tflops

    @property
    def total_tflops_after(self) -> float:
        """Language model and encoder, pruned; the encoder sees the whole image either way."""
        return self.llm_tflops_after + self.encoder_tflops

    @property
    def flops_saving(self) -> float:
        """Share of the total FLOPs that pruning saves, 0 to 1."""
        return _saving(self.total_tflops_before, self.total_tflops_after)

    @property
    def kv_saving(self) -> float:
        """Share of the KV bytes that pruning saves, 0 to 1."""
        return _saving(self.kv_bytes_before, self.kv_bytes_after)

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, ready for JSON."""
        found: dict[str, Any] = {
            **asdict(self),
            "total_tflops_before": self.total_tflops_before,
            "total_tflops_after": self.total_tflops_after,
            "flops_saving": self.flops_saving,
            "kv_saving": self.kv_saving,
        }
        made: dict[str, Any] = ready(found)
        return made


def _saving(before: float, after: float) -> float:
    """What is saved, as a share; none of nothing."""
    return 1.0 - after / before if before else 0.0


def plan(
    model: str,
    keep: int | float | None = None,
    budget: Budget = "crop",
    crops: int | None = None,
    bytes_per_value: int = 2,
    newlines: Newlines = "keep",
    size: tuple[int, int] | None = None,
    per_multiply_add: int = costs.PER_MULTIPLY_ADD,
) -> Plan:
    """Work out what a budget costs on one image of an architecture.

    An any-resolution model sees a picture that fills its crops, of LLaVA-NeXT 672 x 672 pixels:
    5 x 576 = 2880 visual tokens and a newline token behind each of the 48 rows of its joined
    crops. Of a picture of another shape the host cuts padding away; give its `size`. The published
    tables count no newlines: newlines="drop" gives what they have, pruned or not.

    Args:
        model: one of `SHAPES`, or a local directory with a `config.json` (or that file).
        keep: visual tokens to keep, per crop or per image as `budget` says: an int is a number, a
            float a fraction in (0, 1], None keeps all.
        budget: "crop" gives each crop the same number, "image" shares one number among them.
        crops: crops of the image; by default 1, or 5 for LLaVA-NeXT. Those behind the first stand
            in a rectangle that is as square as can be and not higher than wide.
        bytes_per_value: 2 for a float16 or bfloat16 cache.
        newlines: "keep" or "drop", as the methods' setting. What there is before has all of them.
        size: (height, width) of the image in pixels, in place of `crops`; its tokens are then
            counted by the host's own packing; of Qwen2.5-VL's, each 28 pixels a side are one, and
            the processor's limits are left out. Without it such a model's image has 1,024.
        per_multiply_add: FLOPs that a multiply and an add count as: 2 in the tables of VisPruner,
            FasterVLM and CDPruner, 1 in those of SparseVLM, PyramidDrop and CATP.

    Returns:
        The plan.

    Raises:
        VlmpruneError: an unknown model, a path without a usable config, or a setting out of range.
    """
    if budget not in ("crop", "image"):
        raise VlmpruneError(f'budget={budget!r} is unknown; use "crop" or "image".')
    if crops is not None and crops < 1:
        raise VlmpruneError(f"crops={crops} is too few; use 1 or more.")
    if crops is not None and crops > _MOST_CROPS:
        raise VlmpruneError(f"crops={crops} is too many; use {_MOST_CROPS} or fewer.")
    check_choice("newlines", newlines, Newlines)
    if size is not None and (crops is not None or min(size) < 1):
        raise VlmpruneError(
            f"size={size} with crops={crops} does not go together; give one of them, the size as "
            "height and width in pixels of at least 1."
        )
    try:
        config, per_crop, patches = _architecture(model, size)
        own, ends = _tokens(config, per_crop, patches, crops, size)
        count, before = len(own), sum(own) + ends
        left = ends if newlines == "keep" else 0
        units = own if budget == "crop" else [sum(own)]
        after = left + sum(n if keep is None else kept_of(keep, n) for n in units)
        below = sum(exceeds(keep, n) for n in units) * (1 if budget == "crop" else count)
        whole, few = (
            costs.spent(config, [n], bytes_per_value, per_multiply_add) for n in (before, after)
        )
        encoder = costs.encoder_flops(
            config, count, patches=patches, per_multiply_add=per_multiply_add
        )
        return Plan(
            model=model,
            keep=keep,
            budget=budget,
            crops=count,
            tokens_per_crop=per_crop,
            visual_tokens_before=before,
            visual_tokens_after=after,
            llm_tflops_before=whole.flops / TERA,
            llm_tflops_after=few.flops / TERA,
            encoder_tflops=encoder / TERA,
            kv_bytes_before=whole.kv_bytes,
            kv_bytes_after=few.kv_bytes,
            newlines=newlines,
            newline_tokens_before=ends,
            newline_tokens_after=left,
            size=size,
            flops_per_multiply_add=per_multiply_add,
            crops_below_keep=below,
        )
    except VlmpruneError:
        raise
    except ValueError as error:
        raise VlmpruneError(str(error)) from error


def _tokens(
    config: Any, per_crop: int, patches: int, crops: int | None, size: tuple[int, int] | None
) -> tuple[list[int], int]:
    """The visual tokens of each crop of an image, and its newline tokens.

    Args:
        config: of the architecture.
        per_crop: visual tokens of a whole crop.
        patches: of a crop.
        crops: number of crops; None for the usual one.
        size: of the image; None for one that fills its crops.
    """
    if config.model_type not in CROPS:
        if crops not in (None, 1):
            raise VlmpruneError(
                f"crops={crops}: the model takes pictures of any size, each as one; leave it out, "
                "or give the size."
            )
        return [per_crop], 0
    usual = CROPS[config.model_type]
    if not usual.grid:
        return [per_crop] * (usual.count if crops is None else crops), 0
    if size is not None:
        from vlmprune.hosts import made_up

        if isinstance(config, Architecture):
            config = made_up.llava_config(
                config.model_type, asdict(config.text_config), asdict(config.vision_config)
            )
        layout = made_up.layout_of(config, size)
        return layout.candidates().sum(dim=1).tolist(), layout.newlines
    count = usual.count if crops is None else crops
    tiles = count - 1
    high = max((n for n in range(1, math.isqrt(tiles) + 1) if tiles % n == 0), default=0)
    return [per_crop] * count, high * math.isqrt(patches)


def architecture(model: str) -> Any:
    """The config of a known architecture or of a local folder.

    Raises:
        VlmpruneError: neither.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = path_of(model)
    folder = path.parent if path.name == "config.json" else path
    if not is_file(folder / "config.json"):
        trouble = "has no config.json"
        if not is_folder(folder):
            trouble = f"is neither known nor a local path{meant(model, SHAPES)}"
        raise VlmpruneError(
            f"model {model!r} {trouble}; use one of {', '.join(SHAPES)}, "
            "or a local directory with a config.json."
        )
    return _local_config(folder)


def _architecture(model: str, size: tuple[int, int] | None) -> tuple[Any, int, int]:
    """The config, its visual tokens per crop and its patches per crop; of an image of `size`."""
    config = architecture(model)
    if isinstance(config, Architecture) and isinstance(config.vision_config, QwenTower):
        merged = config.vision_config.spatial_merge_size
        side = merged * config.vision_config.patch_size
        rows, columns = grid_of(ANY_SIZE_TOKENS)
        if size is not None:
            rows, columns = (max(1, round(pixels / side)) for pixels in size)
        return config, rows * columns, rows * columns * merged**2
    if model in SHAPES:
        patches = costs.patch_count(config)
        return config, patches, patches
    path = path_of(model)
    folder = path.parent if path.name == "config.json" else path
    if config.model_type not in CROPS:
        raise VlmpruneError(
            f"{folder / 'config.json'} is of type {config.model_type!r}, whose visual tokens "
            f"cannot be counted yet; use a config of type {', '.join(CROPS)}, or one of "
            f"{', '.join(SHAPES)}."
        )
    # "full" hands the CLS token on to the decoder as one more visual token; ViP-LLaVA, whose config
    # has no such field, never does.
    cls_token = 0
    if CROPS[config.model_type].selects:
        cls_token = int(required(config, "vision_feature_select_strategy") == "full")
    patches = _local_patches(folder, config, cls_token)
    return config, patches + cls_token, patches


def _local_config(folder: Path) -> Any:
    from vlmprune.hosts import pretrained

    try:
        return pretrained.config_of(folder, local=True)
    # A broken config fails in many ways, none of which the caller could treat apart.
    except Exception as error:
        raise VlmpruneError(
            f"{folder / 'config.json'} cannot be read by Transformers ({reason(error)}); use a "
            f"valid config, or one of {', '.join(SHAPES)}."
        ) from error


def _local_patches(folder: Path, config: Any, cls_token: int) -> int:
    """Patches of one crop at the size that the model is really fed.

    The processor's files say it best. Next comes the config's `image_seq_length`, unless it is the
    class's default, which gets saved for towers of any size; then the tower's `image_size`.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = _json(folder / name)
        content = content.get("image_processor", content)
        for key in ("crop_size", "size"):
            size = content.get(key)
            if isinstance(size, dict) and "height" in size and "width" in size:
                return costs.patch_count(config, (size["height"], size["width"]))
    stated = required(config, "image_seq_length")
    if stated == _DEFAULT_SEQUENCE:
        return costs.patch_count(config)
    return int(stated) - cls_token


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"{path} cannot be read as JSON ({error}); mend or remove it."
        ) from error
    return content if isinstance(content, dict) else {}
