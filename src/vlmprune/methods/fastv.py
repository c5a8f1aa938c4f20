"""FastV: past an early decoder layer, the visual tokens that the prompt's last token attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.layered import Layered
from vlmprune.select import row_rules
from vlmprune.select.settings import is_whole
from vlmprune.views import Ask, Rows, RowView


@dataclass(frozen=True)
class FastV(Layered):
    """Drop visual tokens once, before an early layer of the language model.

    The prompt's last token attended to some visual tokens in the layer before; the most attended
    go on, the rest leave. Heads are averaged.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for
    Large Vision-Language Models", arXiv 2403.06764 (ECCV 2024), section 4, where layer is K and
    the share that goes is R = 1 - keep.

    Attributes:
        keep: visual tokens of each image to keep: an int counts them, a float in (0, 1] is a
            fraction. The authors' default is half of them.
        layer: the 0-based layer before which tokens leave; 2 is the authors' default.
        positions: "original" keeps gaps (as the release does), "compact" renumbers, "auto" takes
            what the model's config recommends, else the release's.

    Where it deviates from the release: several images of a prompt share one budget, the sum of
    theirs, as all visual tokens of a prompt do there, and an image smaller than `keep` adds all
    it has; tokens leave with their keys and values, where the released code for one image either
    masks them or drops them without a cache; ties go to the lower index.

    Shapes: attention [B, V] → kept [B, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    layer: int = 2

    needs: ClassVar[str] = "attention of the prompt's last token in one decoder layer"
    stage: ClassVar[str] = "inside the language model"
    paper: ClassVar[str] = "arXiv 2403.06764"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.layer, 1):
            raise VlmpruneError(
                f"layer={self.layer!r} has no layer before it whose attention could rank tokens; "
                "use 2, the authors' default, or another layer from 1 on."
            )

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The attention of the layer before."""
        return {self.layer: Ask("previous")}

    def drop(self, layer: int, view: RowView) -> Rows:
        """The most attended of all visual tokens of each sample."""
        assert view.attention is not None
        keep = self.kept_of(view.before).sum(dim=1, keepdim=True)
        return Rows(row_rules.most_attended(view.attention, view.images.clamp(max=0), keep))
