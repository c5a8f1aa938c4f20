"""What a pruned call has to equal: the class as it is, told to overlook what was pruned.

Tokens are hidden in the masks that the decoder's own attention modules are given, so the host's
code adds, caps and sinks as it does. What a recurrence has seen cannot be hidden; there the
reference is a shorter prompt, of the very embeddings and positions of the whole one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surveyed.asked import Request, generate

# (step, layer) → what each KV head sees of the prompt's columns [B, H or 1, L]; None for all.
Seen = Callable[[int, int], Tensor | None]


# What classes of attention are called.
NAMED = ("Attention", "Attn", "MLA")


class IncomparableError(Exception):
    """Why there is no reference."""


def decoder_of(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds the decoder layers, and these."""
    found = model.get_decoder()
    for name in ("", "model", "decoder", "language_model", "model.decoder"):
        try:
            holder = found.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(holder, "layers", None), nn.ModuleList):
            return holder, list(holder.layers)
    raise IncomparableError("its decoder layers are not found")


def is_recurrent(model: Any) -> bool:
    """Whether a decoder layer carries a state from column to column."""
    _, layers = decoder_of(model)
    kinds = (nn.Conv1d,)
    named = ("mamba", "gateddelta", "shortconv", "linearattention", "deltanet", "rwkv", "conv1d")
    return any(
        isinstance(module, kinds) or any(word in type(module).__name__.lower() for word in named)
        for layer in layers
        for module in layer.modules()
    )


class Steps:
    """Which step of a call is under way: 0 for the prompt."""

    def __init__(self) -> None:
        self.now = -1

    def count(self, *_: Any) -> None:
        """A pass begins (a hook)."""
        self.now += 1


@contextmanager
def hiding(
    model: Any, length: int, seen: Seen, positions: Callable[[int], Tensor] | None = None
) -> Iterator[Steps]:
    """Hide columns of the prompt from the heads of decoder layers.

    Args:
        model: as it is.
        length: of the prompt.
        seen: by step and layer.
        positions: by step [B, columns], in place of the host's own.
    """
    decoder, layers = decoder_of(model)
    steps = Steps()
    with ExitStack() as stack:

        def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            steps.count()
            if positions is None:
                return None
            if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
                raise IncomparableError("its decoder takes no positions")
            return args, kwargs | {"position_ids": positions(steps.now)}

        stack.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
        reached = 0
        for number, layer in enumerate(layers):
            for module in attentions(layer):
                hook = _Hidden(number, length, seen, steps)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                reached += 1
        if not reached:
            raise IncomparableError("its attention takes no mask")
        yield steps


def attentions(layer: nn.Module) -> list[nn.Module]:
    """The outermost modules of a decoder layer that attend under a mask."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            takes = inspect.signature(type(child).forward).parameters
            name = type(child).__name__
            if "attention_mask" in takes and any(one in name for one in NAMED):
                found.append(child)
            else:
                look(child)

    look(layer)
    return found


class _Hidden:
    """A hook that changes the mask of one attention module."""

    def __init__(self, layer: int, length: int, seen: Seen, steps: Steps) -> None:
        self.layer, self.length, self.seen, self.steps = layer, length, seen, steps

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A mask that hides more."""
        keep = self.seen(self.steps.now, self.layer)
        if keep is None:
            return None
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        states = next(v for v in bound.arguments.values() if isinstance(v, Tensor))
        queries = states.shape[1]
        columns = self.length + self.steps.now
        given = bound.arguments.get("attention_mask")
        if given is not None and given.ndim != 4:
            raise IncomparableError(f"its attention is given a mask of {given.ndim} dimensions")
        if given is None:
            visible = torch.ones(queries, columns, dtype=torch.bool)
            visible = visible.tril(columns - queries)[None, None]
        else:
            visible = given if given.dtype == torch.bool else given > -1
        if keep.shape[1] > 1:
            keep = keep.repeat_interleave(groups(module, keep.shape[1]), dim=1)
        hidden = torch.zeros(*keep.shape[:2], queries, visible.shape[-1], dtype=torch.bool)
        hidden[..., : self.length] = ~keep[:, :, None]
        # A query that is hidden itself may see itself: nobody reads what becomes of it.
        at = torch.arange(queries)
        hidden[:, :, at, columns - queries + at] = False
        visible = visible & ~hidden
        name = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
        mask = visible
        if name == "eager" or (given is not None and given.dtype != torch.bool):
            mask = torch.zeros(visible.shape, dtype=states.dtype)
            mask = mask.masked_fill(~visible, torch.finfo(states.dtype).min)
        new = {k: v for k, v in kwargs.items() if k != "attention_mask"}
        names = list(inspect.signature(module.forward).parameters)
        if len(args) > names.index("attention_mask"):
            place = names.index("attention_mask")
            return (*args[:place], mask, *args[place + 1 :]), new
        return args, new | {"attention_mask": mask}


def groups(module: nn.Module, kv_heads: int) -> int:
    """Query heads of each KV head."""
    attention: Any = module
    own = getattr(attention, "num_key_value_groups", None)
    if own is None:
        own = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
        own //= kv_heads
    return int(own)


def masked(model: Any, request: Request, seen: Seen, compact: Tensor | None = None) -> list[Tensor]:
    """The logits of the whole model with columns hidden.

    Args:
        model: as it is.
        request: to answer.
        seen: by step and layer.
        compact: [B, L] bool, columns that count in the positions; None leaves those to the host.
    """
    mask = request.inputs["attention_mask"].bool()
    places = None
    if compact is not None:
        counted = mask & compact
        prompt = (counted.long().cumsum(1) - 1).clamp(min=0)

        def places(step: int) -> Tensor:
            return prompt if not step else prompt[:, -1:] + step

    with hiding(model, mask.shape[1], seen, places):
        return generate(model, request.inputs)


@contextmanager
def recorded(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What the decoder is given in each pass."""
    decoder, _ = decoder_of(model)
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]
    passes: list[dict[str, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(dict(zip(names, args, strict=False)) | kwargs)

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def shortened(model: Any, request: Request, keep: Tensor, compact: bool) -> list[Tensor]:
    """The logits of a prompt without the columns that were dropped.

    Args:
        model: as it is.
        request: the whole one.
        keep: [B, L] bool, columns that stay.
        compact: whether positions are renumbered.
    """
    with recorded(model) as passes:
        generate(model, request.inputs)
    embeddings = passes[0].get("inputs_embeds")
    if embeddings is None:
        raise IncomparableError("its decoder is given no embeddings")
    odd = [n for n in passes[0] if "deepstack" in n or "visual_pos" in n or "per_layer" in n]
    if any(passes[0][name] is not None for name in odd):
        raise IncomparableError(f"a shortened prompt would have no {odd[0]}")
    mask = request.inputs["attention_mask"].bool()
    columns = [(m & k).nonzero()[:, 0] for m, k in zip(mask, keep, strict=True)]
    longest = max(map(len, columns))

    def short(whole: Tensor, dim: int) -> Tensor:
        """Columns that stay, padded on the left."""
        rows = whole.unbind(dim)
        cut = [
            torch.cat((row.new_zeros(longest - len(at), *row.shape[1:]), row[at]))
            for row, at in zip(rows, columns, strict=True)
        ]
        return torch.stack(cut, dim)

    counted = mask & keep if compact else mask
    own = (counted.long().cumsum(1) - 1).clamp(min=0)
    given = passes[0].get("position_ids")
    if given is None or compact:
        given = own
    if given.ndim == 3:
        prompt = torch.stack([short(one.expand(len(mask), -1), 0) for one in given])
    else:
        prompt = short(given.expand(len(mask), -1), 0)
    # An ordinary text of the same length; its embeddings and positions are exchanged.
    ids = torch.full((len(mask), longest), 100)
    inputs = {"input_ids": ids, "attention_mask": short(mask.long(), 0)}
    decoder, _ = decoder_of(model)
    steps = Steps()

    def exchange(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        steps.count()
        positions = prompt
        if steps.now:
            later = passes[steps.now].get("position_ids")
            positions = own[:, -1:] + steps.now if later is None or compact else later
        else:
            kwargs = kwargs | {"inputs_embeds": short(embeddings, 0), "input_ids": None}
        if "position_ids" in kwargs:
            kwargs = kwargs | {"position_ids": positions}
        return args, kwargs

    hook = decoder.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        return generate(model, inputs)
    finally:
        hook.remove()


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference of the logits of two answers, as a share of the largest logit.

    Of answers that part, steps up to the one whose logits chose otherwise.
    """
    if len(left) != len(right):
        return float("inf")
    worst, scale = 0.0, max(1.0, max(float(one.abs().max()) for one in left))
    for a, b in zip(left, right, strict=True):
        worst = max(worst, float((a - b).abs().nan_to_num(nan=1e9).max()))
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            break
    return worst / scale


def borrowers(model: Any, lender: int) -> list[int]:
    """The decoder layers that attend to a layer's keys and values, as the model's config says."""
    text = model.config.get_text_config(decoder=True)
    count = getattr(text, "num_kv_shared_layers", None) or 0
    kinds = list(getattr(text, "layer_types", None) or [])
    first = len(kinds) - count
    if not count or lender >= first or kinds[lender] in kinds[lender + 1 : first]:
        return []
    return [layer for layer in range(first, len(kinds)) if kinds[layer] == kinds[lender]]


def from_layers(keep: Mapping[int, Tensor], first_step: int) -> Seen:
    """The same masks in each step from one on."""
    return lambda step, layer: keep.get(layer) if step >= first_step else None
