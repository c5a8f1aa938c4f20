"""Tiny checkpoints in the layout that transformers writes, with the embedded model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmprune import embedded

IMAGE = 4
WORDS = 97
SIDE, PATCH = 112, 14  # 8 x 8 = 64 visual tokens an image
VISUAL = (SIDE // PATCH) ** 2


def text_config(**changes: Any) -> LlamaConfig:
    """Heads of 32 channels: what vLLM's attention on the CPU takes at least."""
    shape = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**shape, **changes})


def scale_up(model: torch.nn.Module, seed: int = 0) -> None:
    """With the default initialisation every logit is near zero and answers hang on rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5, generator=generator)
            elif "norm" not in name:
                weight.normal_(std=0.1, generator=generator)


def tokenizer_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.path() / name, folder / name)


def save(model: Any, folder: Path, renamed: dict[str, str]) -> None:
    """In the layout of the hub's checkpoints, whose prefixes newer transformers drop on saving."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        old = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        tensors[renamed.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, file, {"format": "pt"})


def llava(folder: Path, **changes: Any) -> Path:
    """A LLaVA-1.5 of random weights with a CLIP tower; writes its folder and returns it."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **changes,
    )
    model = LlavaForConditionalGeneration(config)
    scale_up(model)
    # No end token: every answer goes its full length.
    model.generation_config.eos_token_id = None
    save(model, folder, {"vision_tower.": "vision_tower.vision_model."})
    tokenizer_files(folder)
    processor = json.loads((embedded.path() / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": SIDE, "width": SIDE}
    processor["image_processor"]["crop_size"] = {"height": SIDE, "width": SIDE}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
