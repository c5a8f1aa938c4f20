"""DART: a few visual tokens as pivots, and those that repeat them least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
    whose states have the least cosine with its own, as the norm behind the last layer leaves them;
    what nobody takes is dropped. Visual pivots have their turns before text pivots, both in prompt
    order. No attention is read, so any attention kernel will do.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
    More", arXiv 2502.11494, section 3; the rule is that of the authors' code, whose choice it
    equals in float32 where the budget divides and their pivots take turns in the same order.

    Attributes:
        keep: visual tokens of each image that go on: an int counts them, a float in (0, 1] is a
            fraction.
        positions: "compact" renumbers the tokens that go on, "original" keeps gaps, as the release
            does; "auto" takes what the model's config recommends, else "original".
        layer: decoder layer that is the first to see fewer; 2 is the authors' (5 also used).
        image_pivots: visual pivots of each image; 4 is the authors'.
        text_pivots: text pivots of each sample; 4 is the authors'.
        normed: whether cosines are of states behind the model's final norm, as in the release;
            False takes them as they enter the layer, as vlmprune 0.1 did.

    Where it deviates from the release: exactly `keep` tokens go on, pivots counted, of which each
    pivot takes an equal share and the first ones one more where it does not divide (the release
    gives each floor(keep / 8) and adds the visual pivots on top, four more in all); pivots take
    turns in the order above (the release: in the order in which CPython walks a set of their
    places, by the remainder of 32 as a rule); cosines are float32; every image has pivots and a
    budget of its own; a short prompt has fewer text pivots, and a budget below 4 fewer visual ones.

    Shapes: states [B, V, D], keys [B, V, H · D] → kept [B, V].

    Raises:
        VlmpruneError: a value is out of range, or the model has no such layer.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    normed: bool = True

    needs: ClassVar[str] = "states and keys of one decoder layer"
    paper: ClassVar[str] = "arXiv 2502.11494"
    former: ClassVar[Mapping[str, Any]] = {"normed": False}
    added: ClassVar[Mapping[str, Any]] = {"normed": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            check_whole(name, getattr(self, name), least)
        if not isinstance(self.normed, bool):
            raise VlmpruneError(f"normed={self.normed!r} is neither true nor false.")

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The one layer, where it wants the keys of the layer before."""
        if self.layer >= depth:
            raise VlmpruneError(
                f"layer={self.layer} is not among this model's {depth} decoder layers; use 1 to "
                f"{depth - 1}."
            )
        return {self.layer: Ask(keys=True, normed=self.normed)}

    def drop(self, layer: int, view: RowView) -> Rows:
        """Keep pivots and what is least like them."""
        assert view.keys is not None and view.text_keys is not None
        states, text_states = view.hidden, view.text_hidden
        if self.normed:
            assert view.normed is not None and view.text_normed is not None
            states, text_states = view.normed, view.text_normed
        kept = row_rules.unlike_pivots(
            states,
            view.images,
            view.keys.float().abs().sum(dim=2),
            text_states,
            view.text_keys.float().abs().sum(dim=2),
            view.text & view.after,
            self.kept_of(view.before).minimum(view.counts),
            self.image_pivots,
            self.text_pivots,
        )
        return Rows(kept)
