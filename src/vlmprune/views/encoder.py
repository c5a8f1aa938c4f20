"""What a method sees of a vision encoder and chooses behind it: small bundles of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.select.budget import Budget, each_crop


@dataclass(frozen=True)
class Reads:
    """What a method reads of the vision encoder beside the family's own score and features.

    Layers are 0-based numbers of encoder layers.

    Attributes:
        layers: layers whose attention scores are wanted (the CLS token's row, else received).
        patches: the layer whose patch-to-patch attention is wanted, by its column and row means.
        keys: the layer whose keys are wanted, averaged over heads.
        joined: the layer whose attention scores and keys are wanted as if it had one head, whose
            queries and keys are those of all heads put end to end.
        projected: whether the projected features are wanted.
        relevance: "" for none; "auto", the likeness of each visual token to the question, by the
            model's own text tower where it has one, else by the language model's text
            embeddings; or the folder or id of a CLIP model whose text tower is to be used.
        asked: what of the prompt a text tower compares with: "bare", the question alone, without a
            template's words and a task's instruction; else all text behind the image.
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
    joined: int | None = None
    asked: Literal["", "bare", "prompt"] = ""

    @property
    def single(self) -> tuple[int | None, ...]:
        """The layers of which one at most is read each: patches, keys and joined heads."""
        return self.patches, self.keys, self.joined


@dataclass(frozen=True)
class EncoderView:
    """All crops of a request after the vision encoder, before the language model.

    A *cell* is one patch of one crop, numbered crop · N + patch. A frame of a video is a crop, and
    a video counts as an image. What a method did not ask for (`Pruner.reads`) is None or empty.

    Attributes:
        attention: [crops, N] float32; what each patch receives, averaged over heads.
        features: [crops, N, C]; encoder features before the projector.
        candidates: [crops, N] bool; patches that the language model would see, without those that
            left inside the encoder (`Pruner.inside`).
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
            (`Pruner.inside`), cells of a crop with the same number have the same features, and
            those that left have -1; None elsewhere.
        states: by encoder layer, [crops, N, C] the hidden states behind it, with gradients.
        question: [crops, D] the language model's state behind its last layer at the last token of
            the question that the crop's row asks, text alone, with gradients.
        semantic: [crops, M, C] the semantic tokens behind the layer of the features, with
            gradients.
        joined: [crops, N] float32; attention as in `attention`, of all heads as one.
        joined_keys: [crops, N, H · D] its keys, those of all heads put end to end.
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
    joined: Tensor | None = None
    joined_keys: Tensor | None = None

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
        last: [crops, N] bool; kept cells whose tokens come behind the other ones where positions
            are renumbered (`merging.order`); None for none.
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
class Inside:
    """What a method does to crops of one size while the vision encoder runs.

    Attributes:
        merges: how many patches merge into others in each encoder layer, from the first to the
            one whose output the model takes as features; empty for none.
        grid: (rows, columns) of patches that the pixels are scaled down to; None leaves them.
        words: the same for people.
        alone: whether no other method chooses after it.
        leaves: how many cells of a crop leave in each encoder layer, like `merges`.
        fuse: whether those that leave become one token more, which stays in the encoder.
    """

    merges: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    words: str = ""
    alone: bool = True
    leaves: tuple[int, ...] = ()
    fuse: bool = False

    @property
    def acts(self) -> bool:
        """Whether there is anything to do."""
        return any(self.merges) or any(self.leaves) or self.grid is not None
