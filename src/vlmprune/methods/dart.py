"""DART: a few visual tokens as pivots, and those that repeat them least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.layered import Layered
from vlmprune.select import row_rules
from vlmprune.select.settings import check_whole
from vlmprune.views import Ask, Rows, RowView


@dataclass(frozen=True)
class DART(Layered):
    """Drop visual tokens at one decoder layer that are near duplicates of a few pivots.

    Pivots are the visual tokens, and the text tokens behind the image, with the largest keys in
    the layer before, by L1 norm over all KV heads. One after the other takes the visual tokens
    whose states have the least cosine with its own; what nobody takes is dropped. No attention is
    read, so any attention kernel will do.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
    More", arXiv 2502.11494, section 3; details by ports of the authors' code.

    Attributes:
        keep: visual tokens of each image that go on: an int counts them, a float in (0, 1] is a
            fraction.
        positions: "compact" renumbers the tokens that go on, "original" keeps gaps, as the release
            does; "auto" takes what the model's config recommends, else "original".
        layer: decoder layer that is the first to see fewer; 2 is the authors' (5 also used).
        image_pivots: visual pivots of each image; 4 is the authors'.
        text_pivots: text pivots of each sample; 4 is the authors'.

    Where it deviates from the release: exactly `keep` tokens go on, pivots counted, of which each
    pivot takes an equal share and the first ones one more where it does not divide (the release
    gives each floor(keep / 8) and adds the visual pivots on top, four more in all); pivots take
    turns in prompt order, visual ones first (the release: in the order of a Python set); cosines
    are of the states as they enter the layer, in float32 (the release passes them through the
    model's last norm first); every image has pivots and a budget of its own; a short prompt has
    fewer text pivots, and a budget below 4 fewer visual ones.

    Shapes: states [B, V, D], keys [B, V, H · D] → kept [B, V].

    Raises:
        VlmpruneError: a value is out of range, or the model has no such layer.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    needs: ClassVar[str] = "states and keys of one decoder layer"
    paper: ClassVar[str] = "arXiv 2502.11494"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            check_whole(name, getattr(self, name), least)

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The one layer, where it wants the keys of the layer before."""
        if self.layer >= depth:
            raise VlmpruneError(
                f"layer={self.layer} is not among this model's {depth} decoder layers; use 1 to "
                f"{depth - 1}."
            )
        return {self.layer: Ask(keys=True)}

    def drop(self, layer: int, view: RowView) -> Rows:
        """Keep pivots and what is least like them."""
        assert view.keys is not None and view.text_keys is not None
        kept = row_rules.unlike_pivots(
            view.hidden,
            view.images,
            view.keys.float().abs().sum(dim=2),
            view.text_hidden,
            view.text_keys.float().abs().sum(dim=2),
            view.text & view.after,
            self.kept_of(view.before).minimum(view.counts),
            self.image_pivots,
            self.text_pivots,
        )
        return Rows(kept)
