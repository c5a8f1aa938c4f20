"""The same requests by Transformers, with vlmprune's own attachment: what servers are held to."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from client import Answer, Asked
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmprune.pruner import Pruner


@dataclass(frozen=True)
class Expected:
    """An answer and what was kept for it.

    Attributes:
        ids: tokens of the answer, with the end token if it came to one.
        text: the answer.
        scores: log-probabilities [V] of each of its tokens.
        prompt_tokens: left in the language model's prompt.
        kept: for each image the kept visual tokens' numbers; empty where nothing is pruned.
        pixels: [images, 3, H, W] as the processor made them.
    """

    ids: list[int]
    text: str
    scores: list[Tensor]
    prompt_tokens: int
    kept: list[list[int]]
    pixels: Tensor | None


class Reference:
    """A LLaVA folder in Transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self.processor: Any = LlavaProcessor.from_pretrained(folder, local_files_only=True)

    def __call__(self, asked: Asked, method: Pruner | None = None) -> Expected:
        """Answer a request greedily, pruned by `method` (the request's own budget is not read)."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in asked.images]
        content.append({"type": "text", "text": asked.text})
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [image.convert("RGB") for image in asked.images] or None
        inputs = self.processor(text=prompt, images=images, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with nullcontext() if method is None else method(self.model) as handle, torch.no_grad():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=asked.tokens,
                return_dict_in_generate=True,
                output_scores=True,
            )
            report = handle.report if handle is not None and asked.images else None
        ids = out.sequences[0, length:].tolist()
        kept = [] if report is None else [one.tolist() for one in report.kept]
        dropped = 0 if report is None else report.visual_tokens_before - report.visual_tokens_after
        return Expected(
            ids,
            self.processor.decode(ids, skip_special_tokens=True),
            [torch.log_softmax(step[0].float(), -1) for step in out.scores],
            length - dropped,
            kept,
            inputs.get("pixel_values"),
        )


def difference(answer: Answer, expected: Expected) -> float:
    """The largest difference of a log-probability, up to where the answers part, if they do."""
    worst = 0.0
    for place, (tops, scores) in enumerate(zip(answer.tops, expected.scores, strict=False)):
        worst = max(worst, *(abs(value - float(scores[i])) for i, value in tops.items()))
        if answer.ids[place] != expected.ids[place]:
            break
    return worst
