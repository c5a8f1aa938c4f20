"""Models that no record knows: followed if a self-check proves their layout, else refused.

What is asked of a model: `get_image_features` that returns [images, tokens, width] for pixels
[images, channels, side, side]; a tower that is a list of layers with attention that goes through
Transformers' registry; and visual tokens each of which is made of one square of patches, in the
order of rows. The last is not believed but measured, by gradients: of a few sets of tokens that
together tell any two tokens apart, with respect to what the tower's layers hand on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, outputs, packing, sizes
from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.families.llava import LAYER
from vlmprune.hosts.families.media import Encoder, Inputs, Scored, blocks, four_dimensional
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.runtime.attention.taps import Rows, Tap, tapped
from vlmprune.views import layout
from vlmprune.views.layout import Layout

Cls = Literal["first", "last", ""]

SUFFIX = "ForConditionalGeneration"
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# What was found for a class with a config: its family, or why there is none.
_found: dict[tuple[type, str], Family | str] = {}


@dataclass(frozen=True)
class Found:
    """What the self-check found out about a model.

    Attributes:
        layers: name of the tower's list of layers.
        layer: the last of them whose output becomes features.
        projector: name of the module that is given the features.
        image_size: (height, width) of the pixels in the check.
        patch_size: side of a patch.
        merge: side of the square of patches that makes one token.
        cls: where the tower puts its CLS token, if it has one.
    """

    layers: str
    layer: int
    projector: str
    image_size: tuple[int, int]
    patch_size: int
    merge: int
    cls: Cls


class Generic(Crops):
    """Images of a model that the self-check has followed."""

    stacked = True

    def __init__(self, found: Found) -> None:
        self.found = found
        self.cls_last = found.cls == "last"  # type: ignore[misc]

    def check(self, model: Any) -> None:
        """It was checked when the record was made."""

    def has_cls(self, model: Any) -> bool:
        """Whether the tower has a CLS token."""
        return bool(self.found.cls)

    def required(self) -> Parts:
        """What the self-check looked at needs no other look."""
        return Parts()

    def chosen_layers(self, model: Any, inputs: Inputs) -> int | list[int]:
        """What the request or the config says, where such a config has the usual entry."""
        asked: Any = inputs.get(LAYER)
        asked = getattr(model.config, LAYER, -1) if asked is None else asked
        return asked if isinstance(asked, int) else list(asked)

    def projector(self, model: Any) -> nn.Module:
        """The module that was found to be given the features."""
        return model.get_submodule(self.found.projector)

    def patch_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """(rows, columns) of patches."""
        patch = self.found.patch_size
        height, width = self.found.image_size
        return height // patch, width // patch

    def merge(self, model: Any) -> int:
        """Side of the square of patches that makes one token."""
        return self.found.merge

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order."""
        pixels = four_dimensional(inputs, "pixel_values")
        if tuple(pixels.shape[-2:]) != self.found.image_size:
            raise VlmpruneError(
                f"pixel_values are {pixels.shape[-2]} x {pixels.shape[-1]}, but the layout of "
                f"{type(model).__name__} was checked at {self.found.image_size[0]} x "
                f"{self.found.image_size[1]}; pass images of the size that its config says."
            )
        rows, columns = self.patch_grid(model, inputs)
        grid = (rows // self.found.merge, columns // self.found.merge)
        return [layout.plain(1, grid, pixels.device)] * len(pixels)

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As other crops, whatever else the host sends through the projector."""
        images = [given for given in features if given.ndim == 3]
        return super().cells(model, inputs, layouts, attention, images)

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """The list of layers that was found."""
        layers = tuple(model.get_submodule(self.found.layers))
        cls = {"": None, "first": 0, "last": -1}[self.found.cls]
        return Encoder(layers, self.found.layer, cls, frozenset(range(len(layers))))

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """The CLS row of the last layer that is used, else what patches receive in the last."""
        layers = model.get_submodule(self.found.layers)
        number = self.found.layer if self.found.cls else len(layers) - 1
        rows: Rows = "cls" if self.found.cls else "received"
        rows = "last" if self.cls_last else rows
        words = "CLS attention" if self.found.cls else "attention received (no CLS token)"
        return Scored(layers[number], rows, f"{words}, encoder layer {number}")


def family(model: Any) -> Family:
    """A record for a model that has none, made by the self-check; once a class and config.

    Raises:
        VlmpruneError: one sentence says why the model cannot be followed.
    """
    key = (type(model), config.json_of(config.of_model(model)) or "")
    if key not in _found:
        try:
            _found[key] = _record(model)
        except _UnfitError as why:
            _found[key] = str(why)
    found = _found[key]
    if isinstance(found, str):
        raise VlmpruneError(
            f"vlmprune cannot follow {type(model).__name__}: {found}; `vlmprune models` lists "
            "those that it supports."
        )
    return found


class _UnfitError(Exception):
    """Why a model cannot be followed."""


def _record(model: Any) -> Family:
    name = type(model).__name__
    return Family(
        name=name.removesuffix(SUFFIX),
        cls=name,
        positions="compact",
        media=(Generic(_self_check(model)),),
        note="in no record; its layout was measured at attach",
    )


def _self_check(model: Any) -> Found:
    """Find out how a model encodes images, by one run of its tower on a random image."""
    _check_class(model)
    base = model.base_model
    sides, patch = sizes.fixed_sides(model.config)
    sides = [sides, sides] if isinstance(sides, int) else sides
    patch = patch if isinstance(patch, int) or not patch else patch[0]
    if not sides or not patch or any(side % patch for side in sides):
        raise _UnfitError("its vision config gives no image size in whole patches")
    height, width = sides
    names, lists = _lists(model, sizes.layer_count(model.config))
    weight = next(lists[0].parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, sizes.channels(model.config), height, width, generator=generator)
    seen = _Seen()
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        stack.enter_context(_evaluating(model))
        for one in lists:
            for layer in one:
                hook = layer.register_forward_hook(seen.leaf(layer), prepend=True)
                stack.callback(hook.remove)
        outer = [child for child in base.children() if not _holds(child, lists)]
        for child in outer:
            hook = child.register_forward_pre_hook(seen.given(child), with_kwargs=True)
            stack.callback(hook.remove)
        try:
            output = base.get_image_features(pixels.to(weight.device, weight.dtype))
            tokens = outputs.tokens_of(output)
        # A host that wants something else fails in its own way.
        except Exception as error:
            raise _UnfitError(
                f"its get_image_features does not take one plain image ({type(error).__name__})"
            ) from error
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != 1:
            raise _UnfitError("its get_image_features does not return [images, tokens, width]")
        if outputs.deep_of(output):
            raise _UnfitError("later layers of its language model are given features, too")
        tower, number, rows = seen.used(lists, tokens)
        grid = (height // patch, width // patch)
        side, cls = _pattern(tokens, rows, grid)
        scored = lists[tower][number if cls else -1]
        _check_tap(base, scored, pixels.to(weight), rows[0].shape[1], tokens.detach())
    chosen = seen.projector(grid[0] * grid[1], tokens.shape[1], bool(cls))
    if chosen is None:
        raise _UnfitError("no module is given the features of its patches")
    where = next(n for n, module in model.named_modules() if module is chosen)
    return Found(names[tower], number, where, (height, width), patch, side, cls)


def _check_class(model: Any) -> None:
    """Refuse what the check below could not find wrong."""
    said = config.of_model(model)
    base: Any = getattr(model, "base_model", None)
    if not type(model).__name__.endswith(SUFFIX) or said is None:
        raise _UnfitError(f"its class is no …{SUFFIX}")
    if not callable(getattr(base, "get_image_features", None)):
        raise _UnfitError("it has no get_image_features")
    if packing.first_argument(base.get_image_features) != "pixel_values":
        raise _UnfitError("its get_image_features does not begin with pixel_values")
    if not config.has_placeholder(said, Generic.token):
        raise _UnfitError("its config has no image_token_id")
    if not config.has_vision(said):
        raise _UnfitError("its config has no vision_config")
    if config.has_encoder(said):
        raise _UnfitError("its language model has an encoder of its own")
    if hasattr(base, "get_rope_index"):
        raise _UnfitError("its visual tokens have three positions each")
    others = config.listed_kinds(said) - _ATTENTION
    if others:
        raise _UnfitError(f"its language model has layers of {' and '.join(sorted(others))}")


def _lists(model: Any, depth: int) -> tuple[list[str], list[nn.ModuleList]]:
    """Lists of layers that may be the tower: of its depth, and not of the decoder."""
    try:
        own = set(model.get_decoder().modules())
    except AttributeError as error:
        raise _UnfitError("its language model is not found") from error
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and module not in own
    ]
    if not found or not depth:
        raise _UnfitError("its vision tower is no list of layers")
    return [name for name, _ in found], [module for _, module in found]


def _holds(module: nn.Module, lists: Sequence[nn.ModuleList]) -> bool:
    inside = set(module.modules())
    return any(one in inside for one in lists)


class _Seen:
    """What hooks saw of one run: outputs of layers, made leaves, and inputs of outer modules."""

    def __init__(self) -> None:
        self.leaves: dict[nn.Module, Tensor] = {}
        self.inputs: list[tuple[nn.Module, Tensor]] = []

    def leaf(self, layer: nn.Module) -> Any:
        """A hook that cuts the graph behind a layer, so that each one's own part is seen."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            cut = first.detach().requires_grad_()
            self.leaves[layer] = cut
            return (cut, *output[1:]) if isinstance(output, tuple) else cut

        return hook

    def given(self, module: nn.Module) -> Any:
        """A hook that records a module's first argument."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor):
                self.inputs.append((module, first.detach()))

        return hook

    def used(self, lists: Sequence[nn.ModuleList], tokens: Tensor) -> tuple[int, int, list[Tensor]]:
        """The list, the last of its layers that becomes features, and outputs of all that do."""
        ran = list(self.leaves)
        if not ran or not tokens.requires_grad:
            raise _UnfitError("its image features do not come from its tower's layers by gradients")
        # Cut behind each layer, the graph leads only to those whose output is used as it is.
        parts = torch.autograd.grad(
            tokens.float().square().sum(),
            [self.leaves[layer] for layer in ran],
            retain_graph=True,
            allow_unused=True,
        )
        chosen = {layer for layer, part in zip(ran, parts, strict=True) if part is not None}
        for number, one in enumerate(lists):
            own = [i for i, layer in enumerate(one) if layer in chosen]
            if own and len(own) == len(chosen):
                rows = [self.leaves[one[i]] for i in own]
                if all(row.ndim == 3 and len(row) == 1 for row in rows):
                    return number, max(own), rows
        raise _UnfitError("its image features do not come from one list of layers")

    def projector(self, patches: int, cells: int, has_cls: bool) -> nn.Module | None:
        """The first module that was given one row a patch, or a token."""
        for module, given in self.inputs:
            if given.ndim == 3 and given.shape[1] in (patches, patches + has_cls, cells):
                return module
        return None


def _pattern(tokens: Tensor, rows: list[Tensor], grid: tuple[int, int]) -> tuple[int, Cls]:
    """Side of the square of patches behind each token, and where the CLS token is.

    Token t must depend on square t alone. Two sets of tokens for each binary digit of t, those
    with a 1 and those with a 0, tell any two tokens apart: what depends on a wrong square is in
    a set that the square is not in.

    Args:
        tokens: [1, T, D] visual tokens.
        rows: [1, L, C] outputs of the tower's layers that they are made of.
        grid: (rows, columns) of patches.
    """
    count, patches, length = tokens.shape[1], grid[0] * grid[1], rows[0].shape[1]
    side = round((patches / count) ** 0.5)
    whole = side and not grid[0] % side and not grid[1] % side and side * side * count == patches
    if not whole or length not in (patches, patches + 1):
        raise _UnfitError(f"it makes {count} visual tokens of {grid[0]} x {grid[1]} patches")
    members = blocks(*grid, side).to(tokens.device)
    kinds: tuple[Cls, ...] = ("",) if length == patches else ("first", "last")
    left = {kind: members + (kind == "first") for kind in kinds}
    number = torch.arange(count, device=tokens.device)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(tokens.shape, generator=generator).to(tokens.device)
    for digit in range(max(1, (count - 1).bit_length())):
        one = (number >> digit) % 2 == 1
        for chosen in (one, ~one):
            made = (tokens.float() * weights * chosen[None, :, None]).sum()
            parts = torch.autograd.grad(made, rows, retain_graph=True)
            touched = torch.stack([(part[0] != 0).any(dim=1) for part in parts]).any(dim=0)
            for kind, places in list(left.items()):
                squares = touched[places].any(dim=1)
                alone = int(touched.sum()) == int(touched[places].sum())
                if not alone or not torch.equal(squares, chosen):
                    del left[kind]
    if not left:
        raise _UnfitError("its visual tokens are not each made of one square of patches")
    return side, next(iter(left))


def _check_tap(base: Any, layer: nn.Module, pixels: Tensor, length: int, alone: Tensor) -> None:
    """The layer's attention can be read, and images of a batch do not mix."""
    try:
        attention_of(layer)
    except LookupError as error:
        raise _UnfitError("its vision tower's attention cannot be read") from error
    tap = Tap("received")
    with tapped(layer, tap), torch.no_grad():
        both = outputs.tokens_of(base.get_image_features(torch.cat((pixels, pixels.flip(-1)))))
    if [tuple(rows.shape) for rows in tap.rows_seen] != [(2, length)]:
        raise _UnfitError("its vision tower does not attend to all patches of an image at once")
    tolerance = 100 * torch.finfo(alone.dtype).eps * float(alone.abs().max())
    if both.shape != (2, *alone.shape[1:]) or float((both[0] - alone[0]).abs().max()) > tolerance:
        raise _UnfitError("its image features depend on the other images of a batch")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is given its mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
