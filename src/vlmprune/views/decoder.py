"""What a method sees of a decoder layer and chooses there: small bundles of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Ask:
    """What a method that drops rows wants to see at the input of a decoder layer.

    Attributes:
        attention: "previous", as the layer before attended; "own", as this layer would attend to
            all rows that reach it; "" for none.
        queries: whose attention, averaged: the prompt's last token, or the raters
            (`Pruner.raters`).
        keys: whether the keys of the layer before are wanted.
        normed: whether states behind the norm that follows the last layer are wanted.
    """

    attention: Literal["previous", "own", ""] = ""
    queries: Literal["last", "raters"] = "last"
    keys: bool = False
    normed: bool = False


@dataclass(frozen=True)
class RowView:
    """The rows of a prompt that reach a decoder layer.

    V is the largest number of visual tokens that a sample still has, X of text tokens. Of text,
    only what this prompt brings is counted, not what a cache holds.

    Attributes:
        hidden: [B, V, D]; states of the visual tokens.
        images: [B, V] int64; image of each visual token, counted within its sample; -1 where a
            sample has fewer.
        counts: [B, I] int64; visual tokens that each image still has.
        before: [B, I] int64; visual tokens that it had at the first layer.
        text_hidden: [B, X, D]; states of the other tokens.
        text: [B, X] bool; False where a sample has fewer.
        after: [B, X] bool; text behind the sample's first visual token.
        attention: [B, V] float32; post-softmax attention that the asked queries pay to each visual
            token, averaged over heads and queries; None where not asked for.
        keys: [B, V, H · D] keys after rotary embedding, KV heads side by side; None likewise.
        text_keys: [B, X, H · D]; None likewise.
        depth: number of decoder layers, as `Pruner.asks` got it.
        normed: [B, V, D]; `hidden` as the norm behind the last layer would leave it; None where
            not asked for.
        text_normed: [B, X, D]; `text_hidden` likewise.
    """

    hidden: Tensor
    images: Tensor
    counts: Tensor
    before: Tensor
    text_hidden: Tensor
    text: Tensor
    after: Tensor
    attention: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    depth: int = 0
    normed: Tensor | None = None
    text_normed: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Which rows go on.

    Attributes:
        kept: [B, V] bool; visual tokens that go on, all text does.
        states: [B, V, D] new states of the visual tokens; None leaves them.
        last: [B, V] bool; kept rows that come behind the other rows of their image (merged rows);
            None for none.
        members: [B, V] int64; the kept row (its place among V) that each token that does not go
            on went into, -1 for none; for pictures. None where nothing is merged.
    """

    kept: Tensor
    states: Tensor | None = None
    last: Tensor | None = None
    members: Tensor | None = None


@dataclass(frozen=True)
class FrameView:
    """The visual tokens of a prompt at a decoder layer that they may skip.

    V is the largest number of visual tokens of a sample. A frame is an image, or a frame of a
    video. While training, gradients flow through `hidden`.

    Attributes:
        hidden: [B, V, D]; states of the visual tokens.
        frames: [B, V] int64; frame of each visual token, counted within its sample; -1 where a
            sample has fewer.
        counts: [B, F] int64; visual tokens of each frame.
    """

    hidden: Tensor
    frames: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Routed:
    """Which visual tokens a decoder layer works on; the others pass it by unchanged.

    Attributes:
        kept: [B, V] bool.
        weight: [B, V]; factor of what the layer adds to a kept token's state: 1 is the layer as it
            is. None for 1 everywhere.
    """

    kept: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Probes:
    """The rows of a prompt whose attention a method sees before a layer attends.

    Attributes:
        recent: how many of the prompt's last tokens.
        random: how many of its other tokens, without replacement.
        seed: of the draw, which is the same on every device and for all layers of a prompt.
    """

    recent: int
    random: int
    seed: int = 0


@dataclass(frozen=True)
class LayerView:
    """The visual tokens of a prompt in one decoder layer, as prefill leaves it.

    Attributes:
        attention: [B, Hq, V] float32; post-softmax attention of each query head to each visual
            token, averaged over the last `window` tokens of the prompt; 0 where a row has fewer
            than V visual tokens.
        images: [B, V] int64; image of each visual token, counted within its row; -1 where a row
            has fewer.
        counts: [B, I] int64; visual tokens of each image; 0 where a row has fewer images.
        kv_heads: KV heads H, a divisor of Hq.
        others: [B] int64; tokens that stay whatever is chosen, added up over the KV heads.
        token_bytes: bytes of one token's key and value in one KV head.
        sums: [B, S] float32; attention that each of the prompt's S columns gets from the probe
            rows (`Pruner.probes`), averaged over the query heads and added up over the rows; 0 at
            padding. None where the method has no probes.
        seen: [B, S] int64; how many probe rows see each column; 0 at padding alone.
        places: [B, V] int64; column of each visual token.
        one_image: whether every sample has a single image of V tokens, known without asking the
            device.
        notes: what the method keeps for the layers to come, which get the same dict as long as
            `images`, `counts` and the device are the same; empty at a prompt's first layer.
    """

    attention: Tensor
    images: Tensor
    counts: Tensor
    kv_heads: int
    others: Tensor
    token_bytes: int
    sums: Tensor | None = None
    seen: Tensor | None = None
    places: Tensor | None = None
    one_image: bool = False
    notes: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Retention:
    """What a layer keeps.

    Attributes:
        kept: [B, H, V] bool.
        gamma: [B]; the layer's vision attention.
        rate: [B]; the retention rate asked for.
    """

    kept: Tensor
    gamma: Tensor
    rate: Tensor
