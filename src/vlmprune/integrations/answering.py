"""Conversations with pictures, answered in batches by a model with a pruner attached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from vlmprune.errors import VlmpruneError
from vlmprune.integrations.arguments import Arguments
from vlmprune.io import options, sources
from vlmprune.io.models import Loaded, enough_memory, load, prepare_texts, prompt_of
from vlmprune.io.pictures import as_seen, open_image
from vlmprune.io.processors import has_template
from vlmprune.pruner import Handle

SAMPLING = ("temperature", "top_p", "top_k")
"""Settings of `generate` that matter only where answers are drawn at random."""
PASSED = ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty")
"""Settings that go to `generate` as they are."""
# `image_aspect_ratio` is for LLaVA's own code: here the model's processor decides.
_READ = ("until", "do_sample", *SAMPLING, *PASSED, "image_aspect_ratio")


@dataclass
class Spent:
    """What answers cost so far.

    Attributes:
        tokens: that were written.
        seconds: spent in `generate`.
        visual_tokens, visual_tokens_before: that the language model got, with and without pruning.
        kv_bytes, kv_bytes_before: of the visual tokens once the prompts are read, likewise. These
            four stay 0 without a pruner.
    """

    tokens: int = 0
    seconds: float = 0.0
    visual_tokens: int = 0
    visual_tokens_before: int = 0
    kv_bytes: float = 0
    kv_bytes_before: float = 0


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of the model's chat template, with their pictures aside.

    Attributes:
        messages: each a role and its content, a list of parts; parts of type "image" hold nothing.
        images: their pictures, in the order of the parts.
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class Likelihood:
    """How likely an answer is.

    Attributes:
        log_probability: natural logarithm of the probability of all its tokens.
        tokens: their number.
        greedy: whether each is the likeliest.
    """

    log_probability: float
    tokens: int
    greedy: bool


def conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """A conversation as harnesses give it.

    Args:
        messages: each with "role" and "content", a text or a list of parts: {"type": "text",
            "text": …} or {"type": "image", "url": …}, the picture itself or its path.

    Raises:
        VlmpruneError: a part is neither text nor picture.
    """
    turns, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = []
        for part in content:
            if part["type"] == "image":
                images.append(_picture(part.get("url", part.get("image"))))
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise VlmpruneError(
                    f"a request holds {part['type']!r}, which is not answered here; use tasks of "
                    "text and images."
                )
        turns.append({"role": message["role"], "content": parts})
    return Conversation(turns, images)


def generation(settings: Mapping[str, Any] | None, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` for a task's generation settings; greedy unless they say otherwise.

    Args:
        settings: the task's.
        max_new_tokens: limit where they give none.

    Raises:
        VlmpruneError: a setting is unknown.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    for name in given:
        if name not in _READ:
            raise VlmpruneError(
                f"the task's generation setting {name!r} is not supported; the settings are "
                f"{', '.join(_READ)}."
            )
    # Harnesses write temperature 0 for greedy, whatever else they say.
    warm = float(given.get("temperature", 1 if given.get("do_sample") else 0)) > 0
    sampled = warm and bool(given.get("do_sample", True))
    chosen = {name: given[name] for name in PASSED if name in given}
    chosen.setdefault("max_new_tokens", max_new_tokens)
    chosen.setdefault("num_beams", 1)
    if sampled:
        chosen.update({name: given[name] for name in SAMPLING if name in given})
    return chosen | {"do_sample": sampled}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """An answer up to the first of the texts that end it, without white space around it."""
    text = text.strip()
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text.strip()


class Answerer:
    """A model with a pruner attached.

    Attributes:
        loaded: model and processor.
        handle: the attachment; None without a pruner.
        spent: what answers cost so far.
    """

    def __init__(self, arguments: Arguments) -> None:
        source = sources.find_model(arguments.pretrained)
        device = options.choose_device(arguments.device)
        dtype = options.choose_dtype(arguments.dtype, device)
        self.loaded: Loaded = load(source, device, dtype)
        self.handle: Handle | None = None
        if arguments.pruner is not None:
            # Log-likelihoods are read at the columns of the ids.
            self.handle = arguments.pruner.attach(self.loaded.model, logits="full")
        self.device = device
        self.spent = Spent()

    def text(self, one: Conversation) -> str:
        """A conversation as the processor gets it: in the model's own chat template.

        Raises:
            VlmpruneError: the model has no chat template and there is more than one turn, or a
                text holds the mark that stands for a picture.
        """
        processor = self.loaded.processor
        texts = [
            part["text"] for m in one.messages for part in m["content"] if part["type"] == "text"
        ]
        mark = getattr(processor, "image_token", None)
        if mark and any(mark in text for text in texts):
            raise VlmpruneError(
                f"a request's text holds {mark!r}, which stands for a picture to this model; use a "
                "task that gives its pictures apart from the text."
            )
        if has_template(processor):
            text: str = processor.apply_chat_template(one.messages, add_generation_prompt=True)
            return text
        if len(one.messages) != 1:
            raise VlmpruneError(
                "a request has several turns, but the model's processor has no chat template; use "
                "a model that has one."
            )
        return prompt_of(processor, len(one.images), "\n".join(texts))

    @torch.inference_mode()
    def answer(self, some: Sequence[Conversation], settings: Mapping[str, Any]) -> list[str]:
        """Answers to conversations, all with pictures or all without, in one batch.

        Args:
            some: the conversations.
            settings: as `generation` makes them.
        """
        model, processor = self.loaded.model, self.loaded.processor
        texts = [self.text(one) for one in some]
        inputs = prepare_texts(self.loaded, [one.images for one in some], texts)
        start = time.perf_counter()
        with enough_memory(self.device):
            out = model.generate(**inputs, **settings)
        new = out[:, inputs["input_ids"].shape[1] :].tolist()
        self.spent.seconds += time.perf_counter() - start
        pad = getattr(processor.tokenizer, "pad_token_id", None)
        self.spent.tokens += sum(token != pad for row in new for token in row)
        report = None if self.handle is None else self.handle.report
        if report is not None:
            self.spent.visual_tokens += report.visual_tokens_after
            self.spent.visual_tokens_before += report.visual_tokens_before
            self.spent.kv_bytes += report.kv_bytes_after
            self.spent.kv_bytes_before += report.kv_bytes_before
        return list(processor.batch_decode(new, skip_special_tokens=True))

    @torch.inference_mode()
    def likelihood(self, one: Conversation, continuation: str) -> Likelihood:
        """How likely the model finds an answer to a conversation, written behind its text.

        Args:
            one: the conversation.
            continuation: the answer, with the space before it, if any.

        Raises:
            VlmpruneError: the answer adds no token.
        """
        text = self.text(one)
        inputs = prepare_texts(self.loaded, [one.images], [text + continuation])
        before = prepare_texts(self.loaded, [one.images], [text])["input_ids"][0]
        ids = inputs["input_ids"][0]
        # A token may reach over the end of the text; it is the answer's.
        shared = min(len(ids), len(before))
        start = int((ids[:shared] == before[:shared]).cumprod(dim=0).sum())
        if start == len(ids):
            raise VlmpruneError(
                f"the continuation {continuation!r} adds no token to what comes before it, so it "
                "has no likelihood; use a task whose choices are not empty."
            )
        with enough_memory(self.device):
            logits = self.loaded.model(**inputs).logits[0, start - 1 : -1].float()
        wanted = ids[start:]
        scores = logits.log_softmax(-1).gather(1, wanted[:, None])
        return Likelihood(
            float(scores.sum()), len(wanted), bool((logits.argmax(-1) == wanted).all())
        )

    def close(self) -> None:
        """Give the model back as it was."""
        if self.handle is not None:
            self.handle.detach()
            self.handle = None


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return as_seen(given, "a request's picture")
    if isinstance(given, str):
        return open_image(given)
    raise VlmpruneError(
        f"a request's picture is a {type(given).__name__}; give a picture of Pillow, or its path."
    )
