"""What the cache of a decoder layer keeps of a prompt, and which visual tokens reach a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmprune.costs import units


@dataclass(frozen=True)
class LayerReport:
    """What one decoder layer's cache keeps of a prompt.

    Attributes:
        index: number of the layer.
        gamma: for each sample, its vision attention, 0 to 1; None for one without images.
        retention: for each sample, the retention rate asked for; None likewise.
        mask: [B, H, V] bool; what each KV head keeps of the sample's visual tokens.
        images: [B, V] int64; image of each visual token within its sample; -1 where a sample has
            fewer than V.
        bytes_before: of the layer's whole prompt, text and padding included, uncut.
        bytes_after: of all tensors that the layer holds after the cut.
        kv_bytes: of the visual tokens' keys and values after the cut.
        numbers: for each sample, [v] the number of each of its visual tokens among those that it
            would have without any pruning; None where nothing was pruned before.
        flops_saved: by attention among what is kept, of a method that acts on prefill too.
    """

    index: int
    gamma: list[float | None]
    retention: list[float | None]
    mask: Tensor = field(repr=False)
    images: Tensor = field(repr=False)
    bytes_before: int
    bytes_after: int
    kv_bytes: int
    numbers: list[Tensor] | None = field(repr=False, default=None)
    flops_saved: float = 0.0

    @property
    def kept(self) -> list[list[Tensor]]:
        """For each KV head one [k] int64 a sample: ascending numbers of the visual tokens kept.

        They count all visual tokens of the sample's prompt, its images one after the other, as
        the language model would have seen them without any pruning.
        """
        mask = self.mask.cpu()
        found = [
            [mask[row, head].nonzero()[:, 0] for row in range(len(mask))]
            for head in range(mask.shape[1])
        ]
        if self.numbers is None:
            return found
        # A method may have put tokens of an image behind others.
        return [
            [self.numbers[row][at].sort().values for row, at in enumerate(head)] for head in found
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; of `kept` the numbers of tokens, head by sample."""
        return {
            "layer": self.index,
            "gamma": self.gamma,
            "retention": self.retention,
            "kept": self.mask.sum(dim=2).transpose(0, 1).tolist(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class RowsReport:
    """Which visual tokens reach one decoder layer, where not all of them do.

    Attributes:
        index: number of the layer.
        kept: for each image, ascending indices [k] int64, as in `Report`.
        kv_bytes: of their keys and values in that layer; NaN where that is unknown.
    """

    index: int
    kept: list[Tensor] = field(repr=False)
    kv_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; of `kept` the numbers of tokens, image by image."""
        return {
            "layer": self.index,
            "kept": [len(one) for one in self.kept],
            "kv_bytes": units.ready(self.kv_bytes),
        }
