"""One question with and without pruning: answer, time. Prints nothing; `cli` does that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image

from vlmprune.costs.units import ready
from vlmprune.draw import overlay
from vlmprune.draw.boxes import check_family, token_boxes
from vlmprune.errors import VlmpruneError, reason
from vlmprune.hosts import processed
from vlmprune.hosts import sizes as tower_sizes
from vlmprune.io.models import Loaded, attached, enough_memory
from vlmprune.io.options import at_least_one, check_decode
from vlmprune.pruner import Pruner
from vlmprune.report import Report
from vlmprune.runtime.family import family_of
from vlmprune.study.measure import timed, wait


@dataclass(frozen=True)
class OneWay:
    """One way of answering.

    Attributes:
        answer: the new text.
        visual_tokens: how many the language model saw.
        new_tokens: length of the answer in tokens, the end token included.
        first_token_ms: time to the first token, vision tower and selection included.
        decode_tokens_per_second: speed after the first token, over the same number of tokens
            either way; None where it was not measured.
        total_ms: time of the whole call.
        kv_bytes: bytes that the visual tokens' keys and values take, on the device of the
            computation.
        kv_bytes_host: that they take in host memory.
        kv_bytes_read: bytes for visual tokens that a decode step reads, as `Report` has them.
        decoder_flops: of the language model's prefill on visual tokens.
        flops: the same and the vision tower's.
    """

    answer: str
    visual_tokens: int
    new_tokens: int
    first_token_ms: float
    decode_tokens_per_second: float | None
    total_ms: float
    kv_bytes: float
    kv_bytes_host: int
    kv_bytes_read: float
    decoder_flops: float
    flops: float


@dataclass(frozen=True)
class BothWays:
    """Both ways, and what the pruner reports.

    Attributes:
        full: with all visual tokens.
        pruned: with the pruner.
        first_token_same: whether both answers begin with the same token.
        decode_tokens: tokens over which the decode speed was measured; 0 if it was not.
        report: the pruner's, of the whole answer.
        device: where the model is.
        dtype: of its weights.
        repeat: timed rounds, of which the medians were taken.
    """

    full: OneWay
    pruned: OneWay
    first_token_same: bool
    decode_tokens: int
    report: Report
    device: str
    dtype: str
    repeat: int

    @property
    def first_token_speedup(self) -> float:
        """How many times faster the first token comes."""
        return self.full.first_token_ms / self.pruned.first_token_ms

    @property
    def decode_speedup(self) -> float | None:
        """How many times faster a token after the first comes; None if it was not measured."""
        full, pruned = (m.decode_tokens_per_second for m in (self.full, self.pruned))
        return None if full is None or pruned is None else pruned / full

    @property
    def total_speedup(self) -> float:
        """How many times faster the whole answer comes."""
        return self.full.total_ms / self.pruned.total_ms

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; None for what is unknown."""
        out: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "repeat": self.repeat,
            "full": asdict(self.full),
            "pruned": asdict(self.pruned),
            "first_token_same": self.first_token_same,
            "decode_tokens": self.decode_tokens,
            "first_token_speedup": self.first_token_speedup,
            "decode_speedup": self.decode_speedup,
            "total_speedup": self.total_speedup,
            "report": self.report.as_dict(),
        }
        made: dict[str, Any] = ready(out)
        return made


def answer_twice(
    loaded: Loaded,
    pruner: Pruner,
    inputs: Any,
    max_new_tokens: int,
    repeat: int,
    decode_tokens: int,
    say: Callable[[str], None] = lambda message: None,
) -> BothWays:
    """Answer and time the same inputs without and with the pruner, turn by turn.

    Args:
        loaded: model and processor.
        pruner: the method.
        inputs: from `prepare`.
        max_new_tokens: limit of the answer.
        repeat: timed rounds, of which the medians are taken.
        decode_tokens: tokens that both ways generate, whatever the answer's length, so that the
            decode speed is that of the same number of steps; 0 leaves it out.
        say: told what happens, for a progress line.

    Raises:
        VlmpruneError: a number out of range, or what the pruner refuses.
    """
    at_least_one(max_new_tokens=max_new_tokens, repeat=repeat)
    check_decode(decode_tokens)
    model, device = loaded.model, loaded.model.device
    prompt = processed.ids_of(inputs).shape[1]

    def call(limit: int) -> torch.Tensor:
        out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
        new: torch.Tensor = out[0, prompt:]
        return new

    def clock(limit: int) -> float:
        wait(device)
        start = time.perf_counter()
        call(limit)
        wait(device)
        return 1000 * (time.perf_counter() - start)

    ids: dict[bool, torch.Tensor] = {}
    times: dict[tuple[bool, int], list[float]] = {}
    rates: dict[bool, list[float]] = {True: [], False: []}
    selecting: list[float] = []
    limits = (1, max_new_tokens)
    with enough_memory(device):
        # The pruned way first, since it is the one that may refuse.
        for pruned in (True, False):
            say("Answering with pruning…" if pruned else "Answering with all visual tokens…")
            with attached(pruner if pruned else None, model):
                ids[pruned] = call(max_new_tokens)
        for turn in range(repeat):
            say(f"Timing, round {turn + 1} of {repeat}…")
            for pruned in (bool(turn % 2), not turn % 2):
                with attached(pruner if pruned else None, model) as handle:
                    for limit in limits:
                        times.setdefault((pruned, limit), []).append(clock(limit))
                    if handle is not None and handle.report is not None:
                        selecting.append(handle.report.seconds_selecting)
                        report = handle.report
                    rate = (
                        timed(model, inputs, decode_tokens).decode_rate if decode_tokens else None
                    )
                    if rate is not None:
                        rates[pruned].append(rate)

    report = replace(report, seconds_selecting=statistics.median(selecting))

    def measured(pruned: bool) -> OneWay:
        part = "after" if pruned else "before"
        tokens = getattr(report, f"visual_tokens_{part}")
        return OneWay(
            answer=loaded.processor.decode(ids[pruned], skip_special_tokens=True).strip(),
            visual_tokens=tokens,
            new_tokens=len(ids[pruned]),
            first_token_ms=statistics.median(times[pruned, 1]),
            decode_tokens_per_second=statistics.median(rates[pruned]) if rates[pruned] else None,
            total_ms=statistics.median(times[pruned, max_new_tokens]),
            kv_bytes=getattr(report, f"kv_bytes_{part}"),
            kv_bytes_host=report.reading.host_bytes if pruned and report.reading else 0,
            kv_bytes_read=report.kv_bytes_read if pruned else report.kv_bytes_before,
            decoder_flops=getattr(report, f"decoder_flops_{part}"),
            flops=getattr(report, f"flops_{part}"),
        )

    dtype = str(model.dtype).removeprefix("torch.")
    return BothWays(
        full=measured(False),
        pruned=measured(True),
        first_token_same=bool(ids[False][0] == ids[True][0]),
        decode_tokens=decode_tokens,
        report=report,
        device=str(device),
        dtype=dtype,
        repeat=repeat,
    )


def undrawn(loaded: Loaded) -> str:
    """Why the model's visual tokens cannot be placed on a picture; "" where they can."""
    try:
        check_family(family_of(loaded.model).name)
    except VlmpruneError as error:
        return reason(error)
    return ""


def draw(
    loaded: Loaded, inputs: Any, images: Sequence[Image.Image], report: Report, **form: Any
) -> list[Image.Image]:
    """For each image a picture of what was kept; `form` goes to `overlay.draw`."""
    places = places_of(loaded, inputs, images, report)
    return [
        overlay.draw(
            image,
            place.boxes,
            _roles(report, number),
            crops=place.crops,
            whole_crop=place.whole_crop,
            **form,
        )
        for number, (image, place) in enumerate(zip(images, places, strict=True))
    ]


@dataclass(frozen=True)
class Place:
    """Where an image's visual tokens lie on it, as `overlay.draw` wants it.

    Attributes:
        boxes: [n, 4] float32.
        crops: [n] the crop of each; None where all are shown as one.
        whole_crop: which of them is the view of the whole.
    """

    boxes: torch.Tensor
    crops: torch.Tensor | None
    whole_crop: int


def places_of(
    loaded: Loaded, inputs: Any, images: Sequence[Image.Image], report: Report
) -> list[Place]:
    """Where the visual tokens of each image lie.

    Raises:
        VlmpruneError: it is not known, as `token_boxes` has it.
    """
    sizes = processed.sizes_of(inputs)
    found = []
    for number, (image, layout) in enumerate(zip(images, report.layouts, strict=True)):
        boxes = token_boxes(
            layout,
            image.size,
            loaded.processor.image_processor,
            family_of(loaded.model).name,
            None if sizes is None else sizes[number].tolist(),
            tower_sizes.patch_size(loaded.model.config),
        )
        # Without a view of the whole all crops are shown as one.
        crops = None if layout.whole_crop is None or layout.crops == 1 else _panels(layout.crop)
        found.append(Place(boxes, crops, layout.whole_crop or 0))
    return found


def _roles(report: Report, number: int) -> list[str]:
    """The role of each visual token of an image, as `overlay` calls it."""
    names = ["dropped"] * len(report.layouts[number].labels)
    for token, into in enumerate(report.members[number].tolist() if report.members else ()):
        names[token] = "member" if into >= 0 else "dropped"
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
