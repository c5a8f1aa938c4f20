"""What a method sees and returns: small bundles of tensors, no class of any host.

Imports no library but torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.budget import Budget, each_crop


@dataclass(frozen=True)
class Reads:
    """What a method reads of the vision encoder beside the family's own score and features.

    Layers are 0-based numbers of encoder layers.

    Attributes:
        layers: layers whose attention scores are wanted (the CLS token's row, else received).
        patches: the layer whose patch-to-patch attention is wanted, by its column and row means.
        keys: the layer whose keys are wanted, averaged over heads.
        projected: whether the projected features are wanted.
        relevance: "" for none; "auto", the likeness of each visual token to the question, by the
            model's own text tower where it has one, else by the language model's text
            embeddings; or the folder or id of a CLIP model whose text tower is to be used.
        states: encoder layers whose output, the hidden states behind them, is wanted.
        question: whether the language model's state at the question's last token is wanted.
        semantic: [M, C] tokens that pass the encoder beside the patches: they see each other and
            all patches, which do not see them; None for none.
    """

    layers: tuple[int, ...] = ()
    patches: int | None = None
    keys: int | None = None
    projected: bool = False
    relevance: str = ""
    states: tuple[int, ...] = ()
    question: bool = False
    semantic: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EncoderView:
    """All crops of a request after the vision encoder, before the language model.

    A *cell* is one patch of one crop, numbered crop · N + patch. A frame of a video is a crop, and
    a video counts as an image. What a method did not ask for (`Pruner.reads`) is None or empty.

    Attributes:
        attention: [crops, N] float32; what each patch receives, averaged over heads.
        features: [crops, N, C]; encoder features before the projector.
        candidates: [crops, N] bool; patches that the language model would see.
        images: for each crop, the number of its image in the request.
        grids: for each crop (rows, columns) of its cells; of a smaller crop the cells past
            rows · columns are no candidates.
        videos: for each image, whether it is a video, whose crops are its frames in order.
        layers: by encoder layer, attention as in `attention`.
        received: [crops, N] float32; mean over patches of the attention that each patch gets.
        given: [crops, N] float32; mean over patches of the attention that each patch gives.
        keys: [crops, N, D] keys averaged over heads.
        projected: [crops, N, D] features as the language model gets them; zeros where a cell is no
            candidate.
        relevance: [crops, N] float32; mean cosine to the parts of the question.
        by_words: whether that cosine is to the language model's words, for want of a text tower.
        shared: [crops, N] int64 in [0, N); where the method acted inside the encoder
            (`Pruner.inside`), cells of a crop with the same number have the same features; None
            elsewhere.
        states: by encoder layer, [crops, N, C] the hidden states behind it, with gradients.
        question: [crops, D] the language model's state behind its last layer at the last token of
            the question that the crop's row asks, text alone, with gradients.
        semantic: [crops, M, C] the semantic tokens behind the layer of the features, with
            gradients.
    """

    attention: Tensor
    features: Tensor
    candidates: Tensor
    images: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] = ()
    videos: tuple[bool, ...] = ()
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    received: Tensor | None = None
    given: Tensor | None = None
    keys: Tensor | None = None
    projected: Tensor | None = None
    relevance: Tensor | None = None
    shared: Tensor | None = None
    by_words: bool = False
    states: Mapping[int, Tensor] = field(default_factory=dict)
    question: Tensor | None = None
    semantic: Tensor | None = None

    def narrow(self, kept: Tensor) -> EncoderView:
        """The same view with the cells that are not in `kept` [crops, N] ruled out."""
        return replace(self, candidates=self.candidates & kept)

    def counts(self, budget: Budget) -> list[int]:
        """Candidates of each unit of the budget: of each crop (frame), or each image (clip)."""
        per_crop = self.candidates.sum(dim=1).tolist()
        if each_crop(budget):
            return [int(n) for n in per_crop]
        totals = [0] * (max(self.images, default=-1) + 1)
        for image, n in zip(self.images, per_crop, strict=True):
            totals[image] += int(n)
        return totals

    def groups(self, budget: Budget) -> list[Tensor]:
        """Candidates by unit of the budget, units of equal size batched together.

        Returns:
            Tensors [B, n] of cell numbers, ascending in each row; every candidate stands in
            exactly one.
        """
        cells = self.candidates.flatten().nonzero()[:, 0]
        units = cells.split(self.counts(budget))
        by_size: dict[int, list[Tensor]] = defaultdict(list)
        for unit in units:
            if len(unit):
                by_size[len(unit)].append(unit)
        return [torch.stack(same) for same in by_size.values()]


@dataclass(frozen=True)
class Merge:
    """Kept cells that are made of several: each becomes a weighted sum of features.

    Cells are numbered crop · N + cell; an entry adds weight · features[source] to the new value of
    the kept cell `into`. Kept cells that no entry names stay as they are.

    Attributes:
        into: [M] int64.
        source: [M] int64.
        weight: [M] float32.
        projected: whether projected features are added up; else those before the projector, which
            then sees the sums. Where a projector does not work cell by cell, the projected ones
            are added up in either case.
    """

    into: Tensor
    source: Tensor
    weight: Tensor
    projected: bool = False


@dataclass(frozen=True)
class Selection:
    """What a method chose.

    Attributes:
        kept: [crops, N] bool.
        roles: [crops, N] bool by name, for pictures; disjoint parts of `kept`.
        merge: how kept cells are made of several; None where they stay as they are.
        members: [crops, N] int64; the kept cell that each cell went into (a kept cell: itself), -1
            where it went into none; for pictures. None where nothing is merged.
        last: [crops, N] bool; kept cells whose tokens come behind the crop's other tokens where
            positions are renumbered; None for none.
        tokens: [crops, N, D] what the language model gets for kept cells in place of the projected
            features, in its own width; other cells' are not looked at. None where the projected
            features stay. Gradients reach it; there is no `merge` beside it.
    """

    kept: Tensor
    roles: dict[str, Tensor]
    merge: Merge | None = None
    members: Tensor | None = None
    last: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Ask:
    """What a method that drops rows wants to see at the input of a decoder layer.

    Attributes:
        attention: "previous", as the layer before attended; "own", as this layer would attend to
            all rows that reach it; "" for none.
        queries: whose attention, averaged: the prompt's last token, or the raters
            (`Pruner.raters`).
        keys: whether the keys of the layer before are wanted.
    """

    attention: Literal["previous", "own", ""] = ""
    queries: Literal["last", "raters"] = "last"
    keys: bool = False


@dataclass(frozen=True)
class RowView:
    """The rows of a prompt that reach a decoder layer.

    V is the largest number of visual tokens that a sample still has, X of text tokens. Of text,
    only what this prompt brings is counted, not what a cache holds.

    Attributes:
        hidden: [B, V, D]; states of the visual tokens.
        images: [B, V] int64; image of each visual token, counted within its sample; -1 where a
            sample has fewer.
        counts: [B, I] int64; visual tokens that each image still has.
        before: [B, I] int64; visual tokens that it had at the first layer.
        text_hidden: [B, X, D]; states of the other tokens.
        text: [B, X] bool; False where a sample has fewer.
        after: [B, X] bool; text behind the sample's first visual token.
        attention: [B, V] float32; post-softmax attention that the asked queries pay to each visual
            token, averaged over heads and queries; None where not asked for.
        keys: [B, V, H · D] keys after rotary embedding, KV heads side by side; None likewise.
        text_keys: [B, X, H · D]; None likewise.
        depth: number of decoder layers, as `Pruner.asks` got it.
    """

    hidden: Tensor
    images: Tensor
    counts: Tensor
    before: Tensor
    text_hidden: Tensor
    text: Tensor
    after: Tensor
    attention: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    depth: int = 0


@dataclass(frozen=True)
class Rows:
    """Which rows go on.

    Attributes:
        kept: [B, V] bool; visual tokens that go on, all text does.
        states: [B, V, D] new states of the visual tokens; None leaves them.
        last: [B, V] bool; kept rows that come behind the other rows of their image (merged rows);
            None for none.
        members: [B, V] int64; the kept row (its place among V) that each token that does not go
            on went into, -1 for none; for pictures. None where nothing is merged.
    """

    kept: Tensor
    states: Tensor | None = None
    last: Tensor | None = None
    members: Tensor | None = None


@dataclass(frozen=True)
class FrameView:
    """The visual tokens of a prompt at a decoder layer that they may skip.

    V is the largest number of visual tokens of a sample. A frame is an image, or a frame of a
    video. While training, gradients flow through `hidden`.

    Attributes:
        hidden: [B, V, D]; states of the visual tokens.
        frames: [B, V] int64; frame of each visual token, counted within its sample; -1 where a
            sample has fewer.
        counts: [B, F] int64; visual tokens of each frame.
    """

    hidden: Tensor
    frames: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Routed:
    """Which visual tokens a decoder layer works on; the others pass it by unchanged.

    Attributes:
        kept: [B, V] bool.
        weight: [B, V]; factor of what the layer adds to a kept token's state: 1 is the layer as it
            is. None for 1 everywhere.
    """

    kept: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Probes:
    """The rows of a prompt whose attention a method sees before a layer attends.

    Attributes:
        recent: how many of the prompt's last tokens.
        random: how many of its other tokens, without replacement.
        seed: of the draw, which is the same on every device and for all layers of a prompt.
    """

    recent: int
    random: int
    seed: int = 0


@dataclass(frozen=True)
class LayerView:
    """The visual tokens of a prompt in one decoder layer, as prefill leaves it.

    Attributes:
        attention: [B, Hq, V] float32; post-softmax attention of each query head to each visual
            token, averaged over the last `window` tokens of the prompt; 0 where a row has fewer
            than V visual tokens.
        images: [B, V] int64; image of each visual token, counted within its row; -1 where a row
            has fewer.
        counts: [B, I] int64; visual tokens of each image; 0 where a row has fewer images.
        kv_heads: KV heads H, a divisor of Hq.
        others: [B] int64; tokens that stay whatever is chosen, added up over the KV heads.
        token_bytes: bytes of one token's key and value in one KV head.
        sums: [B, S] float32; attention that each of the prompt's S columns gets from the probe
            rows (`Pruner.probes`), averaged over the query heads and added up over the rows; 0 at
            padding. None where the method has no probes.
        seen: [B, S] int64; how many probe rows see each column; 0 at padding alone.
        places: [B, V] int64; column of each visual token.
    """

    attention: Tensor
    images: Tensor
    counts: Tensor
    kv_heads: int
    others: Tensor
    token_bytes: int
    sums: Tensor | None = None
    seen: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class Retention:
    """What a layer keeps.

    Attributes:
        kept: [B, H, V] bool.
        gamma: [B]; the layer's vision attention.
        rate: [B]; the retention rate asked for.
    """

    kept: Tensor
    gamma: Tensor
    rate: Tensor


@dataclass(frozen=True)
class Inside:
    """What a method does to crops of one size while the vision encoder runs.

    Attributes:
        merges: how many patches merge into others in each encoder layer, from the first to the
            one whose output the model takes as features; empty for none.
        grid: (rows, columns) of patches that the pixels are scaled down to; None leaves them.
        words: the same for people.
        alone: whether no other method chooses after it.
    """

    merges: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    words: str = ""
    alone: bool = True

    @property
    def acts(self) -> bool:
        """Whether there is anything to do."""
        return any(self.merges) or self.grid is not None
