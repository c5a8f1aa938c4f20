"""A sketch of keys: a few bits a value, from which a query's products with them are guessed.

Real keys have channels that stand far from zero, or vary far more than the others, and a plain
grid of few levels would spend them all on those. So keys are centred by channel, which changes no
softmax, and scaled by channel; what is left takes few bits a value and one scale a token. The
query's product with the means is added back, so that guessed scores stand beside those of keys
that have no sketch. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.select.recall import products

Kind = Literal["int2", "int4", "int8", "exact"]
BITS = {"int2": 2, "int4": 4, "int8": 8}
# Distance of the levels at which a normal distribution loses least, in its deviations; eight bits
# reach from the least value to the largest.
_STEP = {2: 0.9957, 4: 0.3352}
_BYTE = 8


@dataclass(frozen=True, eq=False)
class Sketch:
    """Keys in few bits.

    A level is `(code - (2 ** bits - 1) / 2) * scale`, in units of the channel's deviation from its
    mean.

    Attributes:
        codes: [B, H, V, W] uint8, W = ceil(D · bits / 8); the code of channel i · W + j is in the
            bits from `i * bits` on of byte j. Channels beyond D are codes of anything. As int8
            each byte is 128 less, which is how a CPU takes products with them.
        scale: [B, H, V] float16; distance of a token's levels. 0 where there is no token.
        mean: [B, H, D] float32; of each channel over the tokens.
        channel: [B, H, D] float32; its deviation from that.
        bits: 2, 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    mean: Tensor
    channel: Tensor
    bits: int

    @classmethod
    def of(cls, keys: Tensor, real: Tensor, bits: int) -> Sketch:
        """Sketch keys.

        Args:
            keys: [B, H, V, D], after rotary embedding.
            real: [B, V] bool; False where a sample has fewer tokens.
            bits: 2, 4 or 8.
        """
        seen = real[:, None, :, None]
        tokens = seen.sum(dim=2).clamp(min=1)
        keys = keys.float()
        mean = keys.masked_fill(~seen, 0.0).sum(dim=2) / tokens
        left = (keys - mean[:, :, None]).masked_fill_(~seen, 0.0)
        channel = (left.square().sum(dim=2) / tokens).sqrt()
        # A channel that never changes has nothing left, whatever it is divided by.
        left /= torch.where(channel > 0, channel, 1.0)[:, :, None]
        if bits == _BYTE:
            step = left.abs().amax(dim=3) * (2 / (2**bits - 1))
        else:
            step = left.square().mean(dim=3).sqrt() * _STEP[bits]
        scale = step.to(torch.float16)
        step = torch.where(scale > 0, scale, 1.0).float()
        codes = (left / step[..., None] + 2 ** (bits - 1)).floor_().clamp_(0, 2**bits - 1)
        return cls(packed(codes.to(torch.uint8), bits), scale, mean, channel, bits)

    @property
    def width(self) -> int:
        """Channels D of the keys."""
        return self.mean.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = self.codes, self.scale, self.mean, self.channel
        return sum(int(tensor.nbytes) for tensor in tensors)

    def levels(self) -> Tensor:
        """[B, H, V, D] float32; the keys, centred and scaled by channel, as the sketch has them."""
        codes = unpacked(_turned(self.codes, torch.uint8), self.bits)[..., : self.width].float()
        return (codes - (2**self.bits - 1) / 2) * self.scale[..., None].float()

    def keys(self) -> Tensor:
        """[B, H, V, D] float32; the keys as the sketch has them."""
        return self.levels() * self.channel[:, :, None] + self.mean[:, :, None]

    def signed(self) -> Sketch:
        """The same with codes in int8."""
        return replace(self, codes=_turned(self.codes, torch.int8))

    def scores(self, query: Tensor, scale: float) -> Tensor:
        """Guesses of a query's products with the keys, scaled.

        Args:
            query: [B, Hq, D], Hq a multiple of H.
            scale: factor of the products.

        Returns:
            [B, Hq, V] float32.
        """
        return products(query, self.keys(), scale)

    def select(self, rows: Tensor) -> Sketch:
        """The samples at `rows` [B'], in their order."""
        return self._each(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def to(self, device: torch.device, non_blocking: bool = False) -> Sketch:
        """The same on another device, codes in int8 where that is the CPU, else in uint8."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        wanted = torch.int8 if device.type == "cpu" else torch.uint8
        return replace(moved, codes=_turned(moved.codes, wanted))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Sketch:
        codes, scale, mean, channel = map(change, (self.codes, self.scale, self.mean, self.channel))
        return replace(self, codes=codes, scale=scale, mean=mean, channel=channel)


def _turned(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of `Sketch.codes` as uint8 or, 128 less, as int8."""
    if codes.dtype == dtype:
        return codes
    return (codes.view(torch.uint8) ^ 128).view(dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] uint8 below 2 ** bits as [..., W] bytes, as `Sketch.codes` has them."""
    each = _BYTE // bits
    width = -(-codes.shape[-1] // each)
    padded = torch.nn.functional.pad(codes, (0, each * width - codes.shape[-1]))
    out = padded[..., :width].clone()
    for place in range(1, each):
        out |= padded[..., place * width : (place + 1) * width] << (place * bits)
    return out


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., W] as codes [..., W · 8 / bits] uint8, those beyond D included."""
    each, most = _BYTE // bits, 2**bits - 1
    return torch.cat([(codes >> (place * bits)) & most for place in range(each)], dim=-1)
