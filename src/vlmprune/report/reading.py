"""What a cache that is read in part holds, and what each decode step read of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.costs import units


@dataclass(eq=False)
class StepRead:
    """What one decode step read of the visual tokens, all samples and layers together.

    Attributes:
        bytes_read: of their keys, values and sketches.
        bytes_fetched: of these, from host memory to the device of the computation.
        bytes_dense: what reading all of them would have taken.
        index: by decoder layer [B, H, k] int32, on request; places of what each KV head read among
            the layer's visual tokens, -1 where one read fewer.
        mass: by decoder layer [B], on request; share of attention, 0 to 1, averaged over the query
            heads, that fell on what was read, text and later tokens among it.
    """

    bytes_read: int = 0
    bytes_fetched: int = 0
    bytes_dense: int = 0
    index: dict[int, Tensor] = field(repr=False, default_factory=dict)
    mass: dict[int, list[float]] = field(repr=False, default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Where an image's visual tokens stand among those of its sample.

    Attributes:
        row: the sample.
        places: [n] int64 among the layer's visual tokens.
        numbers: [n] int64 their numbers among those that the image would have without any pruning.
        total: how many it would have.
    """

    row: int
    places: Tensor
    numbers: Tensor
    total: int


@dataclass(eq=False)
class Reading:
    """The visual tokens of a call under a method that reads a few of them at each step.

    `steps` grows as the cache is gone on with, by `generate` or by hand.

    Attributes:
        layers: numbers of the decoder layers that are read in part.
        read: for each sample, how many tokens of each image a KV head reads at a step.
        dense_bytes: of all visual tokens' keys and values in these layers, uncompressed.
        device_bytes: of what lies on the device of the computation for them, sketches included.
        host_bytes: of what lies in host memory.
        sketch_bytes: of the sketches, and of the sums of values from which the token is made that
            stands for what a step does not read.
        aside: how many of the layers read everything at each step, as that is faster there.
        steps: what each step read, in order.
        images: where the call's images stand.
        rows: samples of the request; a step may have several rows of each (beams).
        own: share of the visual tokens held that the call brought; the others are of earlier turns.
        watch: what is noted of steps beside bytes: "" nothing, "tokens" which were read, "mass"
            also the share of attention that fell on them.
    """

    layers: tuple[int, ...]
    read: list[list[int]]
    dense_bytes: int
    device_bytes: int
    host_bytes: int
    sketch_bytes: int
    steps: list[StepRead] = field(repr=False, default_factory=list)
    images: Sequence[ImageTokens] = field(repr=False, default_factory=tuple)
    rows: int = 1
    own: float = 1.0
    watch: str = ""
    aside: int = 0
    _last: int = field(repr=False, default=-1)

    def step_of(self, layer: int) -> StepRead:
        """The step that a decoder layer belongs to whose turn it is: a new one behind the last."""
        if not self.steps or layer <= self._last:
            self.steps.append(StepRead())
        self._last = layer
        return self.steps[-1]

    @property
    def share_read(self) -> float | None:
        """Bytes of visual tokens that the steps read, sketches too, as a share of all of them."""
        return self._share(step.bytes_read for step in self.steps)

    @property
    def share_fetched(self) -> float | None:
        """Bytes that the steps moved from host memory, as a share of all visual tokens'."""
        return self._share(step.bytes_fetched for step in self.steps)

    def _share(self, some: Iterable[int]) -> float | None:
        dense = sum(step.bytes_dense for step in self.steps)
        return sum(some) / dense if dense else None

    @property
    def share_of_attention(self) -> float | None:
        """Attention that fell on what was read, averaged over steps, layers and samples."""
        found = [one for step in self.steps for row in step.mass.values() for one in row]
        return sum(found) / len(found) if found else None

    def lit(self, step: int) -> list[Tensor]:
        """For each image of the call, how much of it a step read.

        Args:
            step: its number.

        Returns:
            [n] float32 over the visual tokens that the image would have without any pruning: the
            share of the KV heads of `layers` that read the token, of beams those of the first; 0
            where it was not watched.
        """
        index = self.steps[step].index
        out = [torch.zeros(image.total) for image in self.images]
        heads = sum(one.shape[1] for one in index.values())
        for read in index.values():
            times = max(1, len(read) // self.rows)
            for image, found in zip(self.images, out, strict=True):
                if image.row * times >= len(read):
                    # Samples were taken out of the cache meanwhile.
                    continue
                own = read[image.row * times].flatten().long()
                longest = int(torch.cat((own, image.places)).max()) + 1
                hits = torch.bincount(own[own >= 0], minlength=longest).float()
                found.index_add_(0, image.numbers, hits[image.places] / heads)
        return out

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; which tokens were read is left to `lit`."""
        return {
            "layers": list(self.layers),
            "read": self.read,
            "dense_bytes": self.dense_bytes,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "sketch_bytes": self.sketch_bytes,
            "aside": self.aside,
            "share_read": self.share_read,
            "share_fetched": self.share_fetched,
            "share_of_attention": self.share_of_attention,
            "steps": [
                {
                    "bytes_read": step.bytes_read,
                    "bytes_fetched": step.bytes_fetched,
                    "bytes_dense": step.bytes_dense,
                    "mass": {str(layer): mass for layer, mass in step.mass.items()},
                }
                for step in self.steps
            ],
        }

    def __str__(self) -> str:
        said = [f"{len(self.layers) - self.aside} layers read in part"]
        if self.aside:
            said.append(f"{self.aside} whole, which is faster there")
        if self.share_read is not None:
            said.append(f"{units.percent(self.share_read)} of the visual bytes a step")
        if self.share_of_attention is not None:
            said.append(f"{units.percent(self.share_of_attention)} of the attention")
        if self.host_bytes:
            said.append(f"{units.mib(self.host_bytes)} MiB in host memory")
        return ", ".join(said)
