"""Models that no record knows: followed if a self-check proves their layout, else refused.

What is asked of a model: `get_image_features` that returns [images, tokens, width] for pixels
[images, channels, side, side]; a tower that is a list of layers with attention that goes through
Transformers' registry; and visual tokens each of which is made of one square of patches, in the
order of rows. The last is not believed but measured, by gradients: of a few sets of tokens that
together tell any two tokens apart, with respect to what the tower's layers hand on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, outputs, sizes
from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.families.generic import SUFFIX, Cls, Generic, TrialFindings, unfit
from vlmprune.hosts.families.media import blocks
from vlmprune.hosts.families.record import Family
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.runtime.hooks import Hooks

# What was found for a class with a config: its family, or why there is none.
_found: dict[tuple[type, str], Family | str] = {}


def tried(model: Any) -> Family:
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


def _self_check(model: Any) -> TrialFindings:
    """Find out how a model encodes images, by one run of its tower on a random image."""
    why = unfit(model)
    if why is not None:
        raise _UnfitError(why)
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
    seen = _Trial()
    with Hooks() as hooks, torch.inference_mode(False), torch.enable_grad():
        hooks.enter_context(_evaluating(model))
        for one in lists:
            for layer in one:
                hooks.after(layer, seen.leaf, first=True)
        outer = [child for child in base.children() if not _holds(child, lists)]
        for child in outer:
            hooks.before(child, seen.given)
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
    return TrialFindings(names[tower], number, where, (height, width), patch, side, cls)


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
    held = set(module.modules())
    return any(one in held for one in lists)


class _Trial:
    """What hooks saw of one run: outputs of layers, made leaves, and inputs of outer modules."""

    def __init__(self) -> None:
        self.leaves: dict[nn.Module, Tensor] = {}
        self.inputs: list[tuple[nn.Module, Tensor]] = []

    def leaf(self, layer: nn.Module, _: Any, __: Any, output: Any) -> Any:
        """Cut the graph behind a layer (a hook), so that each one's own part is seen."""
        first = output[0] if isinstance(output, tuple) else output
        cut = first.detach().requires_grad_()
        self.leaves[layer] = cut
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    def given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a module's first argument (a hook)."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor):
            self.inputs.append((module, first.detach()))

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
