"""Methods in front of the language model: each release's own vision tower, with seeded weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from clones import enter, load, stand_in
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import golden_inputs as seeded

Found = tuple[dict[str, Tensor], str]


def tower(name: str, peak: float) -> Any:
    """The tiny CLIP tower."""
    made = CLIPVisionModel(CLIPVisionConfig(**seeded.TOWER)).eval()
    seeded.fill(made, name, peak)
    return made


def released(cls: Any, vision_tower: Any) -> Any:
    """The release's wrapper of a tower, around this one instead of one from the Hub."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.vision_tower, made.is_loaded = vision_tower, True
    made.select_layer, made.select_feature = -2, "patch"
    return made


def prumerge(folder: Path) -> Found:
    """The "+" form, which its forward runs, and the first form; two pictures, one after another."""
    stand_in(["matplotlib"])
    module = load("prumerge_release", folder / "llava/model/multimodal_encoder/clip_encoder.py")
    wrapped = released(module.CLIPVisionTower, tower("prumerge", seeded.PRUMERGE_PEAK))
    pictures = seeded.pixels("prumerge", 2)
    found = {}
    for number, picture in enumerate(pictures):
        found[f"plus.{number}"] = wrapped(picture[None])[0]
        found[f"plain.{number}"] = wrapped.token_prune_merge_advanced(picture[None])[0]
    return found, seeded.checksum(pictures)


def visionzip(folder: Path) -> Found:
    """54 dominant tokens and 10 contextual ones, of LLaVA-1.5's pictures and of LLaVA-NeXT's."""
    grid = seeded.NEXT_GRID
    enter("llava", folder)
    names = (
        "IGNORE_INDEX",
        "IMAGE_TOKEN_INDEX",
        "DEFAULT_IMAGE_PATCH_TOKEN",
        "DEFAULT_IM_START_TOKEN",
        "DEFAULT_IM_END_TOKEN",
    )
    # Of LLaVA, which is not of this release.
    constants = dict.fromkeys(names, "") | {"IGNORE_INDEX": -100, "IMAGE_TOKEN_INDEX": -200}
    given: Any = sys.modules
    given["llava.constants"] = SimpleNamespace(**constants)
    given["llava.mm_utils"] = SimpleNamespace(
        get_anyres_image_grid_shape=lambda *_: (grid[1], grid[0])
    )
    sys.path.insert(0, str(folder))
    from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
    from visionzip import clip_encoder, llava_arch, utils

    made = tower("visionzip", 2.0)
    utils.apply_info(made, dominant_num=53, contextual_num=10)
    # As its `visionzip` does.
    layers: Any = (CLIPEncoderLayer, CLIPAttention)
    layers[0].forward = utils.CLIP_EncoderLayer_forward
    layers[1].forward = utils.CLIPAttention_forward
    wrapped = released(
        type("Tower", (nn.Module,), {"dtype": torch.float32, "device": torch.device("cpu")}), made
    )
    wrapped.forward = clip_encoder.CLIPVisionTower_VisionZip.forward.__get__(wrapped)
    wrapped.config = SimpleNamespace(image_size=seeded.SIDE * seeded.PATCH)
    pictures = seeded.pixels("visionzip", 1 + grid[0] * grid[1])
    found = {"plain": wrapped(pictures[:2])[0]}

    model = SimpleNamespace(
        get_vision_tower=lambda: wrapped,
        mm_projector=seeded.projector(),
        embed_tokens=nn.Embedding(1, seeded.WIDTH),
        image_newline=torch.zeros(seeded.WIDTH),
    )
    host = SimpleNamespace(
        get_model=lambda: model,
        get_vision_tower=lambda: wrapped,
        model=model,
        device=torch.device("cpu"),
        config=SimpleNamespace(mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[]),
    )
    for name in ("encode_images_visionzip_multi", "restore_image_features_sorted"):
        setattr(host, name, getattr(llava_arch, name).__get__(host))
    embedded = llava_arch.prepare_inputs_labels_for_multimodal_visionzip(
        host, torch.tensor([[-200, 0]]), None, None, None, None, [pictures], [(1, 1)]
    )[4]
    # The last row is the word behind the image.
    found["next"] = embedded[0, :-1]
    return found, seeded.checksum(pictures)


def fastervlm(folder: Path) -> Found:
    """64 and 29 of 576 tokens: which, and the tower's features."""
    stand_in(["s2wrapper"])
    enter("llava", folder / "llava")
    enter("llava.model", folder / "llava/model")
    from llava.model.llava_arch import LlavaMetaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import (
        CLIPVisionTower,
    )

    wrapped = released(CLIPVisionTower, tower("fastervlm", 2.0))
    pictures = seeded.pixels("fastervlm", 2)
    found: dict[str, Tensor] = {}
    for keep in (64, 29):
        host = SimpleNamespace(
            get_model=lambda: SimpleNamespace(
                get_vision_tower=lambda: wrapped, mm_projector=nn.Identity()
            ),
            get_visual_token_num=lambda keep=keep: keep,
        )
        features, kept, _ = LlavaMetaForCausalLM.encode_images(host, pictures)
        found[f"keep{keep}.kept"] = kept
        found[f"keep{keep}.features"] = features[kept].view(len(pictures), keep, -1)
    return found, seeded.checksum(pictures)


def tome(folder: Path) -> Found:
    """A ViT of timm with CLIP's weights, patched by the release: tokens behind layer 22 of 24.

    `r` is a list, 23 layers long as our budget deals it out, and 0 in the last layer.
    """
    stand_in(["torchvision"])
    enter("tome", folder / "tome")
    enter("tome.patch", folder / "tome/patch")
    from timm.models.vision_transformer import VisionTransformer
    from tome.patch.timm import apply_patch

    clip = tower("tome", 1.5).vision_model
    side = seeded.SIDE * seeded.PATCH
    vit = VisionTransformer(
        img_size=side,
        patch_size=seeded.PATCH,
        num_classes=0,
        embed_dim=seeded.WIDTH,
        depth=seeded.LAYERS,
        num_heads=seeded.TOWER_HEADS,
        mlp_ratio=seeded.HIDDEN / seeded.WIDTH,
        pre_norm=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-5),
        # CLIP's own activation, which is not timm's.
        act_layer=lambda: type(clip.encoder.layers[0].mlp.activation_fn)(),
    ).eval()
    _copied(vit, clip)
    pictures = seeded.pixels("tome", 2)
    # Unpatched it is CLIP, whose tower is the one that methods read.
    states: list[Tensor] = []
    hook = vit.blocks[-2].register_forward_hook(lambda _, __, out: states.append(out))
    vit(pictures)
    want = clip(pictures, output_hidden_states=True).hidden_states[-2]
    assert float((states[0] - want).abs().max()) < 1e-4
    apply_patch(vit, trace_source=True)
    found: dict[str, Tensor] = {}
    for keep, merges in seeded.TOME_MERGES.items():
        vit.r = [*merges, 0]
        vit(pictures)
        found[f"keep{keep}.states"] = states[-1][:, 1:]
        found[f"keep{keep}.sizes"] = vit._tome_info["size"][:, 1:, 0]
    hook.remove()
    return found, seeded.checksum(pictures)


def _copied(vit: Any, clip: Any) -> None:
    """CLIP's weights in a ViT of timm."""
    embeddings = clip.embeddings
    vit.patch_embed.proj.weight.copy_(embeddings.patch_embedding.weight)
    if vit.patch_embed.proj.bias is not None:
        vit.patch_embed.proj.bias.zero_()
    vit.cls_token.copy_(embeddings.class_embedding[None, None])
    vit.pos_embed.copy_(embeddings.position_embedding.weight[None])
    vit.norm_pre.load_state_dict(clip.pre_layrnorm.state_dict())
    for block, layer in zip(vit.blocks, clip.encoder.layers, strict=True):
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        own = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        block.attn.qkv.weight.copy_(torch.cat([one.weight for one in own]))
        block.attn.qkv.bias.copy_(torch.cat([one.bias for one in own]))
        block.attn.proj.load_state_dict(layer.self_attn.out_proj.state_dict())
        block.mlp.fc1.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.fc2.load_state_dict(layer.mlp.fc2.state_dict())


RUNS = {"prumerge": prumerge, "visionzip": visionzip, "fastervlm": fastervlm, "tome": tome}
