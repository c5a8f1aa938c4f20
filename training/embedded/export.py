"""Write a trained projector and decoder, with the vision tower, as a stock LLaVA folder.

The folder is what the `from_pretrained` of `LlavaForConditionalGeneration` and of `LlavaProcessor`
read: two safetensors shards (vision tower; projector and decoder), the configuration, a tokenizer
of whole words and a processor that needs neither torchvision nor the network.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
)
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
"""The first seven entries of every vocabulary, in this order; `<image>` is therefore token 4."""

IMAGE_SIDE = 224
PATCH = 14
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
VISION_SHARD = "model-00001-of-00002.safetensors"
DECODER_SHARD = "model-00002-of-00002.safetensors"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == 'assistant'"
    " else '' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s> ' if message['role'] == 'assistant'"
    " else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whole words, lower case, plurals as word and `##s`, punctuation apart, marks left whole.

    Args:
        vocabulary: the words by id; the first seven are `SPECIAL`.
    """
    if tuple(vocabulary[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"the vocabulary must begin with {SPECIAL}")
    words = {word: number for number, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(words, unk_token=UNK))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w\s]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t in (PAD, BOS, EOS, UNK, IMAGE)]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def processor(vocabulary: Sequence[str]) -> LlavaProcessor:
    """The processor: 224 x 224 pixels, ImageNet statistics, 256 `<image>` placeholders an image."""
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    images = CLIPImageProcessorPil(
        do_resize=True,
        size=square,
        resample=3,
        do_center_crop=False,
        crop_size=square,
        do_rescale=True,
        do_normalize=True,
        image_mean=MEAN,
        image_std=STD,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def configuration(
    text_config: Mapping[str, Any], vision_config: Mapping[str, Any]
) -> dict[str, Any]:
    """`config.json` of the whole model, with the position recommendation for pruning."""
    dropped = {"architectures", "dtype", "transformers_version"}
    vision = {k: v for k, v in vision_config.items() if k not in dropped}
    text = {
        "model_type": "llama",
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | dict(text_config)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "image_seq_length": IMAGE_TOKENS,
        "image_token_index": SPECIAL.index(IMAGE),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vlmprune": {"positions": "original"},
    }


def export(
    folder: Path,
    vision: Path,
    weights: Mapping[str, torch.Tensor],
    text_config: Mapping[str, Any],
    vocabulary: Sequence[str],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder, replacing file by file what is there.

    Args:
        folder: where to; built beside it first, so that a reader never sees half of it.
        vision: folder with DINOv2's `config.json` and `model.safetensors`.
        weights: projector and decoder under LLaVA's names (`multi_modal_projector.*`,
            `language_model.model.*`), any float type; stored as float16. No head: it is tied.
        text_config: what differs from `configuration`'s defaults (sizes of the decoder).
        vocabulary: the words by id.
        extra: further entries of the `vlmprune` key of `config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        tower = {f"vision_tower.{k}": v for k, v in load_file(vision / "model.safetensors").items()}
        shards = {
            VISION_SHARD: tower,
            DECODER_SHARD: {k: v.detach().cpu().half().contiguous() for k, v in weights.items()},
        }
        for file, tensors in shards.items():
            save_file(tensors, new / file, metadata={"format": "pt"})
        size = sum(
            t.numel() * t.element_size() for shard in shards.values() for t in shard.values()
        )
        index = {
            "metadata": {"total_size": size},
            "weight_map": {k: file for file, shard in shards.items() for k in sorted(shard)},
        }
        config = configuration(text_config, json.loads((vision / "config.json").read_text()))
        config["text_config"]["vocab_size"] = len(vocabulary)
        config["vlmprune"] |= dict(extra or {})
        processor(vocabulary).save_pretrained(new)
        _write(new / "model.safetensors.index.json", index)
        _write(new / "config.json", config)
        generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
        generation["max_new_tokens"] = 64
        _write(new / "generation_config.json", generation)
        for file in sorted(new.iterdir()):
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
