"""QueCC: the visual tokens of a window become one, asked for by the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.learned import Learned
from vlmprune.methods.bases.projector import Projector, widths
from vlmprune.select.settings import check_count
from vlmprune.select.windows import centres, windows
from vlmprune.views import EncoderView, Reads, Selection

# Hidden states that the release reads, of the 25 that a tower of 24 layers has.
RELEASED, OF = (12, 16, 22, 23), 24


@dataclass(frozen=True)
class QueCC(Learned):
    """Make one visual token of each window of the grid, by attention that the question steers.

    The question alone passes the language model; its last state is added to every patch feature.
    What a depthwise convolution makes of a window of these asks the window's own patches, seen at
    several depths of the encoder, by attention; a projector takes the answer to the language
    model.

    Paper: "Inference Optimal VLMs Need Only One Visual Token but Larger Models", arXiv 2411.03312
    (ICLR 2025), section 4; modules, widths and the states read are those of the authors' code,
    which comes without weights.

    Attributes:
        weights: a folder as `vlmprune train quecc` writes it, or the name of weights that come
            with the embedded model. It fixes the side of the windows: of 576 tokens 4, 6, 12 and
            24 leave 36, 16, 4 and 1, the authors' settings.
        positions: "compact" renumbers the tokens (as the release does), "original" gives a token
            the position of the cell nearest its window's centre, "auto" takes what the model's
            config recommends, else the family's release.

    Where it deviates from the release: windows at the edge of a grid that the side does not divide
    are smaller; cells that the language model would not see are left out; of towers of another
    depth the states at the same share of the depth are read; the question is the prompt's text
    behind the row's last image with what the template puts around it, and all images of a row
    share it; the projector begins as the host's own; the module computes in float32; videos are
    compressed frame by frame. An image's tokens depend on the question, so they cannot be reused
    across questions.

    Shapes: features [crops, N, C], states [crops, N, C] each, question [crops, D] → tokens
    [crops, N, D] of the kept cells, one a window.

    Raises:
        VlmpruneError: there are no such weights, or they are not of this method.
    """

    method: ClassVar[str] = "quecc"
    needs: ClassVar[str] = "states of several encoder layers, the question, a grid"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2411.03312"
    text_agnostic: ClassVar[bool] = False
    training: ClassVar[str] = "module"
    attends: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    @classmethod
    def fitted(
        cls, model: Any, window: int = 4, heads: int = 8, hidden: int | None = None
    ) -> dict[str, Any]:
        """The settings of a fresh module for a host.

        Args:
            model: the host.
            window: side of the windows, in cells; 4, 6, 12 or 24 in the paper.
            heads: of the attention; 8 in the release.
            hidden: inner width of the perceptrons; None for that of the features, the release's.

        Raises:
            VlmpruneError: the method does not work on the host, or a value is out of range.
        """
        sizes = widths(model, "QueCC")
        for name, value in (("window", window), ("heads", heads), ("hidden", hidden or 1)):
            check_count(name, value)
        if sizes.features % heads:
            raise VlmpruneError(
                f"heads={heads} does not divide the width of the features of "
                f"{type(model).__name__}, {sizes.features}; give a divisor of it."
            )
        return {
            "window": window,
            "heads": heads,
            "hidden": hidden or sizes.features,
            "states": states_of(sizes.depth),
            **sizes.config,
        }

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> nn.Module:
        """An untrained module of these settings."""
        return Compressor(settings)

    @classmethod
    def start(cls, module: nn.Module, model: Any) -> None:
        """The projector begins as the host's own."""
        assert isinstance(module, Compressor)
        module.projector.start(model)

    def reads(self, depth: int, feature: int) -> Reads:
        """Hidden states of the encoder, and the question."""
        return Reads(states=tuple(self.settings["states"]), question=True)

    def select(self, view: EncoderView) -> Selection:
        """Make the tokens of all crops of a request; gradients reach the module alone."""
        assert view.question is not None
        module, side = self.on(view.features.device), self.settings["window"]
        crops, cells = view.candidates.shape
        kept = torch.zeros_like(view.candidates)
        members = torch.full(kept.shape, -1, dtype=torch.long, device=kept.device)
        deep = torch.cat([view.states[layer].detach() for layer in self.settings["states"]], -1)
        into, made = [], []
        for grid in dict.fromkeys(view.grids):
            own = torch.tensor([i for i, g in enumerate(view.grids) if g == grid])
            own = own.to(kept.device)
            tiles = windows(grid, side).to(kept.device)
            seen = view.candidates[own]
            # The release takes the question's state without gradients, and so do we.
            question = view.question[own].detach()
            tokens = module(view.features[own], deep[own], question, tiles, seen)
            centre = centres(tiles, grid, seen)
            there = centre >= 0
            flat = (own[:, None] * cells + centre)[there]
            kept.view(-1)[flat] = True
            into.append(flat)
            made.append(tokens[there])
            inside = (tiles >= 0)[None] & there[..., None]
            target = (own[:, None] * cells + centre)[..., None].expand_as(inside)
            source = (own[:, None, None] * cells + tiles)[inside]
            members.view(-1)[source] = target[inside]
        members = members.masked_fill(~view.candidates, -1)
        rows = torch.cat(made)
        empty = rows.new_zeros(crops * cells, rows.shape[-1])
        tokens = empty.index_put((torch.cat(into),), rows).view(crops, cells, -1)
        return Selection(kept, {"merged": kept}, members=members, tokens=tokens)


def states_of(depth: int) -> list[int]:
    """0-based encoder layers whose output is read: the release's, at their share of the depth.

    Of 24 layers those are 11, 15, 21 and 22, for hidden state 0 is the embedding. Towers so flat
    that several fall together are read once there.
    """
    return sorted({max(0, state * depth // OF - 1) for state in RELEASED})


class Compressor(nn.Module):
    """What is trained of QueCC, by the names and shapes of the release's modules.

    Attributes:
        text: question to features' width.
        queries: of the features with the question added.
        keys: of the hidden states side by side.
        values: likewise.
        pool: [C, side²] and [C], the depthwise convolution over a window.
        attention: from a window's query to its patches.
        projector: to the language model.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        wide, side = settings["features"], settings["window"]
        deep, hidden = settings["tower"] * len(settings["states"]), settings["hidden"]
        self.text = nn.Sequential(
            nn.Linear(settings["language"], wide), nn.LayerNorm(wide, eps=1e-6)
        )
        self.queries = _perceptron(wide, hidden, wide)
        self.keys = _perceptron(deep, hidden, wide)
        self.values = _perceptron(deep, hidden, wide)
        self.pool = nn.Conv2d(wide, wide, side, stride=side, groups=wide)
        self.attention = nn.MultiheadAttention(wide, settings["heads"], batch_first=True)
        self.projector = Projector(settings)

    def forward(
        self, features: Tensor, deep: Tensor, question: Tensor, tiles: Tensor, seen: Tensor
    ) -> Tensor:
        """One token a window.

        Args:
            features: [B, N, C].
            deep: [B, N, K] hidden states of several layers side by side.
            question: [B, D].
            tiles: [W, side²] cells of each window, -1 where it has fewer.
            seen: [B, N] bool; cells that count.

        Returns:
            [B, W, D] float32; anything for a window of which no cell counts.
        """
        kind = self.pool.weight.dtype
        asked = features.to(kind) + self.text(question.to(kind))[:, None]
        there = (tiles >= 0)[None] & seen[:, tiles.clamp(min=0)]

        def tiled(values: Tensor) -> Tensor:
            return values[:, tiles.clamp(min=0)] * there[..., None]

        # A convolution whose stride is its side, over cells that are not there as zeros.
        kernel, bias = self.pool.weight.flatten(1), self.pool.bias
        assert bias is not None
        query = torch.einsum("bwkc,ck->bwc", tiled(self.queries(asked)), kernel) + bias
        key, value = (tiled(one(deep.to(kind))).flatten(0, 1) for one in (self.keys, self.values))
        # Of a window without a cell nothing is used; attending to all of it keeps NaN out.
        hidden = ~(there | ~there.any(dim=-1, keepdim=True)).flatten(0, 1)
        found, _ = self.attention(
            query.flatten(0, 1)[:, None], key, value, key_padding_mask=hidden, need_weights=False
        )
        tokens: Tensor = self.projector(found.view_as(query))
        return tokens


def _perceptron(wide: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, out), nn.LayerNorm(out, eps=1e-6)
    )
