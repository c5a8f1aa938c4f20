"""A model with its processor: loaded, in silence, and fed. Prints nothing; `cli` does that."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from vlmprune.errors import VlmpruneError, reason
from vlmprune.hosts import pretrained
from vlmprune.hosts.contract import Ledger
from vlmprune.io import processors
from vlmprune.io.sources import Source
from vlmprune.pruner import Handle, Pruner


@dataclass(frozen=True)
class Loaded:
    """A model with its processor."""

    model: Any
    processor: Any


def load(source: Source, device: torch.device, dtype: Any) -> Loaded:
    """The model, in eval mode on the device, and its processor.

    Raises:
        VlmpruneError: something of it is missing; the sentence says what.
    """
    local = {"local_files_only": source.local, "trust_remote_code": False}
    try:
        processor = pretrained.load("AutoProcessor", source.name, **local)
    except ImportError as error:
        raise VlmpruneError(
            f"the processor of {source.name!r} needs torchvision; install it with "
            "`pip install torchvision`."
        ) from error
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"the processor of {source.name!r} cannot be loaded ({reason(error)}); give a folder "
            "into which model and processor were saved by save_pretrained."
        ) from error
    if not processors.has_images(processor):
        raise VlmpruneError(
            f"{source.name!r} has no processor for images; give a folder that holds the "
            "processor's files beside the weights."
        )
    try:
        with enough_memory(device):
            model = pretrained.load(
                "AutoModelForImageTextToText", source.name, dtype=dtype, **local
            )
            model.to(device).eval()
    except VlmpruneError:
        raise
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"the weights of {source.name!r} cannot be loaded ({reason(error)}); give a folder "
            "into which the model was saved by save_pretrained."
        ) from error
    return Loaded(model, processor)


def prepare(loaded: Loaded, images: Sequence[Image.Image], question: str) -> Any:
    """The processor's inputs for a question about images, on the model's device."""
    return prepare_batch(loaded, [images], [question])


def prepare_batch(
    loaded: Loaded, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]
) -> Any:
    """The processor's inputs for several such questions, padded on the left."""
    texts = [
        prompt_of(loaded.processor, len(pictures), question)
        for pictures, question in zip(images, questions, strict=True)
    ]
    return prepare_texts(loaded, images, texts)


def prepare_texts(
    loaded: Loaded, images: Sequence[Sequence[Image.Image]], texts: Sequence[str]
) -> Any:
    """The processor's inputs for several prompts as `prompt_of` makes them, padded on the left.

    Raises:
        VlmpruneError: the processor does not take the pictures.
    """
    processor = loaded.processor
    padding: dict[str, Any] = {}
    if len(texts) > 1:
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        padding = {"padding": True, "padding_side": "left"}
    flat = [picture for pictures in images for picture in pictures]
    inputs = processed(processor, texts, flat, **padding)
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)


def processed(
    processor: Any, texts: Sequence[str], images: Sequence[Image.Image], **options: Any
) -> Any:
    """What a processor makes of prompts with pictures.

    Raises:
        VlmpruneError: it does not take the pictures, as those that are very narrow.
    """
    try:
        return processor(
            text=list(texts), images=list(images) or None, return_tensors="pt", **options
        )
    except (ValueError, ZeroDivisionError) as error:
        if not images:
            raise
        sizes = sorted({one.size for one in images}, key=lambda size: max(size) / min(size))
        shape = "{} x {}".format(*sizes[-1])
        raise VlmpruneError(
            f"the model's processor does not take the picture(s), the narrowest of {shape} pixels "
            f"({reason(error)}); give others."
        ) from error


def prompt_of(processor: Any, images: int, question: str) -> str:
    """A question about so many images in the model's chat form."""
    if processors.has_template(processor):
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
        content.append({"type": "text", "text": question})
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    mark = processors.image_mark(processor)
    return "USER: " + f"{mark}\n" * images + f"{question} ASSISTANT:"


_proved: WeakKeyDictionary[Any, dict[str, Ledger]] = WeakKeyDictionary()


@contextmanager
def attached(pruner: Pruner | None, model: Any) -> Iterator[Handle | None]:
    """A pruner on a model inside a `with` block; nothing for None.

    What it proved of the model in an earlier block is not proved again, so that what is measured
    are calls as a pruner that stays attached makes them.
    """
    if pruner is None:
        yield None
        return
    with pruner(model, logits="short") as handle:
        proved = _proved.setdefault(model, {})
        data = handle.attachment
        data.ledger = proved.setdefault(repr(pruner), data.ledger)
        yield handle


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers' warnings and progress bars off the terminal, and undo that."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    """Tell in one sentence that a device's memory did not do.

    Raises:
        VlmpruneError: it did not.
    """
    try:
        yield
    except RuntimeError as error:
        # A CPU's allocator has no exception of its own.
        cpu = "DefaultCPUAllocator" in str(error)
        if not cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        ways = "a smaller model or --dtype bfloat16" if cpu else "--dtype float16, or --device cpu"
        raise VlmpruneError(f"the memory of {device} is too small for this; use {ways}.") from error
