"""Videos of placed patches, frame by frame."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import packing
from vlmprune.hosts.families.media import Inputs, needs
from vlmprune.hosts.families.placed import Placed

# How many frames each video has, where a release takes the frames of all behind one another.
_FRAMES = "num_frames_per_video"


class PlacedFrames(Placed):
    """Videos frame by frame: behind one another or, in early releases, [videos, frames, …].

    Attributes:
        cls: the host's class.
    """

    kind: ClassVar[Literal["image", "video"]] = "video"
    token = "video_token_id"
    method = "get_video_features"
    places = "video_position_ids"
    overlay = ""
    cls: ClassVar[str]

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """With the number of frames of each video, where a release asks for it."""
        return ("pixel_values_videos", self.places, *[_FRAMES] * packing.takes(self.cls, _FRAMES))

    def frames(self, inputs: Inputs) -> list[int]:
        """Frames of each video.

        Raises:
            VlmpruneError: their numbers are missing, or do not add up.
        """
        pixels = inputs[self.inputs[0]]
        if _FRAMES not in self.inputs:
            return [pixels.shape[1]] * pixels.shape[0]
        counts = [int(n) for n in needs(inputs, _FRAMES, self.inputs[0])]
        if sum(counts) != len(pixels):
            raise VlmpruneError(
                f"{_FRAMES} counts {sum(counts)} frames but {len(pixels)} came; pass what the "
                "model's own processor returns."
            )
        return counts

    def after(self, model: Any, inputs: Inputs, known: int) -> dict[str, Any]:
        """The inputs without the frames of the first `known` videos."""
        pixels, places, *rest = self.inputs
        first = sum(self.frames(inputs)[:known]) if rest else known
        kept = {name: inputs[name][first:] for name in (pixels, places)}
        return kept | {name: inputs[name][known:] for name in rest}
