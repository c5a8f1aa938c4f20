"""VisToG: semantic tokens that pass the vision encoder gather the patches like them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import sizes
from vlmprune.hosts.decoder import layer_call
from vlmprune.hosts.families.towers import Crops
from vlmprune.methods.bases.learned import Learned
from vlmprune.methods.bases.projector import Projector, widths
from vlmprune.methods.uniform import UniformGrid
from vlmprune.runtime.encoder import semantic_tokens
from vlmprune.runtime.family import family_of
from vlmprune.runtime.hooks import Hooks
from vlmprune.select.grouping import assigned, gumbel, means
from vlmprune.select.scoring import uniform_places
from vlmprune.select.settings import check_count, is_number
from vlmprune.views import EncoderView, Reads, Selection

# How far apart scores begin: else the noise of training would deal most patches out by chance, and
# few groups would be left.
SHARPNESS = 10.0
# Parts of the module that each stage trains; a LoRA of the language model belongs to the second.
STAGES: Mapping[str, tuple[str, ...]] = {
    "align": ("semantic", "grouping."),
    "tune": ("grouping.", "projector."),
}


@dataclass(frozen=True)
class VisToG(Learned):
    """Group the patches of an image around learned semantic tokens, and keep one token a group.

    The semantic tokens go through the vision encoder beside the patches: they see each other and
    all patches, no patch sees them. Behind it each patch goes into the group of the semantic
    token that it is most like. A group's token is its semantic token and the projected mean of
    its patches, which a projector takes to the language model.

    Paper: "Efficient Multi-modal Large Language Models via Visual Token Grouping", arXiv
    2411.17773, section 3. No code was released. From the paper are the semantic tokens beside the
    patches, the isolated attention, and the two stages of training; from reviews of it the hard
    assignment by similarity with straight-through Gumbel noise. The form of the group's token,
    the 64 tokens, the temperature and all widths are our reading.

    Attributes:
        weights: a folder as `vlmprune train vistog` writes it, or the name of weights that come
            with the embedded model. It fixes the number of tokens of a crop: 64 or 16, our reading.
        positions: "compact" renumbers the tokens, "original" gives the tokens the positions of
            cells at even distances over the image, "auto" takes what the model's config
            recommends, else the family's release.

    Where it deviates from the paper: the semantic tokens run through the layers on their own,
    attending to the keys and values that the patches left there, which is the same as a masked
    pass and leaves the patches unchanged to the bit; an untrained module takes the semantic
    tokens from what a blank picture's cells are in the encoder, so that they begin apart, leaves
    them out of the groups' tokens at first by a gain of 0 that is learned, begins with scores ten
    times as far apart, or the Gumbel noise would deal patches out by chance, and has the host's own
    projector; tokens stand at cells of an even grid (our reading); a crop with fewer cells than
    tokens keeps all its cells, each with a group; the module computes in float32. The first
    stage of training ("align") moves the semantic tokens and the grouping, the second ("tune")
    the grouping, the projector and a LoRA of the language model (the paper: the language model).
    Keys and values of all layers are held while an image is encoded: 2 · layers · patches · width
    numbers a crop.

    Shapes: features [crops, N, C], semantic [crops, M, C] → tokens [crops, N, D] of the M kept
    cells.

    Raises:
        VlmpruneError: there are no such weights, or they are not of this method.
    """

    method: ClassVar[str] = "vistog"
    needs: ClassVar[str] = "layers of CLIP, SigLIP or DINOv2, encoder features, a grid"
    stage: ClassVar[str] = "inside the vision encoder"
    paper: ClassVar[str] = "arXiv 2411.17773"
    text_agnostic: ClassVar[bool] = True
    training: ClassVar[str] = "module and LoRA"
    attends: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    @classmethod
    def fitted(cls, model: Any, tokens: int = 64, temperature: float = 1.0) -> dict[str, Any]:
        """The settings of a fresh module for a host.

        Args:
            model: the host.
            tokens: of each crop.
            temperature: of the softmax that gradients go through.

        Raises:
            VlmpruneError: the method does not work on the host, or a value is out of range.
        """
        sizes = widths(model, "VisToG")
        check_count("tokens", tokens)
        if not is_number(temperature) or not 0 < temperature < float("inf"):
            raise VlmpruneError(f"temperature={temperature!r} is not a number above 0; use 1.")
        medium = family_of(model).media[0]
        semantic_tokens.check(model, medium, {}, [], sizes.features, "VisToG")
        rows, columns = _grid(model)
        if tokens > rows * columns:
            raise VlmpruneError(
                f"tokens={tokens} is more than the {rows * columns} patches of an image in "
                f"{type(model).__name__}; 64 and 16 are usual."
            )
        return {"tokens": tokens, "temperature": float(temperature), **sizes.config}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> nn.Module:
        """An untrained module of these settings."""
        return Grouper(settings)

    @classmethod
    def start(cls, module: nn.Module, model: Any) -> None:
        """Semantic tokens from a blank picture's cells; the projector as the host's own."""
        assert isinstance(module, Grouper)
        module.projector.start(model)
        with torch.no_grad():
            module.semantic.copy_(blank_cells(model, len(module.semantic)))

    @property
    def beside(self) -> int:  # type: ignore[override]
        """How many semantic tokens each crop has."""
        tokens: int = self.settings["tokens"]
        return tokens

    def reads(self, depth: int, feature: int) -> Reads:
        """The semantic tokens, to go through the encoder."""
        return Reads(semantic=self._grouper.semantic)

    def check(self, counts: list[int]) -> None:
        """Refuse more tokens than even the largest crop has."""
        tokens = self.settings["tokens"]
        if tokens > max(counts):
            raise VlmpruneError(
                f"VisToG's weights make {tokens} tokens of a crop, which has {max(counts)} visual "
                "tokens here; train it for fewer tokens."
            )

    def select(self, view: EncoderView) -> Selection:
        """Make the tokens of all crops of a request; gradients reach the module alone."""
        assert view.semantic is not None
        kept = UniformGrid(keep=self.settings["tokens"]).select(view).kept
        places, there = homes(kept, self.settings["tokens"])
        self.on(kept.device)
        made, shares = self._grouper(view.features, view.semantic, view.candidates, there)
        itself = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
        into = places.clamp(min=0) + itself[:, :1]
        empty = made.new_zeros(kept.numel(), made.shape[-1])
        tokens = empty.index_put((into[there],), made[there]).view(*kept.shape, -1)
        joined = into.gather(1, shares.detach().argmax(dim=1))
        members = torch.where(kept, itself, joined).masked_fill(~view.candidates, -1)
        return Selection(kept, {"merged": kept}, members=members, tokens=tokens)

    def trains(self, stage: str) -> list[str]:
        """Names of the module's parameters that a stage trains.

        Raises:
            VlmpruneError: there is no such stage.
        """
        if stage not in STAGES:
            raise VlmpruneError(f"stage={stage!r} is not known; use {' or '.join(STAGES)}.")
        named = self.module.named_parameters()
        return [name for name, _ in named if name.startswith(STAGES[stage])]

    @property
    def _grouper(self) -> Grouper:
        assert isinstance(self.module, Grouper)
        return self.module


def homes(kept: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The kept cell of each group, both in their order.

    Of a crop that keeps fewer cells than there are groups, groups at even distances are open.

    Args:
        kept: [B, N] bool, at most `groups` of each crop.
        groups: M.

    Returns:
        [B, M] int64, -1 for a closed group; [B, M] bool, whether it is open.
    """
    cells = torch.where(kept, torch.arange(kept.shape[1], device=kept.device), kept.shape[1])
    cells = cells.sort(dim=1).values[:, :groups]
    n = kept.sum(dim=1, keepdim=True)
    ranks = torch.arange(cells.shape[1], device=kept.device)
    chosen = torch.where(ranks < n, (2 * ranks + 1) * groups // (2 * n.clamp(min=1)), groups)
    places = cells.new_full((len(kept), groups + 1), -1).scatter(1, chosen, cells)[:, :groups]
    return places, places >= 0


def _grid(model: Any) -> tuple[int, int]:
    """(rows, columns) of patches at the size that the tower's config names."""
    return sizes.grid(model.config)


@torch.no_grad()
def blank_cells(model: Any, count: int) -> Tensor:
    """[count, C] float32; what enters the encoder for cells at even distances of a blank picture.

    They differ by their places alone.
    """
    medium = family_of(model).media[0]
    assert isinstance(medium, Crops)
    encoder, (rows, columns) = medium.encoder(model, {}), _grid(model)
    patch = sizes.patch_size(model.config)
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(layer_call(encoder.layers[0], args, kwargs).hidden)

    with Hooks() as hooks:
        hooks.before(encoder.layers[0], look)
        channels = sizes.channels(model.config)
        pixels = torch.zeros(1, channels, rows * patch, columns * patch)
        medium.tower(model)(pixels.to(model.device, model.dtype))
    places = torch.tensor(uniform_places(rows, columns, count)) + (encoder.cls == 0)
    return seen[0][0].float().cpu()[places]


class Grouper(nn.Module):
    """What is trained of VisToG.

    Attributes:
        semantic: [M, C] tokens as they enter the encoder's first layer.
        grouping: of patches around what becomes of them behind it.
        projector: to the language model.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.semantic = nn.Parameter(torch.empty(settings["tokens"], settings["features"]))
        nn.init.normal_(self.semantic, std=0.02)
        self.grouping = Grouping(settings["features"], settings["temperature"])
        self.projector = Projector(settings)

    def forward(
        self, features: Tensor, tokens: Tensor, seen: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token a group.

        Args:
            features: [B, N, C] of the patches.
            tokens: [B, M, C] semantic tokens behind the encoder.
            seen: [B, N] bool; patches that count.
            there: [B, M] bool; groups that are open, at least one where a patch counts.

        Returns:
            [B, M, D] float32, anything for a closed group; [B, M, N] 1 where a patch is in a group.
        """
        kind = self.semantic.dtype
        made, shares = self.grouping(features.to(kind), tokens.to(kind), seen, there)
        return self.projector(made), shares


class Grouping(nn.Module):
    """Deals patches out to groups, and makes one feature of each group.

    Begins as a plain mean: values are the patches' own, and semantic tokens do not show.

    Attributes:
        queries: of semantic tokens.
        keys: of patches.
        values: what a patch gives its group.
        gain: [C] how much of a semantic token its group's feature has.
    """

    def __init__(self, wide: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # What is added to all queries alike makes no difference between groups.
        norm = nn.LayerNorm(wide, eps=1e-6, bias=False)
        sharp = _same(wide, bias=False)
        with torch.no_grad():
            sharp.weight.mul_(SHARPNESS)
        self.queries = nn.Sequential(norm, sharp)
        self.keys = nn.Sequential(nn.LayerNorm(wide, eps=1e-6), _same(wide))
        self.values = _same(wide)
        self.gain = nn.Parameter(torch.zeros(wide))

    def forward(
        self, features: Tensor, tokens: Tensor, seen: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Grouper.forward`, in the width of the features."""
        scores = self.queries(tokens) @ self.keys(features).transpose(1, 2)
        scores = scores.float() * features.shape[-1] ** -0.5
        # A crop of which no patch counts has no group; opening all keeps NaN out.
        closed = ~there & there.any(dim=1, keepdim=True)
        scores = scores.masked_fill(closed[..., None], -torch.inf)
        noise = gumbel(scores) if self.training else None
        shares = assigned(scores, noise, self.temperature) * seen[:, None]
        return self.gain * tokens + means(shares, self.values(features)), shares


def _same(wide: int, bias: bool = True) -> nn.Linear:
    """A linear layer that begins by changing nothing."""
    linear = nn.Linear(wide, wide, bias=bias)
    nn.init.eye_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
