"""Families of tiny random weights, offline in vLLM and in Transformers, on the same requests."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llava_checkpoints
import numpy as np
import tiny_checkpoints
import torch
from PIL import Image
from recorded import records
from serving import ONE_PROCESS, environment
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmprune import spec

FRAMES = 4
METADATA = {
    "fps": 2.0,
    "duration": 2.0,
    "total_num_frames": FRAMES,
    "frames_indices": list(range(FRAMES)),
    "video_backend": "opencv",
}
TOKENS_A_STEP = 64
BLOCK = 32
LLAVA = {"llava_next": llava_checkpoints.next_, "llava_onevision": llava_checkpoints.onevision}


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        text: with {} for each picture or video.
        images: (width, height) of each.
        video: (width, height) of its frames; None for none.
        keep: the request's own budget; None for the server's.
    """

    text: str
    images: tuple[tuple[int, int], ...] = ()
    video: tuple[int, int] | None = None
    keep: int | float | str | None = None


TWO = ((48, 32), (40, 64))
CASES = {
    "two images": Case("What is this? {} And this: {}?", TWO),
    "a video": Case("See {} now", video=(48, 40)),
    "text": Case("no picture at all"),
    "another budget": Case("What is this? {} And this: {}?", TWO, keep=3),
    # Of the second image some tokens come in a later step.
    "a share, cut": Case("What is this? {} And this: {}? Say more.", TWO, keep=0.8),
    "unpruned": Case("What is this? {} And this: {}?", TWO, keep="all"),
    "image first": Case("{}{} ok", TWO),
    "image last": Case("see {}", TWO[:1]),
}


def pictures(case: Case) -> list[Image.Image]:
    """Noise, another for each place and size."""
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), dtype=np.uint8))
        for i, (w, h) in enumerate(case.images)
    ]


def frames(case: Case) -> Any:
    """[frames, height, width, 3] noise."""
    assert case.video is not None
    width, height = case.video
    generator = np.random.default_rng(9)
    return generator.integers(0, 255, (FRAMES, height, width, 3), dtype=np.uint8)


def prompt(family: str, case: Case) -> str:
    """With the family's placeholders."""
    wrapped = "<|vision_start|>{}<|vision_end|>"
    image, video = wrapped.format("<|image_pad|>"), wrapped.format("<|video_pad|>")
    if family == "internvl":
        image, video = "<IMG_CONTEXT>", "<video>"
    elif family in LLAVA:
        image, video = "<image>", "<video>"
    return case.text.format(*[image] * len(case.images), *[video] * (case.video is not None))


def request(family: str, case: Case) -> dict[str, Any]:
    """As vLLM's `generate` takes it."""
    out: dict[str, Any] = {"prompt": prompt(family, case)}
    if case.images:
        out["multi_modal_data"] = {"image": pictures(case)}
    if case.video is not None:
        # Where vLLM wants to be told of them.
        told = family in ("qwen2_5_vl", "qwen3_vl")
        video = (frames(case), {**METADATA, "do_sample_frames": False}) if told else frames(case)
        out["multi_modal_data"] = {"video": [video]}
    if case.keep is not None:
        out["mm_processor_kwargs"] = {"vlmprune_keep": case.keep}
    return out


@dataclass(frozen=True)
class Answer:
    """What a language model was given and what it said.

    Attributes:
        length: prompt tokens, after pruning.
        visual: placeholders among them; -1 where it is not known.
        new: the new tokens.
        positions: [axes, tokens] of all of them, but of the last new one.
        kept: for each image or video the kept tokens' numbers.
        steps: in how many steps.
    """

    length: int
    visual: int
    new: list[int]
    positions: Tensor
    kept: list[list[int]]
    steps: int = 0


class Both:
    """A family in vLLM, all cases answered, and in Transformers."""

    def __init__(self, family: str, method: str, folder: Path) -> None:
        self.family, self.method = family, method
        self.cases = {
            name: case
            for name, case in CASES.items()
            if case.video is None or family != "llava_next"
        }
        if family in LLAVA:
            self.folder = LLAVA[family](folder / "model")
        else:
            self.folder = tiny_checkpoints.build(family, folder / "model")
        asked, out, record = folder / "asked.pt", folder / "out.pt", folder / "record"
        torch.save([request(family, case) for case in self.cases.values()], asked)
        script = Path(__file__).parent / "offline.py"
        own = {"VLMPRUNE": method, "VLMPRUNE_VLLM_RECORD": str(record), **ONE_PROCESS}
        done = subprocess.run(
            [sys.executable, *map(str, (script, self.folder, asked, out, TOKENS_A_STEP, BLOCK))],
            env=environment(own),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-6000:])
        found = torch.load(out, weights_only=True)
        self.batch: dict[str, list[int]] = dict(zip(self.cases, found["batch"], strict=True))
        self.alone: dict[str, dict[str, Any]] = dict(zip(self.cases, found["alone"], strict=True))
        self.again: dict[str, dict[str, Any]] = dict(zip(self.cases, found["again"], strict=True))
        self.records = records(record)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.folder, local_files_only=True)

    def served(self, name: str) -> Answer:
        """By vLLM."""
        found = self.alone[name]
        tokens = (self.model.config.image_token_id, self.video_token)
        visual = sum(found["ids"].count(token) for token in tokens)
        return Answer(
            len(found["ids"]), visual, found["new"], found["positions"], [], found["steps"]
        )

    @property
    def video_token(self) -> int:
        """That of vLLM's prompts; some families have none in their config."""
        own = getattr(self.model.config, "video_token_id", None)
        return own or self.processor.tokenizer.convert_tokens_to_ids("<video>")

    @property
    def axes(self) -> int:
        """Numbers that make a position."""
        return 3 if self.family.startswith("qwen") else 1

    def expected(self, name: str) -> Answer:
        """By Transformers."""
        case = CASES[name]
        more: dict[str, Any] = {"images": pictures(case)} if case.images else {}
        if case.video is not None:
            from transformers.video_utils import VideoMetadata

            more = {"videos": [frames(case)], "do_sample_frames": False}
            if self.axes == 3:
                more["video_metadata"] = [VideoMetadata(**METADATA)]
        text = [prompt(self.family, case)]
        inputs = self.processor(text=text, return_tensors="pt", **more)
        length = inputs["input_ids"].shape[1]
        pruner: Any = None if case.keep == "all" else spec.parse(self.method)
        if pruner is not None and case.keep is not None:
            pruner = replace(pruner, keep=case.keep)
        seen: list[Tensor] = []

        def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            given, start = kwargs.get("position_ids"), kwargs["past_key_values"].get_seq_length()
            if given is None:
                given = torch.arange(kwargs["inputs_embeds"].shape[1])[None] + start
            seen.append(given.reshape(-1, given.shape[-1]))

        hook = self.model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with nullcontext() if pruner is None else pruner(self.model) as handle:
                out = self.model.generate(
                    **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None
                )
            report = handle.report if handle is not None and more else None
        finally:
            hook.remove()
        dropped = 0 if report is None else report.visual_tokens_before - report.visual_tokens_after
        kept = [] if report is None else [one.tolist() for one in report.kept]
        positions = torch.cat([one[-self.axes :] for one in seen], dim=1)
        return Answer(length - dropped, -1, out[0, length:].tolist(), positions, kept)
