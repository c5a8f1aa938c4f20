"""What a budget costs on a real architecture: token counts, FLOPs and KV bytes, with no weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmprune import costs
from vlmprune.costs.architectures import CROPS, KNOWN
from vlmprune.costs.units import TERA
from vlmprune.errors import VlmpruneError, reason
from vlmprune.hosts.config import required
from vlmprune.select.budget import Budget, resolve_keep

# `image_seq_length` that the LLaVA config classes have when nobody sets it.
_DEFAULT_SEQUENCE = 576


@dataclass(frozen=True)
class Plan:
    """Costs of one image before and after pruning.

    Token counts are visual tokens of the whole image; FLOPs are in TFLOPs (1e12); `kv_bytes_*` are
    bytes of the visual tokens' keys and values over all layers.
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
    kv_bytes_before: int
    kv_bytes_after: int

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
        return 1.0 - self.total_tflops_after / self.total_tflops_before

    @property
    def kv_saving(self) -> float:
        """Share of the KV bytes that pruning saves, 0 to 1."""
        return 1.0 - self.kv_bytes_after / self.kv_bytes_before

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, ready for JSON."""
        return {
            **asdict(self),
            "total_tflops_before": self.total_tflops_before,
            "total_tflops_after": self.total_tflops_after,
            "flops_saving": self.flops_saving,
            "kv_saving": self.kv_saving,
        }


def plan(
    model: str,
    keep: int | float | None = None,
    budget: Budget = "crop",
    crops: int | None = None,
    bytes_per_value: int = 2,
) -> Plan:
    """Work out what a budget costs on one image of an architecture.

    An any-resolution model counts `crops` full crops (5 x 576 = 2880 for LLaVA-NeXT), as the
    published tables do. A real image may have fewer, since the padding of its high-resolution
    crops is cut away, and has newline tokens on top; neither is counted here.

    Args:
        model: one of `KNOWN`, or a local directory with a `config.json` (or that file).
        keep: visual tokens to keep, per crop or per image as `budget` says: an int is a number, a
            float a fraction in (0, 1], None keeps all.
        budget: "crop" gives each crop the same number, "image" shares one number among them.
        crops: crops of the image; by default 1, or 5 for LLaVA-NeXT.
        bytes_per_value: 2 for a float16 or bfloat16 cache.

    Returns:
        The plan.

    Raises:
        VlmpruneError: an unknown model, a path without a usable config, or a setting out of range.
    """
    if budget not in ("crop", "image"):
        raise VlmpruneError(f'budget={budget!r} is unknown; use "crop" or "image".')
    if crops is not None and crops < 1:
        raise VlmpruneError(f"crops={crops} is too few; use 1 or more.")
    try:
        config, per_crop, patches = _architecture(model)
        count = CROPS[config.model_type].count if crops is None else crops
        before = count * per_crop
        if keep is None:
            after = before
        elif budget == "crop":
            after = count * resolve_keep(keep, per_crop, "crop")
        else:
            after = resolve_keep(keep, before, "image")
        whole, left = (costs.spent(config, [n], bytes_per_value) for n in (before, after))
        return Plan(
            model=model,
            keep=keep,
            budget=budget,
            crops=count,
            tokens_per_crop=per_crop,
            visual_tokens_before=before,
            visual_tokens_after=after,
            llm_tflops_before=whole.flops / TERA,
            llm_tflops_after=left.flops / TERA,
            encoder_tflops=costs.encoder_flops(config, count, patches=patches) / TERA,
            kv_bytes_before=whole.kv_bytes,
            kv_bytes_after=left.kv_bytes,
        )
    except VlmpruneError:
        raise
    except ValueError as error:
        raise VlmpruneError(str(error)) from error


def architecture(model: str) -> Any:
    """The config of a known architecture or of a local folder.

    Raises:
        VlmpruneError: neither.
    """
    if model in KNOWN:
        return KNOWN[model]
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        trouble = "has no config.json" if folder.is_dir() else "is neither known nor a local path"
        raise VlmpruneError(
            f"model {model!r} {trouble}; use one of {', '.join(KNOWN)}, "
            "or a local directory with a config.json."
        )
    return _local_config(folder)


def _architecture(model: str) -> tuple[Any, int, int]:
    """The config, its visual tokens per crop and its patches per crop."""
    config = architecture(model)
    if model in KNOWN:
        patches = costs.patch_count(config)
        return config, patches, patches
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if config.model_type not in CROPS:
        raise VlmpruneError(
            f"{folder / 'config.json'} is of type {config.model_type!r}, whose visual tokens "
            f"cannot be counted yet; use a config of type {', '.join(CROPS)}, or one of "
            f"{', '.join(KNOWN)}."
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
            f"valid config, or one of {', '.join(KNOWN)}."
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"{path} cannot be read as JSON ({error}); mend or remove it."
        ) from error
    return content if isinstance(content, dict) else {}
