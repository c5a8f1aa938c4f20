"""One question with and without pruning: load, answer, time. Prints nothing; `cli` does that."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image

from vlmprune import costs, overlay
from vlmprune.boxes import token_boxes
from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Handle, Pruner
from vlmprune.report import Report
from vlmprune.sources import Source, reason


@dataclass(frozen=True)
class Measured:
    """One way of answering.

    Attributes:
        answer: the new text.
        visual_tokens: how many the language model saw.
        new_tokens: length of the answer in tokens, the end token included.
        prefill_ms: time to the first token, vision tower and selection included.
        total_ms: time of the whole call.
        kv_bytes: bytes that the visual tokens' keys and values take.
        decoder_flops: of the language model's prefill on visual tokens.
        flops: the same and the vision tower's.
    """

    answer: str
    visual_tokens: int
    new_tokens: int
    prefill_ms: float
    total_ms: float
    kv_bytes: int
    decoder_flops: float
    flops: float


@dataclass(frozen=True)
class Outcome:
    """Both ways, and what the pruner reports."""

    full: Measured
    pruned: Measured
    report: Report
    device: str
    dtype: str
    repeat: int

    @property
    def prefill_speedup(self) -> float:
        """How many times faster the first token comes."""
        return self.full.prefill_ms / self.pruned.prefill_ms

    @property
    def total_speedup(self) -> float:
        """How many times faster the whole answer comes."""
        return self.full.total_ms / self.pruned.total_ms

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "repeat": self.repeat,
            "full": asdict(self.full),
            "pruned": asdict(self.pruned),
            "prefill_speedup": self.prefill_speedup,
            "total_speedup": self.total_speedup,
            "report": self.report.as_dict(),
        }


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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    local = {"local_files_only": source.folder is not None, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source.name, **local)
    except ImportError as error:
        raise VlmpruneError(
            f"the processor of {source.name!r} needs torchvision; install it with "
            "`pip install torchvision`."
        ) from error
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"the processor of {source.name!r} cannot be loaded ({reason(error)})."
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise VlmpruneError(
            f"{source.name!r} has no processor for images; give a folder that holds the "
            "processor's files beside the weights."
        )
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(source.name, dtype=dtype, **local)
        model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise _too_large(device) from error
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"the weights of {source.name!r} cannot be loaded ({reason(error)})."
        ) from error
    return Loaded(model, processor)


def prepare(loaded: Loaded, images: Sequence[Image.Image], question: str) -> Any:
    """The processor's inputs for a question about images, on the model's device."""
    processor = loaded.processor
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": question})
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        mark = getattr(processor, "image_token", None) or "<image>"
        text = "USER: " + f"{mark}\n" * len(images) + f"{question} ASSISTANT:"
    inputs = processor(text=text, images=list(images), return_tensors="pt")
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)


def answer_twice(
    loaded: Loaded,
    pruner: Pruner,
    inputs: Any,
    max_new_tokens: int,
    repeat: int,
    say: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Answer and time the same inputs without and with the pruner, turn by turn.

    Args:
        loaded: model and processor.
        pruner: the method.
        inputs: from `prepare`.
        max_new_tokens: limit of the answer.
        repeat: timed rounds, of which the medians are taken.
        say: told what happens, for a progress line.

    Raises:
        VlmpruneError: a limit below 1, or what the pruner refuses.
    """
    check_counts(max_new_tokens, repeat)
    model, device = loaded.model, loaded.model.device
    prompt = inputs["input_ids"].shape[1]

    def call(limit: int) -> torch.Tensor:
        out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
        new: torch.Tensor = out[0, prompt:]
        return new

    def clock(limit: int) -> float:
        _wait(device)
        start = time.perf_counter()
        call(limit)
        _wait(device)
        return 1000 * (time.perf_counter() - start)

    @contextmanager
    def way(pruned: bool) -> Iterator[Handle | None]:
        if not pruned:
            yield None
            return
        with pruner(model) as handle:
            yield handle

    ids: dict[bool, torch.Tensor] = {}
    times: dict[tuple[bool, int], list[float]] = {}
    selecting: list[float] = []
    limits = (1, max_new_tokens)
    try:
        # The pruned way first, since it is the one that may refuse.
        for pruned in (True, False):
            say("Answering with pruning…" if pruned else "Answering with all visual tokens…")
            with way(pruned):
                ids[pruned] = call(max_new_tokens)
        for turn in range(repeat):
            say(f"Timing, round {turn + 1} of {repeat}…")
            for pruned in (bool(turn % 2), not turn % 2):
                with way(pruned) as handle:
                    for limit in limits:
                        times.setdefault((pruned, limit), []).append(clock(limit))
                    if handle is not None and handle.report is not None:
                        selecting.append(handle.report.seconds_selecting)
                        report = handle.report
    except torch.OutOfMemoryError as error:
        raise _too_large(device) from error

    report = replace(report, seconds_selecting=statistics.median(selecting))

    def measured(pruned: bool) -> Measured:
        part = "after" if pruned else "before"
        tokens = getattr(report, f"visual_tokens_{part}")
        return Measured(
            answer=loaded.processor.decode(ids[pruned], skip_special_tokens=True).strip(),
            visual_tokens=tokens,
            new_tokens=len(ids[pruned]),
            prefill_ms=statistics.median(times[pruned, 1]),
            total_ms=statistics.median(times[pruned, max_new_tokens]),
            kv_bytes=getattr(report, f"kv_bytes_{part}"),
            decoder_flops=costs.prefill_flops(model.config, tokens),
            flops=getattr(report, f"flops_{part}"),
        )

    dtype = str(model.dtype).removeprefix("torch.")
    return Outcome(measured(False), measured(True), report, str(device), dtype, repeat)


def draw(
    loaded: Loaded, inputs: Any, images: Sequence[Image.Image], report: Report
) -> list[Image.Image]:
    """For each image a picture of what was kept."""
    sizes = inputs.get("image_sizes")
    pictures = []
    for number, (image, layout) in enumerate(zip(images, report.layouts, strict=True)):
        boxes = token_boxes(
            layout,
            image.size,
            loaded.processor.image_processor,
            loaded.model.config.model_type,
            None if sizes is None else sizes[number].tolist(),
            loaded.model.config.vision_config.patch_size,
        )
        names = _roles(report, number)
        crops = _panels(layout.crop) if layout.crops > 1 else None
        pictures.append(overlay.draw(image, boxes, names, crops=crops))
    return pictures


def _roles(report: Report, number: int) -> list[str]:
    """The role of each visual token of an image, as `overlay` calls it."""
    names = ["dropped"] * len(report.layouts[number].labels)
    for token in report.kept[number].tolist():
        names[token] = "kept"
    for role, members in report.roles[number].items():
        if role in overlay.ROLES:
            for token in members.nonzero()[:, 0].tolist():
                names[token] = role
    return names


def _panels(crops: torch.Tensor) -> torch.Tensor:
    """The crop of each token; a newline goes with the patch before it."""
    numbers, current = [], 0
    for crop in crops.tolist():
        current = crop if crop >= 0 else current
        numbers.append(current)
    return torch.tensor(numbers)


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


def check_counts(max_new_tokens: int, repeat: int) -> None:
    """Refuse a limit or a number of rounds below 1.

    Raises:
        VlmpruneError: one of them is.
    """
    for name, value in (("max-new-tokens", max_new_tokens), ("repeat", repeat)):
        if value < 1:
            raise VlmpruneError(f"--{name} {value} is too few; use 1 or more.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _too_large(device: torch.device) -> VlmpruneError:
    return VlmpruneError(
        f"the memory of {device} is too small for this; use --dtype float16, or --device cpu."
    )
