"""The embedded model under a pruner, through what users call: pipelines and processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from vlmprune import VisPruner
from vlmprune.embedded import load


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load()


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (7, 9, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((300, 200))


def chat(image: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_image_text_to_text_pipeline(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    messages = chat(picture(1), "what is in row two column three?")
    options = {"max_new_tokens": 6, "do_sample": False}

    plain = pipe(text=messages, generate_kwargs=options, return_full_text=False)
    with VisPruner(keep=16)(model) as handle:
        pruned = pipe(text=messages, generate_kwargs=options, return_full_text=False)
        whole = pipe(text=messages, generate_kwargs=options, return_full_text=True)
    assert handle.report.visual_tokens_before == 256
    assert handle.report.visual_tokens_after == 16

    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with VisPruner(keep=16)(model):
        out = model.generate(**inputs, **options)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pruned[0]["generated_text"].strip() == answer.strip()
    assert whole[0]["generated_text"][-1]["content"].strip() == answer.strip()
    assert pipe(text=messages, generate_kwargs=options, return_full_text=False) == plain


def test_a_batch_with_two_sizes_of_picture_and_a_text_row(embedded: tuple[Any, Any]) -> None:
    """Each row of a padded batch gives what it gives alone."""
    model, processor = embedded
    prompts = [
        "USER: <image>\nwhat is in row one column one? ASSISTANT:",
        "USER: <image>\n<image>\nhow many cats are there? ASSISTANT:",
        "USER: is there a dog? ASSISTANT:",
    ]
    images = [picture(1), picture(2).crop((0, 0, 90, 200)), picture(3)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with VisPruner(keep=40)(model) as handle:
        batch = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        together = model.generate(**batch, **options)
        assert [len(k) for k in handle.report.kept] == [40, 40, 40]
        assert handle.report.positions == "original"
        for row, own in enumerate((images[:1], images[1:], None)):
            single = processor(text=prompts[row], images=own, return_tensors="pt")
            alone = model.generate(**single, **options)
            assert torch.equal(alone[0, -5:], together[row, -5:])
