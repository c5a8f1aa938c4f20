"""ZipVL: each layer attends among the tokens that hold most of its attention, and caches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Pruner
from vlmprune.select import retention
from vlmprune.select.settings import check_whole, is_share
from vlmprune.views import LayerView, Probes, Retention


@dataclass(frozen=True)
class ZipVL(Pruner):
    """Attend in each decoder layer only among the important tokens, and cache only those.

    A few probe rows show what a layer attends to before it does. From their attention follows how
    many tokens the layer needs, so the number is its own, and which. The layer then attends among
    these alone, in prefill already; the other tokens pass it by, through residual connection and
    feed-forward, and may be important to the next.

    Paper: "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification", arXiv
    2410.08584, section 4; version 2, which evicts the other tokens from the cache, where version 1
    quantised them. No code was released with it; that of its authors' ZipCache is a witness.

    Attributes:
        tau: share of the probes' attention that the important tokens hold, 0 < tau <= 1. The paper
            gives 0.975, the default, and 0.96. 1 keeps everything.
        recent: how many of the prompt's last tokens are probes. 64 is our reading.
        random: how many of its other tokens are probes, drawn without replacement. 64 is our
            reading, too; ZipCache's release takes recent and random tokens alike, 5 % each. A
            prompt of no more tokens than both is looked at whole.
        seed: of the draw, which the paper leaves open.

    With Aj the attention that token j gets from the probes, added up over them and averaged over
    the query heads: p is the fewest tokens whose A make up tau of the sum of all, and important
    are the p tokens with the largest Aj / nj, nj being the probes that see token j; text counts in
    both. Choice and sparse attention are the paper's. The average over heads, which makes all KV
    heads keep the same tokens, dividing by the probes that see a token (ZipCache's release: by all
    rows that do) and drawing the probes once a prompt for all layers are our readings.

    γ in the report is the visual tokens' share of the probes' attention, the retention what was
    kept of them. FLOPs after are those of attention among the visual tokens kept; what the probes
    cost is timed, not counted.

    Where it deviates from the paper: text and the prompt's last token always stay, though they
    count in p; tokens generated later are all kept; sliding-window and linear-attention layers are
    left whole; a later turn on the same cache chooses among its own tokens, by their own sum, and
    attends to all that earlier turns left; a prompt without an image is left alone.

    Shapes: sums [B, S], seen [B, S] → kept [B, H, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    tau: float = 0.975
    recent: int = 64
    random: int = 64
    seed: int = 0

    needs: ClassVar[str] = "attention of probe rows, KV cache"
    stage: ClassVar[str] = "every decoder layer: prefill attention and KV cache"
    paper: ClassVar[str] = "arXiv 2410.08584"

    def __post_init__(self) -> None:
        if not is_share(self.tau, zero=False):
            raise VlmpruneError(
                f"tau={self.tau!r} is not a number above 0 and up to 1; use 0.975, the paper's."
            )
        for name, least in (("recent", 1), ("random", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)

    @property
    def probes(self) -> Probes:
        """The rows that it looks at before a layer attends."""
        return Probes(self.recent, self.random, self.seed)

    def retain(self, layer: int, view: LayerView) -> Retention:
        """What a layer attends to and keeps, the same in all KV heads."""
        assert view.sums is not None and view.seen is not None and view.places is not None
        real = view.images >= 0
        important = retention.important(view.sums, view.seen, self.tau)
        kept = important.gather(1, view.places) & real
        visual = view.sums.gather(1, view.places).masked_fill(~real, 0.0).sum(dim=1)
        # A sample without visual tokens reports nothing; 1 keeps the divisions sound.
        gamma = visual / torch.where(view.sums.sum(dim=1) == 0, 1.0, view.sums.sum(dim=1))
        rate = kept.sum(dim=1) / real.sum(dim=1).clamp(min=1)
        return Retention(kept[:, None].expand(-1, view.kv_heads, -1), gamma, rate)
