"""PyramidDrop: the same share of the visual tokens leaves at every stage of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.layered import check_layers
from vlmprune.pruner import Pruner
from vlmprune.select import row_rules
from vlmprune.select.settings import check_choice, check_share, is_whole
from vlmprune.views import Ask, Rows, RowView
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Drop visual tokens in stages, fewer and fewer the deeper the layer.

    The language model is cut into stages of equal depth. Between two of them the prompt's last
    token ranks the visual tokens, by the attention that it would pay them in the next layer,
    averaged over heads; of each image the best go on.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", arXiv 2410.17247 (CVPR 2025), section 3.2.

    Attributes:
        ratio: share of its visual tokens that goes on from each stage; 0.5 is the authors'.
        stages: how often tokens leave; 3 is the authors': after layers 8, 16 and 24 of 32, which
            keep 50, 25 and 12.5 %. Models of other depth are cut in the same proportion (our
            reading), rounded down.
        positions: "compact" renumbers the tokens that go on (as the release does), "original"
            keeps gaps, "auto" takes what the model's config recommends, else the release's.

    New tokens count on from the renumbered prompt, in each layer, as in the release.

    Where it deviates from the release: every image of a prompt keeps its share, at least one
    token, where the release knows one image; while training, too, the prompt's last token ranks,
    where the release takes those before answers; ties go to the lower index.

    Shapes: attention [B, V] → kept [B, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    ratio: float = 0.5
    stages: int = 3
    positions: Positions = "auto"

    needs: ClassVar[str] = "attention of the prompt's last token in the next decoder layer"
    stage: ClassVar[str] = "inside the language model"
    paper: ClassVar[str] = "arXiv 2410.17247"
    released: ClassVar[Literal["compact", "original"]] = "compact"

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "0.5, the authors' value", zero=False)
        if not is_whole(self.stages, 1):
            raise VlmpruneError(
                f"stages={self.stages!r} is no number of stages; use 3, the authors' value."
            )
        check_choice("positions", self.positions, Positions)

    def layers(self, depth: int) -> list[int]:
        """The layers before which tokens leave, in a model of that depth."""
        return [depth * number // (self.stages + 1) for number in range(1, self.stages + 1)]

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The attention of the layer that comes."""
        check_layers(depth, self.stages + 1, repr(self))
        return {layer: Ask("own") for layer in self.layers(depth)}

    def drop(self, layer: int, view: RowView) -> Rows:
        """The best of each image."""
        assert view.attention is not None
        # Rounded down, as in the release; with room for float32's error in shares such as 0.7.
        keep = (view.counts * self.ratio + 1e-4).floor().long().clamp(min=1)
        keep = keep.minimum(view.counts)
        return Rows(row_rules.most_attended(view.attention, view.images, keep))
