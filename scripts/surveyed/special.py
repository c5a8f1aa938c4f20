"""What single classes need besides what their configs' names tell.

An entry may have
    apart     why the class is not tried at all;
    start     a function that gives the config's fields, where its defaults make no model;
    config    fields to set, of parts by nested tables or dotted names;
    after     the same, past the numbering of special tokens;
    placeholder  what may name the id of an image's placeholder;
    pixels    (model, number) → the inputs of one image;
    join      (images, images by row) → those of several;
    count     (model, image) → its visual tokens;
    batches   images by row, to be tried in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surveyed import pictures
from surveyed.pictures import CELL, noise
from surveyed.sizes import CODES, HEAD_DIM, HEADS, IMAGE, PATCH, SIDE, WIDTH


def default(kind: str, **settings: Any) -> Callable[[], dict[str, Any]]:
    """The fields of a config that is made with settings."""

    def make() -> dict[str, Any]:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return dict(CONFIG_MAPPING[kind](**settings).to_dict())

    return make


def letters(code: int) -> str:
    """A code's number in Chameleon's letters."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))


MAPPED = {"<image>": IMAGE} | {f"IMGIMG{letters(i)}Z": CODES + i for i in range(16)}
VISUAL = {"<image>": IMAGE, "<|extra_200|>": CODES + 20} | {
    f"<|visual token {i:06d}|>": CODES + i for i in range(16)
}
PINPOINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
SAM = {"downsample_channels": [32, WIDTH], "output_channels": WIDTH}
STARTS = {"vision_start_token_id": 7, "vision_end_token_id": 8}
STRIP = {
    "config": {"image_token_id": IMAGE, "insert_layer_id": 1, "vision_config.insert_layer_id": 1},
    "pixels": pictures.strip,
    "join": pictures.strip_join,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
INDEXED = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 1024,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
QUERIED = {"image_token_index": IMAGE, "text_config.word_embed_proj_dim": WIDTH}
HALF_CONV = {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None}
TALKER = "a thinker with a talker behind it; the thinker has a line of its own"

SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"config": {"projector_patch_to_query_dict": {64: 16}}},
    "apertus1p5": {
        "config": {"vision_config.codebook_size": 16, "audio_config.codebook_size": 16},
        "after": {
            "image_token_offset": CODES,
            "audio_token_offset": CODES + 16,
            "text_config.vocab_size": 256,
        },
        "pixels": pictures.sized(64),
    },
    "blip-2": {
        "config": QUERIED,
        "count": pictures.queries,
    },
    "instructblip": {
        "config": QUERIED,
        "pixels": pictures.questioned(3, SIDE, SIDE),
        "count": pictures.queries,
    },
    "instructblipvideo": {
        "config": {"video_token_index": IMAGE, "text_config.word_embed_proj_dim": WIDTH},
        "placeholder": ("video_token_index",),
        "pixels": pictures.questioned(1, 3, SIDE, SIDE),
        "count": pictures.queries,
    },
    "chameleon": {
        "start": default("chameleon", vocabulary_map=MAPPED),
        "config": {"vocabulary_map": MAPPED, "vq_config.num_embeddings": 16},
        "after": {"vq_config.resolution": SIDE},
    },
    "cohere_compass": {
        "config": {
            "text_config.rope_parameters": {"full_attention": SECTIONS},
        }
    },
    "deepseek_ocr2": {
        "config": {
            "vision_config.sam_config": SAM,
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "text_config.num_experts_per_tok": 2,
        },
    },
    "deepseek_vl_hybrid": {"pixels": pictures.plain("high_res_pixel_values")},
    "diffusion_gemma": {"apart": "generates blocks by diffusion, not token by token"},
    "emu3": {
        "start": default("emu3", vocabulary_map=VISUAL),
        "config": {
            "vocabulary_map": VISUAL,
            "vq_config": {"codebook_size": 16, "embed_dim": 4, "hidden_size": 128},
        },
        "pixels": pictures.sized(SIDE),
    },
    "ernie4_5_vl_moe": {
        "config": {"text_config.rope_parameters": SECTIONS | {"mrope_section": [3, 3, 2]}}
    },
    "fuyu": {"pixels": lambda model, number: {"pixel_values": noise(number, 1, 16, CELL)}},
    "fast_vlm": {
        "config": {"vision_config": {"architecture": "fastvit_t8", "hidden_size": 768}},
        "pixels": pictures.plain(side=128),
    },
    "gemma3n": {
        "config": {
            "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
            "text_config.num_kv_shared_layers": 2,
            "vision_config": {"architecture": "mobilenetv5_base", "hidden_size": 2048},
            "vision_soft_tokens_per_image": 256,
        },
        "pixels": pictures.plain(side=256),
    },
    "perception_lm": {
        "config": {
            "vision_config": {
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": {"embed_dim": 192, "img_size": [64, 64], "depth": 3},
            }
        },
        "pixels": lambda model, number: {"pixel_values": noise(number, 1, 1, 3, 64, 64)},
    },
    "gemma4": {
        "start": default("gemma4", vision_config={}),
        "config": {"text_config": SHARED},
        "pixels": pictures.placed(CELL),
    },
    "gemma4_unified": {
        "start": default("gemma4_unified", vision_config={}),
        "config": {"vision_config.output_proj_dims": WIDTH},
        "pixels": pictures.placed(9 * CELL),
    },
    "glm46v": {"config": {"text_config.rope_parameters": SECTIONS}},
    "glmga": {"config": {"text_config.rope_parameters": SECTIONS}},
    "granite4_vision": {
        "config": {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 1], [-1, 2]],
            "spatial_vision_layer": -1,
            "spatial_target_layers": [0, 1, 2, 3],
        },
        "after": PINPOINTS,
        "pixels": pictures.tiles,
    },
    "granite_docling": {"pixels": pictures.masked_tiles},
    "hunyuan_vl": {"config": {"text_config.head_dim": HEAD_DIM}, "pixels": pictures.grid(CELL)},
    "hy_v4_vl": {"config": {"text_config.rope_parameters.mrope_section": [2, 1, 1]}},
    "inkling2": {"pixels": pictures.cells},
    "inkling2_loop": {"pixels": pictures.cells},
    "inkling_mm_model": {"pixels": pictures.clips},
    "kimi_k25": {
        "pixels": pictures.grid(3, PATCH, PATCH),
    },
    "lfm2_vl": {"config": {"text_config": HALF_CONV}},
    "llama4": {"config": {"vision_config.intermediate_size": 4 * WIDTH}},
    "llava_next": {"after": PINPOINTS, "pixels": pictures.tiles},
    "llava_next_video": {"after": PINPOINTS, "pixels": pictures.tiles},
    "llava_onevision": {"after": PINPOINTS, "pixels": pictures.tiles},
    "minicpm_ocr": STRIP,
    "minicpmv4_6": STRIP,
    "minicpmv4_7": STRIP,
    "molmo2": {
        "config": {"adapter_config.vision_feature_layer": [2, 1]},
        "pixels": pictures.pooled,
        "join": pictures.pooled_join,
    },
    "muse_glimmer": {"config": {"out_hidden_size": 4 * WIDTH}},
    "muse_spark": {"config": {"out_hidden_size": 4 * WIDTH}},
    "nemotron_h_omni": {
        "config": {
            "image_token_id": IMAGE,
            "vision_config": {"patch_dim": CELL, "video_patch_dim": 2 * CELL},
        },
        "pixels": pictures.hw_grid,
    },
    "paddleocr_vl": {"pixels": pictures.grid(3, PATCH, PATCH)},
    "pi0": {"apart": "predicts actions; it does not generate text"},
    "qwen2_5_omni": {"apart": TALKER},
    "qwen2_5_omni_thinker": {"config": STARTS},
    "qwen3_omni_moe": {"apart": TALKER},
    "qwen3_omni_moe_thinker": {"config": STARTS},
    "qwen4_exp": {
        "config": {
            "text_config": INDEXED,
        }
    },
    "step3p7": {"config": {"text_config.sliding_window": 1024}},
    "unlimited_ocr": {"config": {"vision_config.sam_config": SAM}},
    "video_llama_3": {"pixels": pictures.grid(CELL, more={"image_merge_sizes": [2]})},
}

# What single language models need, in the place of a class's usual one.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": HEAD_DIM, "mamba_d_ssm": 2 * WIDTH}
HEAD = {"head_dim": HEAD_DIM}
SPARSE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
TEXTS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": SECTIONS}},
    "deepseek_v2": SPARSE,
    "dots1": SPARSE,
    "falcon_h1": MAMBA,
    "gemma3n_text": SHARED,
    # LLaVA gives its language model no ids, which inputs of each layer are made of.
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": HALF_CONV,
    "lfm2_moe": {"layer_types": HALF_CONV["layer_types"]},
    "ministral": HEAD,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": INDEXED,
    "zaya": {"num_experts_per_tok": 1},
}
# What is no decoder of text alone (encoders, parts of others, speech), what LLaVA cannot hold, for
# its class does not know where its embeddings are, and what makes a cache of its own.
_NO_DECODERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
data2vec-text electra ernie marian mbart megatron-bert moshi musicgen musicgen_melody mvp
openai-gpt pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer trocr
whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod reformer moss_transcribe_diarize emu3 fuyu git
got_ocr2 mllama phi4_multimodal gemma3 gemma3n gemma4 gemma4_unified gemma4_assistant
gemma4_unified_assistant dots3_note qwen3_5 qwen3_5_moe qwen4_exp llama4 modernbert-decoder bloom
cpmant ctrl falcon falcon_mamba gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese mamba opt blt
dbrx mpt mamba2 rwkv xlstm minimax inkling_text inkling2_text inkling2_loop_text zamba zamba2
hrm_text dory deepseek_v4
"""
NO_DECODERS = frozenset(_NO_DECODERS.split())


def special_of(kind: str) -> Mapping[str, Any]:
    """The entry of a type, whatever its decoder."""
    return SPECIAL.get(kind.partition(":")[0], {})
