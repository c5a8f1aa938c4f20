"""What the plugin refuses once vLLM has read a model's config, with no server and no engine.

vLLM's own `ModelConfig` and processor are what a server makes of its arguments and asks for each
request.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import SIDE, VISUAL
from PIL import Image
from transformers import SiglipVisionConfig
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmprune.errors import VlmpruneError
from vlmprune.integrations.vllm import VARIABLE, policy, register
from vlmprune.integrations.vllm.fields import field_of, pack
from vlmprune.integrations.vllm.model import PrunedModel
from vlmprune.views import layout

TEXT, KEEP = "see <image> now", 8


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(VARIABLE, f"vispruner:keep={KEEP}")
    register()
    return monkeypatch


@pytest.fixture
def processor(method: pytest.MonkeyPatch, tiny: Path) -> Any:
    config = ModelConfig(str(tiny), dtype="float32", max_model_len=1024, enable_mm_embeds=True)
    return MULTIMODAL_REGISTRY.create_processor(config)


def prompt(processor: Any, image: Any) -> list[int]:
    """Ids of a prompt with a picture, or with what encodes one."""
    found: list[int] = processor(TEXT, processor.info.parse_mm_data({"image": image}))[
        "prompt_token_ids"
    ]
    return found


def test_embeddings_are_refused(processor: Any) -> None:
    whole = len(prompt(processor, [Image.new("RGB", (SIDE, SIDE))]))
    with pytest.raises(VlmpruneError, match=r"^image embeddings cannot be pruned, .*; send pict"):
        prompt(processor, torch.zeros(1, VISUAL, 64))
    processor.policy = policy.Policy(None)
    assert len(prompt(processor, torch.zeros(1, VISUAL, 64))) == whole + VISUAL - KEEP


def test_other_placeholders_than_visual_tokens_are_told(
    processor: Any, method: pytest.MonkeyPatch
) -> None:
    """A vLLM that counted an image's tokens otherwise than the library does."""
    info = type(processor.info)
    own = info.get_num_image_tokens
    method.setattr(info, "get_num_image_tokens", lambda *args, **given: own(*args, **given) + 1)
    said = f"^vLLM gives {VISUAL + 1} placeholders to one image in which vlmprune sees {VISUAL} vis"
    with pytest.raises(RuntimeError, match=said):
        prompt(processor, [Image.new("RGB", (SIDE, SIDE))])


def refused(folder: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        ModelConfig(str(folder), dtype="float32", max_model_len=1024)
    said = str(ended.value)
    assert said.startswith(f"{VARIABLE}: ") and said.endswith(".")
    return said


def test_layers_that_vllm_does_not_build_are_refused(
    method: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of three encoder layers vLLM builds the two that make features."""
    folder = checkpoints.llava(tmp_path)
    ModelConfig(str(folder), dtype="float32", max_model_len=1024)
    absent = (
        r"\) reads encoder layer 2, which vLLM does not build as it comes behind the features; "
    )
    method.setenv(VARIABLE, "vtc_cls:keep=4")
    assert re.search("VtcCls.*" + absent, refused(folder))
    # SigLIP has no CLS token, and is scored in its last layer.
    config = json.loads((folder / "config.json").read_text())
    shape = config["vision_config"] | {"model_type": "siglip_vision_model"}
    config["vision_config"] = SiglipVisionConfig(**shape).to_dict()
    config["vision_feature_select_strategy"] = "full"
    (folder / "config.json").write_text(json.dumps(config))
    method.setenv(VARIABLE, f"vispruner:keep={KEEP}")
    assert re.search("VisPruner.*" + absent, refused(folder))
    method.setenv(VARIABLE, f"divprune:keep={KEEP}")
    ModelConfig(str(folder), dtype="float32", max_model_len=1024)


@pytest.mark.parametrize(("encoded", "kept"), [(5, 6), (6, 4)])
def test_other_tokens_than_were_counted_are_told(encoded: int, kept: int) -> None:
    """A model that encodes, or a budget that keeps, other tokens than the processor counted."""

    class Host:
        def embed_multimodal(self, **_: Any) -> Any:
            return [torch.zeros(encoded, 4)]

    class Model(PrunedModel, Host):
        media = (
            SimpleNamespace(
                kind="image",
                inputs=("pixel_values",),
                items=lambda kwargs: [kwargs],
                layouts_of=lambda host, items: [layout.plain(1, (2, 3))],
                described=lambda layouts: layouts,
                split=lambda output, layouts: output,
                extra=lambda output, layouts: [],
            ),
        )

    model = object.__new__(Model)
    model.policy, model.config, model.original = policy.Policy(None), None, False
    told = {field_of("image"): pack("all", 6, kept)[None]}
    said = f"^one image has {encoded} visual tokens, of which 6 are kept, where 6 and {kept} were"
    with pytest.raises(RuntimeError, match=said):
        model.embed_multimodal(pixel_values=torch.zeros(1, 3, 2, 2), **told)
