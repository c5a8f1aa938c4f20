"""Two controls for PLPHP, and vlmprune's commands with these among the methods.

    python benchmarks/retention.py eval --method "random_heads:r=0.4,alpha=0.958,beta=0.317"
    python benchmarks/retention.py compare --methods plphp:r=0.4,random_heads:r=0.4

Both keep as many bytes as PLPHP with the same settings, so what PLPHP has beyond them comes from
which tokens its heads choose. A third control needs no code: one rate for all layers is
`plphp:r=SHARE,dr=0`, with SHARE the part of the visual KV bytes that PLPHP came to.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune import METHODS, PLPHP
from vlmprune.cli import main
from vlmprune.select import retention
from vlmprune.spec import CONTROL
from vlmprune.views import LayerView, Retention


@dataclass(frozen=True)
class Control(PLPHP):
    """As many tokens of each image as PLPHP keeps, by scores of a subclass's own."""

    paper: ClassVar[str] = CONTROL

    def scores(self, view: LayerView, heads: int) -> Tensor:
        """[B, heads, V]: of each image the tokens with the largest are kept."""
        raise NotImplementedError

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """PLPHP's rates, and other tokens."""
        found = super().retain(layer, view)
        if found is None:
            return None
        # Of each image what the first head keeps; the others keep as many.
        counts = torch.zeros_like(view.counts)
        counts.scatter_add_(1, view.images.clamp(min=0), found.kept[:, 0].long())
        scores = self.scores(view, found.kept.shape[1])
        return replace(found, kept=retention.per_image(scores, view.images, counts))


@dataclass(frozen=True)
class RandomHeads(Control):
    """PLPHP's rates, but each head keeps random tokens of each image.

    Each layer draws anew by the seed and by its attention, so that the same questions always draw
    the same tokens.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def scores(self, view: LayerView, heads: int) -> Tensor:
        """Drawn for each sample and head."""
        content = view.attention.float().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed))
        samples, _, tokens = view.attention.shape
        drawn = torch.rand(samples, heads, tokens, generator=generator)
        return drawn.to(view.attention.device)


@dataclass(frozen=True)
class OneChoice(Control):
    """PLPHP's rates, but all heads of a layer keep the same tokens."""

    def scores(self, view: LayerView, heads: int) -> Tensor:
        """The attention that the layer's heads pay on average."""
        return view.attention.mean(dim=1, keepdim=True).expand(-1, heads, -1)


if __name__ == "__main__":
    METHODS.update(random_heads=RandomHeads, one_choice=OneChoice)
    main()
