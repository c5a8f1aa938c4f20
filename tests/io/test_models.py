"""What a processor makes of prompts with pictures, and which pictures it does not take."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmprune import VlmpruneError, embedded
from vlmprune.io.models import processed


class Narrow:
    """A processor whose image processor is Qwen2-VL's own."""

    def __call__(self, images: Any, **_: Any) -> Any:
        return Qwen2VLImageProcessorPil()(images, return_tensors="pt")


def test_a_picture_that_the_processor_does_not_take_is_told() -> None:
    given = [Image.new("RGB", (50, 40)), Image.new("RGB", (1, 3000))]
    with pytest.raises(VlmpruneError, match=r"narrowest of 1 x 3000 pixels \(absolute aspect"):
        processed(Narrow(), ["", ""], given)
    assert len(processed(Narrow(), [""], given[:1])["image_grid_thw"]) == 1


def test_a_mistake_without_pictures_is_the_processors_own() -> None:
    def refuses(**_: Any) -> None:
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        processed(refuses, [""], [])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3, 2)])
def test_tiny_pictures_are_pictures(size: tuple[int, int]) -> None:
    processor = LlavaProcessor.from_pretrained(embedded.path())
    made = processed(processor, ["USER: <image>\nwhat? ASSISTANT:"], [Image.new("RGB", size)])
    assert made["pixel_values"].shape[-2:] == (224, 224)
