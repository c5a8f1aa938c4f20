"""EViT: tokens that the CLS token attends to least leave the vision encoder, three times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import WithBudget
from vlmprune.select import leaving
from vlmprune.select.budget import Budget, each_crop
from vlmprune.select.settings import is_whole
from vlmprune.views import EncoderView, Inside, Selection
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class EViT(WithBudget):
    """Drop tokens inside the vision encoder, without training and without the question.

    Between the attention and the MLP of a few encoder layers those patches leave that the CLS token
    attends to least, averaged over heads. What left becomes one token more, the sum of the others
    weighted by that attention, which later layers see.

    Paper: "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", arXiv 2202.07800 (ICLR 2022), section 3; ranks and weights as in the authors'
    code.

    Attributes:
        keep: tokens of a crop that are left: an int counts them, a float in (0, 1] is a fraction.
            The authors set the share that stays each time instead; here it follows from `keep` and
            is the same every time, rounded up.
        layers: 0-based encoder layers in which tokens leave, rising, also given as text, as in
            "3;6;9"; None takes the authors' after a quarter, a half and three quarters of the
            layers up to the one whose output the language model gets: 3, 6 and 9 of 12.
        fuse: whether those that leave become one token, as in the paper. It stays inside the
            encoder and does not count.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" (of a video "frame") alone, for crops do not see each other.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: a tower without a CLS token (SigLIP) ranks by the attention
    that a patch receives from all tokens, averaged. The one token made of others goes into the next
    one whatever it is attended to, where the release ranks it with the patches; so exactly `keep`
    patches are left. Where a host makes one visual token of several patches, these stay or leave
    together, by their mean. The release trains a model in which tokens leave; here a model that was
    trained without sees fewer. Dropping does not know what the host cuts away afterwards:
    padding takes part, so that any-resolution images may keep fewer. Attention is float32 in any
    model, and ties go to the lower index. Towers of CLIP, SigLIP, DINOv2 and InternVL with
    attention by SDPA or eager; other towers, and models that blend neighbouring patches, are
    refused.

    Shapes: attention [crops, tokens] of the layers → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range or out of reach; one sentence names it.
    """

    keep: int | float
    layers: tuple[int, ...] | None = None
    fuse: bool = True
    positions: Positions = "auto"
    budget: Budget = "crop"

    needs: ClassVar[str] = (
        "CLS attention (else attention received); layers of CLIP, SigLIP, DINOv2 or InternVL"
    )
    stage: ClassVar[str] = "inside the vision encoder"
    paper: ClassVar[str] = "arXiv 2202.07800"
    text_agnostic: ClassVar[bool] = True

    acts = "dropping"
    instead = "choose a method that acts after it, such as VisPruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _layers(self.layers))
        if not isinstance(self.fuse, bool):
            raise VlmpruneError(f"fuse={self.fuse!r} is not known; use True or False.")
        if not each_crop(self.budget):
            raise VlmpruneError(
                f"budget={self.budget!r} is not for EViT, which drops within a crop; use "
                "budget='crop', or 'frame' for videos."
            )

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """Spread what is to leave over the layers."""
        chosen = leaving.spread(layers) if self.layers is None else self.layers
        if chosen[-1] >= layers:
            raise VlmpruneError(
                f"layers={self.layers!r} name encoder layer {chosen[-1]}, but the language model "
                f"gets what layer {layers - 1} makes; use layers up to that."
            )
        tokens = grid[0] * grid[1]
        counts = leaving.leaves(tokens, self.kept_of(tokens), len(chosen))
        goes = dict(zip(chosen, counts, strict=True))
        told = [str(layer) for layer, count in goes.items() if count]
        words = f"attention in encoder layers {', '.join(told)}" if told else "nothing dropped"
        return Inside(
            leaves=tuple(goes.get(layer, 0) for layer in range(layers)), words=words, fuse=self.fuse
        )

    def select(self, view: EncoderView) -> Selection:
        """What is left."""
        return Selection(view.candidates, {"attended": view.candidates})


def _layers(given: Any) -> tuple[int, ...] | None:
    """The setting `layers` as it is held.

    Raises:
        VlmpruneError: it is something else.
    """
    if given is None:
        return None
    found: Any = given
    if isinstance(given, str):
        found = [int(part) if part.strip().isdecimal() else part for part in given.split(";")]
    elif not isinstance(given, Sequence):
        found = [given]
    rising = all(is_whole(one, 0) for one in found) and sorted(set(found)) == list(found)
    if not rising or not found:
        raise VlmpruneError(
            f"layers={given!r} are no rising numbers of encoder layers; use None, or for example "
            "(3, 6, 9)."
        )
    return tuple(map(int, found))
