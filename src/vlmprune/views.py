"""What a method sees and returns: small bundles of tensors, no class of any host.

Imports no library but torch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.budget import Budget, each_crop


@dataclass(frozen=True)
class EncoderView:
    """All crops of a request after the vision encoder, before the language model.

    A *cell* is one patch of one crop, numbered crop · N + patch. A frame of a video is a crop, and
    a video counts as an image.

    Attributes:
        attention: [crops, N] float32; what each patch receives, averaged over heads.
        features: [crops, N, C]; encoder features before the projector.
        candidates: [crops, N] bool; patches that the language model would see.
        images: for each crop, the number of its image in the request.
    """

    attention: Tensor
    features: Tensor
    candidates: Tensor
    images: tuple[int, ...]

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
class Selection:
    """What a method chose.

    Attributes:
        kept: [crops, N] bool.
        roles: [crops, N] bool by name, for pictures; disjoint parts of `kept`.
    """

    kept: Tensor
    roles: dict[str, Tensor]


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
    """

    attention: Tensor
    images: Tensor
    counts: Tensor
    kv_heads: int
    others: Tensor
    token_bytes: int


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
