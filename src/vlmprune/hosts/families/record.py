"""One model family: what the pruner must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from vlmprune.hosts.families.media import Medium


@dataclass(frozen=True)
class Family:
    """What the pruner must know of a model family.

    Attributes:
        name: as users call it.
        cls: the class of transformers.
        positions: what the authors' release of VisPruner does on this family, or what its
            position scheme allows.
        media: its modalities.
        score: the attention that scores visual tokens; a substitute where there is no CLS token.
        note: what a user should know, in a few words.
        rope: for models with three positions a column (temporal, height, width): (model, ids,
            mask, inputs of each modality, whether a plain forward asks) → [3, B, L], or None
            for those of text. Their positions are always original.
        first: where positions of a plain forward begin (in `generate` the host adds it itself).
        mixes: releases whose host does not keep packed samples apart whose columns come with types,
            and why.
        since: the first tested release of Transformers that has the class.
        counted: whether nothing is known but the placeholders, so that requests go to the host as
            they come, and methods inside the language model alone can act.
        fails: releases (a version specifier) with a fault that keeps the class from being pruned,
            and the fault, as it goes on after "where".
    """

    name: str
    cls: str
    positions: Literal["compact", "original"]
    media: tuple[Medium, ...]
    note: str
    score: str = "CLS attention; attention received where the tower has no CLS token"
    rope: Callable[..., Tensor | None] | None = None
    first: int = 0
    mixes: Mapping[str, str] = field(default_factory=dict)
    since: str = "5.16"
    counted: bool = False
    fails: Mapping[str, str] = field(default_factory=dict)

    @property
    def former(self) -> Mapping[str, str]:
        """What the host calls pixels that came under a name of before."""
        return {name: one.inputs[0] for one in self.media for name in one.replaced}
