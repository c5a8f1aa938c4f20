"""Configs, models and tokenizers made by Transformers' own loaders; no remote code is ever trusted.

What fails is left to the caller, who knows what was asked for and can say what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers.activations import ACT2FN

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


# Classes that load by themselves what a folder holds.
CONFIG, TOKENIZER, CLIP = "AutoConfig", "AutoTokenizer", "CLIPModel"


def load(kind: str, source: str | Path, **options: Any) -> Any:
    """Something that a class of Transformers loads.

    Args:
        kind: the class, by its name.
        source: a folder or an id of the Hub.
        options: of its `from_pretrained`.
    """
    return getattr(transformers, kind).from_pretrained(source, **options)


def config_of(source: str | Path, local: bool) -> Any:
    """The config of a folder or an id of the Hub.

    Args:
        source: the folder or id.
        local: whether no network may be asked.
    """
    return load(CONFIG, source, local_files_only=local, trust_remote_code=False)


def reachable(seconds: float = 5.0) -> bool:
    """Whether the Hub answers at all, asked once: its own loaders ask many times over.

    Args:
        seconds: to wait for an answer.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    # Name servers, proxies, certificates and the offline mode fail in many ways.
    except Exception:
        return False
    return True


def model_of(config: Any, **options: Any) -> Any:
    """A vision-language model of a config, with fresh weights.

    Args:
        config: the model's.
        options: as Transformers takes them, such as `dtype`.
    """
    return transformers.AutoModelForImageTextToText.from_config(config, **options)


def llava(
    folder: Path, dtype: torch.dtype, attention: str | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model of LLaVA's class and its processor, from a local folder.

    Args:
        folder: as `save_pretrained` writes it.
        dtype: of the weights.
        attention: `attn_implementation`; None is Transformers' own choice.
    """
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    processor = transformers.LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model, processor


def llava_config(kind: str, text: dict[str, Any], tower: dict[str, Any], **others: Any) -> Any:
    """A config of LLaVA-1.5 or LLaVA-NeXT with a Llama decoder and a CLIP tower.

    Args:
        kind: "llava" or "llava_next".
        text: fields of the decoder's config.
        tower: fields of the tower's config.
        others: fields of the whole.
    """
    classes = {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}
    return classes[kind](
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**tower),
        **others,
    )


def qwen_config(**fields: Any) -> Any:
    """A config of Qwen2.5-VL."""
    return transformers.Qwen2_5_VLConfig(**fields)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by the name that configs give it."""
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


def source_of(module: Any) -> str:
    """Where a model, or a part of one, was loaded from; "" where it does not say."""
    return str(getattr(module, "name_or_path", "") or "")
