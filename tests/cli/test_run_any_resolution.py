"""`vlmprune run` on a model that sees a picture in crops: tokens, newlines, panels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from commandline import COFFEE, QUESTION, call
from vlmprune import embedded


@pytest.fixture(scope="module")
def any_resolution(tmp_path_factory):
    """A folder with a tiny random LLaVA-NeXT of 28-pixel tiles, and no chat template."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        LlavaProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = LlavaProcessor.from_pretrained(embedded.path()).tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    pinpoints = [[56, 112], [112, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14, num_hidden_layers=3, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("next")
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def test_any_resolution_end_to_end(any_resolution, tmp_path):
    photo = tmp_path / "wide.png"
    with Image.open(COFFEE) as image:
        image.resize((200, 100)).save(photo)
    result = call(
        *("run", photo, QUESTION, "--model", any_resolution, "--keep", 4, "--json"),
        *("--repeat", 1, "--max-new-tokens", 3, "--save-overlay", tmp_path / "o.png"),
        *("--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    # Two tiles side by side and the base view, 16 patches each, and a newline for each of 4 rows.
    assert content["full"]["visual_tokens"] == 3 * 16 + 4
    assert content["pruned"]["visual_tokens"] == 3 * 4 + 4
    assert content["report"]["newline_tokens"] == 4
    with Image.open(tmp_path / "o.png") as drawn:
        # Two panels side by side.
        assert drawn.width == 2 * 672 + 3 * 20


def test_any_resolution_lights_up_in_two_panels(any_resolution, tmp_path):
    photo = tmp_path / "wide.png"
    with Image.open(COFFEE) as image:
        image.resize((200, 100)).save(photo)
    result = call(
        *("run", photo, QUESTION, "--model", any_resolution, "--method", "recall:read=4,floor=0"),
        *("--repeat", 1, "--max-new-tokens", 4, "--decode-tokens", 0, "--device", "cpu"),
        *("--save-recall", tmp_path / "o.gif"),
    )
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "o.gif") as film:
        assert film.n_frames == 3 and film.width == 2 * 448 + 3 * 20


def test_newline_tokens_are_dropped_and_drawn_as_dropped(any_resolution, tmp_path):
    photo = tmp_path / "wide.png"
    with Image.open(COFFEE) as image:
        image.resize((200, 100)).save(photo)
    common = ("run", photo, QUESTION, "--model", any_resolution, "--json", "--device", "cpu")
    common += ("--repeat", 1, "--max-new-tokens", 2, "--decode-tokens", 0, "--newlines", "drop")
    pictures = []
    for number, settings in enumerate((("--keep", 4), ("--method", "fastervlm:keep=4"), ())):
        drawn = tmp_path / f"{number}.png"
        result = call(*common, *settings, "--save-overlay", drawn)
        if not settings:
            # The default keeps 64, more than these crops have, which keep all.
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout)["report"]["below_keep"]["crop"] == 3
            continue
        assert result.exit_code == 0, result.output
        content = json.loads(result.stdout)
        assert content["method"].endswith("newlines=drop")
        assert content["pruned"]["visual_tokens"] == 3 * 4
        report = content["report"]
        assert (report["newline_tokens_before"], report["newline_tokens"]) == (4, 0)
        with Image.open(drawn) as picture:
            pictures.append(np.asarray(picture.convert("RGB")).copy())
    # But for what is written above and below, the same patches are drawn as with newlines kept.
    kept = tmp_path / "kept.png"
    assert call(*common[:-1], "keep", "--keep", 4, "--save-overlay", kept).exit_code == 0
    with Image.open(kept) as picture:
        usual = np.asarray(picture.convert("RGB"))
    panels = slice(60, 400)
    assert (pictures[0][panels] == usual[panels]).all()
    assert (pictures[0] != usual).any() and (pictures[0][panels] != pictures[1][panels]).any()
    refused = call(*common[:-1], "none", "--keep", 4)
    assert refused.exit_code == 2 and "newlines='none'" in refused.output
