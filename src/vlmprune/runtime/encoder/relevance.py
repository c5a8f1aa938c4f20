"""How like the question each visual token is: by the language model's words, or by a CLIP model.

Relevance is a mean of cosines, of each visual token to the parts of the question. The question is
what the row of the prompt says behind the image; where it says nothing there, all its text. Of that
a text tower may get the bare question alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import clip, pretrained, processed
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.encoder.bare_question import bare
from vlmprune.runtime.geometry import Geometry, Item
from vlmprune.select.precision import unrounded
from vlmprune.views import EncoderView


@dataclass(frozen=True)
class Question:
    """The new columns of a request.

    Attributes:
        ids: [B, L] token ids.
        mask: [B, L] bool; False where a column is padding.
        visual: [B, L] bool; placeholders of images and videos.
        answers: [B, L] bool; columns that a model is trained to say (its labels), which no
            question may hold; None for none.
    """

    ids: Tensor
    mask: Tensor
    visual: Tensor
    answers: Tensor | None = None

    def text(self, row: int) -> Tensor:
        """[L] bool; text of a row up to its first answer."""
        found = self.mask[row] & ~self.visual[row]
        if self.answers is None:
            return found
        return found & (self.answers[row].long().cumsum(dim=0) == 0)

    def of(self, item: Item) -> Tensor:
        """[n] int64; ids of the text behind an image, else of all text of its row.

        Raises:
            VlmpruneError: the row holds no text at all.
        """
        row = item.span.row
        text = self.text(row)
        columns = torch.arange(len(text), device=text.device)
        places = item.span.columns
        behind = text & (columns > (places[-1] if len(places) else -1))
        chosen = self.ids[row][behind] if bool(behind.any()) else self.ids[row][text]
        if not len(chosen):
            raise VlmpruneError(
                f"row {row} holds an image and no text, so nothing tells what is relevant; ask a "
                "question, or use a method that does not look at it."
            )
        return chosen


@dataclass(frozen=True)
class Dual:
    """The parts of a CLIP-like model that compare images with words.

    Attributes:
        words: (ids, mask) [S, n] → [S, E] embeddings of pieces of text.
        image: [n, C] encoder features → [n, E].
        width: C.
        length: longest piece of text.
        tokenizer: of the text tower.
    """

    words: Callable[[Tensor, Tensor], Tensor]
    image: Callable[[Tensor], Tensor]
    width: int
    length: int
    tokenizer: Any

    def embedded(self, text: str, device: torch.device) -> Tensor:
        """[S, E] embeddings of a text, cut into pieces.

        As CDPruner's release cuts it: the ids of the whole, every `length` of them a piece, the
        last one filled up with zeros that its mask hides.
        """
        ids = torch.tensor([processed.ids_of(self.tokenizer(text))], device=device)
        missing = -ids.shape[1] % self.length if ids.shape[1] > self.length else 0
        mask = nn.functional.pad(torch.ones_like(ids), (0, missing))
        ids = nn.functional.pad(ids, (0, missing))
        step = min(self.length, ids.shape[1])
        return self.words(ids.view(-1, step), mask.view(-1, step))


BY_WORDS = "relevance by the language model's text embeddings"

# What was loaded for an attachment; it goes when the attachment goes.
_loaded: WeakKeyDictionary[Attachment, dict[str, Any]] = WeakKeyDictionary()


def check(attachment: Attachment, source: str, question: Question, geometry: Geometry) -> None:
    """Refuse, before anything is encoded, what cannot be compared; load what compares.

    Args:
        attachment: of the method to the model.
        source: as in `Reads`.
        question: the request's columns.
        geometry: that of the items.

    Raises:
        VlmpruneError: the source cannot be loaded, or an image comes without any text.
    """
    dual, _ = _dual(attachment, source)
    if dual is not None:
        _tokenizer(attachment)
    for item in geometry.items:
        question.of(item)


def to_cells(
    attachment: Attachment,
    source: str,
    question: Question,
    geometry: Geometry,
    view: EncoderView,
    alone: bool = False,
) -> tuple[Tensor, str]:
    """The mean cosine of each cell to the parts of the question.

    Args:
        attachment: of the method to the model.
        source: as in `Reads`.
        question: the request's columns.
        geometry: that of the items.
        view: of all crops, with projected features.
        alone: whether a text tower gets the bare question, not all the text.

    Returns:
        [crops, N] float32, and where it came from, in words.

    Raises:
        VlmpruneError: the source does not fit the model's vision tower.
    """
    device = view.features.device
    dual, words = _dual(attachment, source)
    if source == "auto" and dual is not None and dual.width != view.features.shape[-1]:
        # The host joins or mixes features, which its text tower was not trained with.
        dual, words = None, BY_WORDS
    values = view.projected if dual is None else view.features
    assert values is not None
    out, start = [], 0
    for item in geometry.items:
        ids = question.of(item)
        crops = values[start : start + item.layout.crops]
        start += item.layout.crops
        if dual is None:
            parts = attachment.model.get_input_embeddings()(ids).to(device)
        else:
            if values.shape[-1] != dual.width:
                raise VlmpruneError(
                    f"relevance={source!r} compares features of width {dual.width}, but the "
                    f"vision tower of {type(attachment.model).__name__} makes {values.shape[-1]}; "
                    "give the CLIP model that its tower comes from, or relevance='auto'."
                )
            parts = dual.embedded(_text(attachment, question, item, alone), device)
            crops = dual.image(crops)
        out.append(mean_cosine(crops.detach(), parts.detach()))
    return torch.cat(out), words


def _text(attachment: Attachment, question: Question, item: Item, alone: bool) -> str:
    """What a text tower compares an image with."""
    row = item.span.row

    def said(ids: Tensor) -> str:
        return str(_tokenizer(attachment).decode(ids, skip_special_tokens=True))

    behind = said(question.of(item))
    if not alone:
        return behind
    # Where the image comes last, only a template's words are behind it.
    return bare(behind) or bare(said(question.ids[row][question.text(row)])) or behind


def mean_cosine(features: Tensor, parts: Tensor) -> Tensor:
    """Mean cosine of each feature to the parts.

    Args:
        features: [..., D].
        parts: [S, D].

    Returns:
        [...] float32.
    """
    # Cosine is linear in the unit vectors, so their mean stands for all parts.
    mean = nn.functional.normalize(parts.float(), dim=-1).mean(dim=0)
    with unrounded(features):
        return nn.functional.normalize(features.float(), dim=-1) @ mean.to(features.device)


def _dual(attachment: Attachment, source: str) -> tuple[Dual | None, str]:
    """The CLIP-like model that compares; None where the language model's embeddings do."""
    kept = _loaded.setdefault(attachment, {})
    if source not in kept:
        if source == "auto":
            dual = _own(attachment)
            words = "relevance by the model's own text tower" if dual else BY_WORDS
        else:
            dual = _load(source, attachment.model)
            words = f"relevance by the text tower of {source}"
        kept[source] = dual, words
    found: tuple[Dual | None, str] = kept[source]
    return found


def _own(attachment: Attachment) -> Dual | None:
    """The model's own text tower, if its vision tower is a whole CLIP-like model.

    One that does not say where it came from has no tokenizer, and does not count.
    """
    for module in clip.within(attachment.model):
        name = pretrained.source_of(module.config)
        if name:
            return _parts(module, _pretrained(pretrained.TOKENIZER, name))
    return None


def _load(source: str, model: Any) -> Dual:
    """The parts of a CLIP model in a folder, or by its id.

    Raises:
        VlmpruneError: it cannot be loaded, or is no CLIP model.
    """
    config = _pretrained(pretrained.CONFIG, source)
    if not clip.is_clip(config):
        raise VlmpruneError(
            f"relevance={source!r} is a model of type {config.model_type!r}; give the folder or id "
            "of a CLIP model."
        )
    towers = clip.without_vision(_pretrained(pretrained.CLIP, source, use_safetensors=True))
    return _parts(towers.eval().to(model.device), _pretrained(pretrained.TOKENIZER, source))


def _parts(towers: Any, tokenizer: Any) -> Dual:
    """What compares, of a model with both towers."""
    return Dual(
        partial(clip.embedded_words, towers),
        partial(clip.embedded_image, towers),
        clip.width_of(towers),
        clip.longest_of(towers),
        tokenizer,
    )


def _tokenizer(attachment: Attachment) -> Any:
    """The tokenizer of the model, which turns its ids back into text."""
    kept = _loaded.setdefault(attachment, {})
    if "" not in kept:
        name = pretrained.source_of(attachment.model)
        if not name:
            raise VlmpruneError(
                f"{type(attachment.model).__name__} does not say where it was loaded from, so its "
                "ids cannot be turned into text; set model.name_or_path, or use relevance='auto'."
            )
        kept[""] = _pretrained(pretrained.TOKENIZER, name)
    return kept[""]


def _pretrained(kind: str, source: str, **options: Any) -> Any:
    """Something loaded by a class of Transformers.

    Raises:
        VlmpruneError: it cannot be loaded.
    """
    try:
        return pretrained.load(kind, source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise VlmpruneError(
            f"{source!r} cannot be loaded as {kind} ({str(error).splitlines()[0]}); give a folder "
            "or id that holds config, safetensors weights and tokenizer, or use relevance='auto'."
        ) from error
