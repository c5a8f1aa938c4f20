"""What every family of the zoo shares: ids, weights, how a batch is put together.

Sizes are chosen so that layouts cannot be confused: grids are not square where a family allows
it, images differ in size, and each has another number of visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Modality = Literal["image", "video"]
Place = tuple[str, Any]

VOCABULARY = 128
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO = 5, 6
# What processors put around and between placeholders: vision start and end, line breaks, tiles.
START, END, BREAK, NEWLINE, GLOBAL, SEPARATOR = 7, 8, 9, 10, 11, 12
TILES = 13  # the first of the ids that number tiles
WORDS = 60  # the first id of an ordinary word

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

# Sliding windows and chunks that reach over any request of the tests, and such that do not.
FAR, NEAR = 1024, 24
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass
class Request:
    """A batch as a family's processor would make it.

    Attributes:
        inputs: what goes into `generate`.
        lengths: visual tokens of each image and video, in prompt order.
        modalities: what each of them is.
        rows: the row of the batch that each belongs to.
        pixels: the input that holds each one's pixels, and where in it.
    """

    inputs: dict[str, Tensor]
    lengths: list[int]
    modalities: list[Modality]
    rows: list[int]
    pixels: list[Place]


@dataclass(frozen=True)
class Media:
    """What a processor makes of the images and videos of a batch.

    Attributes:
        inputs: pixels and what describes them.
        pieces: for each image and video in prompt order, the ids that stand for it.
        pixels: for each one, the input that holds its pixels and the index in it.
    """

    inputs: dict[str, Tensor]
    pieces: list[list[int]]
    pixels: list[Place]


# (model, modalities by row, generator) → pixels and ids.
Maker = Callable[[Any, "list[list[Modality]]", torch.Generator], Media]


@dataclass(frozen=True)
class Entry:
    """A family: its class, a tiny model of it, and requests for that.

    Attributes:
        name: as users call it.
        make: builds the model, weights as they come.
        media: makes pixels and placeholder ids.
        modalities: what the family takes.
        aligned: further inputs with one value a column, from the ids.
        images_first: whether the processor puts all images before the text.
        decoder_attention: the decoder's only attention implementation, where it has but one.
        one_placeholder: whether a video's frames have the placeholder of images, so that a request
            holds images or videos. Where one is asked for both, they are all videos.
        attends: whether something attends in its vision tower.
    """

    name: str
    make: Callable[[], Any]
    media: Maker
    modalities: tuple[Modality, ...] = ("image",)
    aligned: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})
    images_first: bool = False
    decoder_attention: str | None = None
    one_placeholder: bool = False
    attends: bool = True

    def build(self, attention: str = "sdpa", seed: int = 0) -> Any:
        """A model with scaled-up random weights."""
        torch.manual_seed(seed)
        model = unusual_scales(loud(self.make()), self.attends)
        decoder = self.decoder_attention or attention
        model.set_attn_implementation(
            {"": attention, "vision_config": attention, "text_config": decoder}
        )
        return model

    def placeholder(self, modality: Modality) -> int:
        """The id of a modality's placeholders."""
        return IMAGE if modality == "image" or self.one_placeholder else VIDEO

    def request(
        self,
        model: Any,
        rows: list[list[Modality]],
        text: int | list[int] = 5,
        seed: int = 1,
        side: str = "left",
    ) -> Request:
        """A batch whose row r holds the images and videos `rows[r]` among random text."""
        generator = torch.Generator().manual_seed(seed)
        if self.one_placeholder and any("video" in row for row in rows):
            rows = [["video"] * len(row) for row in rows]
        media = self.media(model, rows, generator)
        left = list(media.pieces)

        def words(n: int) -> list[int]:
            return torch.randint(WORDS, VOCABULARY, (n,), generator=generator).tolist()

        prompts = []
        for number, row in enumerate(rows):
            own, left = left[: len(row)], left[len(row) :]
            end = words(text if isinstance(text, int) else text[number])
            if self.images_first:
                prompts.append([*chain(*own), BOS, *words(2 + number), *end])
                continue
            ids = [BOS, *words(2 + number)]
            for piece in own:
                ids += piece + words(3)
            prompts.append(ids + end)
        ids, mask = pad(prompts, side)
        modalities = [modality for row in rows for modality in row]
        lengths = [
            sum(i == self.placeholder(modality) for i in piece)
            for piece, modality in zip(media.pieces, modalities, strict=True)
        ]
        inputs = media.inputs | {"input_ids": ids, "attention_mask": mask} | self.aligned(ids)
        places = [number for number, row in enumerate(rows) for _ in row]
        return Request(inputs, lengths, modalities, places, media.pixels)


def loud(model: Any) -> Any:
    """Scale a model's random weights up: as they come, every logit is near zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "softmax_scaling" in name:
                # Factors of queries, which must not be near zero.
                weight.add_(0.1 * torch.randn_like(weight))
            elif weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5)
            elif "norm" not in name and "lambda" not in name:
                weight.normal_(std=0.1)
    model.generation_config.pad_token_id = PAD
    # No end token: every run goes its full length and steps can be compared.
    model.generation_config.eos_token_id = None
    return model.eval()


# Factors of the usual scale, in turn.
UNUSUAL = (0.6, 1.7)


def unusual_scales(model: Any, attends: bool = True) -> Any:
    """Give attention scales that are not head_dim^-0.5, so that a misread one shows.

    Models that hand none to the attention function (Llama 4's tower) keep theirs.

    Args:
        model: it.
        attends: whether something attends in its vision tower.
    """
    decoder = model.get_decoder()
    inside, changed = set(decoder.modules()), {True: 0, False: 0}
    scaled = [one for one in model.modules() if type(one).__name__.endswith("Attention")]
    for number, module in enumerate(scaled):
        for name in ("scaling", "scale"):
            usual = getattr(module, name, None)
            if isinstance(usual, float):
                setattr(module, name, usual * UNUSUAL[number % len(UNUSUAL)])
                changed[module in inside] += 1
    needed = (True, False) if attends else (True,)
    assert all(changed[place] for place in needed), f"no scale was found in {type(model).__name__}"
    return model


def scale_of(attention: Any) -> float:
    """The factor of the dot products that an attention module hands over."""
    named = [
        getattr(one, name)
        for one in attention.modules()
        for name in ("scaling", "scale")
        if isinstance(getattr(one, name, None), float)
    ]
    (scale,) = set(named)
    return float(scale)


def pad(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of unequal length."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return ids, mask


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Random pixels, as a processor's normalisation leaves them."""
    return torch.randn(*shape, generator=generator)


def flat(rows: list[list[Modality]], modality: Modality) -> int:
    """How many images (or videos) a batch holds."""
    return sum(one == modality for row in rows for one in row)


T = TypeVar("T")


def in_order(rows: list[list[Modality]], images: Iterable[T], videos: Iterable[T] = ()) -> list[T]:
    """What belongs to images and what belongs to videos, brought into prompt order."""
    queues = {"image": iter(images), "video": iter(videos)}
    return [next(queues[modality]) for row in rows for modality in row]


def one_each(rows: list[list[Modality]], name: str = "pixel_values") -> list[Place]:
    """Places of pixels that have images, and videos, one by one along dimension 0."""
    images = [(name, i) for i in range(flat(rows, "image"))]
    videos = [("pixel_values_videos", i) for i in range(flat(rows, "video"))]
    return in_order(rows, images, videos)


def ranges(name: str, counts: Iterable[int]) -> list[Place]:
    """Places of pixels that lie behind one another along dimension 0, `counts` of each."""
    ends = list(accumulate(counts))
    return [(name, slice(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
