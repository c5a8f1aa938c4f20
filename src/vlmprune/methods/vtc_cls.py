"""VTC-CLS: the visual tokens that the CLS token attends to over several encoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune import select
from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import scoring
from vlmprune.select.settings import is_whole
from vlmprune.views import EncoderView, Reads, Selection


@dataclass(frozen=True)
class VtcCls(Budgeted):
    """Keep the visual tokens of most CLS attention, summed over the encoder's later layers.

    Paper: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    arXiv 2412.05819, section 3; the rule is that of the authors' code, in float32.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        budget: "crop" gives each crop the same number of tokens, "image" shares one number among
            all crops of an image; of a video "frame" and "clip".
        first_layer: 0-based encoder layer from which on attention is summed, up to the last but
            one; the last is left out. None takes layer 16 of 24, the default of the authors'
            evaluation, and the same share of other depths, which is our reading.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: it takes several crops and images; ties go to the lower
    index; padding that the host cuts away is never chosen, newline tokens are by default kept and
    not counted; an encoder without a CLS token is scored by the attention that patches receive.

    Shapes: attention [crops, N] of each layer → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    first_layer: int | None = None

    needs: ClassVar[str] = "CLS attention of several encoder layers (else attention received)"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2412.05819"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.first_layer
        if first is not None and not is_whole(first):
            raise VlmpruneError(f"first_layer={first!r} is not a whole number.")
        if first is not None and first < 0:
            raise VlmpruneError(f"first_layer={first} is below 0; layers are counted from 0.")

    def summed(self, depth: int) -> range:
        """The encoder layers whose attention is summed.

        Raises:
            VlmpruneError: `first_layer` leaves none.
        """
        last = max(depth - 1, 1)
        if self.first_layer is None:
            return range(min(depth * 16 // 24, last - 1), last)
        if self.first_layer >= last:
            raise VlmpruneError(
                f"first_layer={self.first_layer} leaves no layer to sum in an encoder of {depth} "
                f"layers, the last of which is left out; use at most {last - 1}."
            )
        return range(self.first_layer, last)

    def reads(self, depth: int, feature: int) -> Reads:
        """Attention of the layers from `first_layer` on.

        The last is asked for as well, and not summed: it tells `select` how many there are, also
        where the stages of a chain ask for more.
        """
        return Reads(layers=tuple(sorted({*self.summed(depth), depth - 1})))

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        layers = self.summed(max(view.layers) + 1)
        scores = scoring.summed([view.layers[layer] for layer in layers]).flatten()
        kept = self.each(view, lambda cells, keep: select.top_k(scores[cells], keep))
        return Selection(kept, {"important": kept})
