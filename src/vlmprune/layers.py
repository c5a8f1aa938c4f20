"""Dropping rows between decoder layers, with hooks that are there only while a forward runs.

Where a method drops rows, the states that go on are gathered, and every later layer gets the
host's own mask, rotary angles and cache for these rows alone. Behind the last layer all rows are
put back in their places: those that were dropped keep the state that they left with. The host
sees a forward of the usual shape, and its cache the usual length. The prompt's last token goes on
whatever a method says, for the first new token is made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune import families
from vlmprune import rows as ops
from vlmprune.angles import Angles, Same
from vlmprune.asking import Look, glance
from vlmprune.dispatch import attention_of, watching
from vlmprune.dropping import Dropping, Prompt, Timer
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.release import cache_given
from vlmprune.rows import Going
from vlmprune.short import ShortLayer, short_layers, shorten_layer

if TYPE_CHECKING:
    from vlmprune.views import Ask

# What decoder layers are given that has an entry a column, and that this module knows to gather.
KNOWN = {"attention_mask", "position_embeddings", "position_ids"}


class Pass:
    """One forward of the decoder, layer by layer."""

    def __init__(
        self, dropping: Dropping | None, last: int, whole: Callable[[int], bool], flash: bool
    ) -> None:
        """Prepare a forward.

        Args:
            dropping: the prompt that it brings; None while decoding.
            last: number of the last layer.
            whole: whether the host wants all rows in their places behind a layer.
            flash: whether attention takes masks of two dimensions.
        """
        self.dropping, self.flash = dropping, flash
        self.last, self.whole = last, whole
        self.angles = Angles()
        self.thread = threading.get_ident()
        self.prompt: Prompt | None = None
        self.look: Look | None = None
        self.watches = ExitStack()
        # States of all rows, once any were dropped: those that were as they left.
        self.full: Tensor | None = None
        # Whether the host has all rows in their places.
        self.spread = False
        self.memo: dict[Any, Any] = {}

    @property
    def going(self) -> Going | None:
        """The rows that reach the present layer; None while all do."""
        return None if self.prompt is None else self.prompt.going

    def before(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What a layer gets instead of what the host gives it."""
        if threading.get_ident() != self.thread:
            return None
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        hidden = given
        cache = cache_given(type(layer), kwargs)
        start = int(cache.get_seq_length(index)) if cache is not None else 0
        if self.dropping is not None and self.prompt is None:
            self.prompt = Prompt(self.dropping, hidden.shape[0], hidden.shape[1], start)
            self._rate(hidden)
        if self.going is not None and self.spread:
            self.full, self.spread = hidden, False
            hidden = ops.gather_rows(hidden, self.going.source)
        ask = None if self.dropping is None else self.dropping.asks.get(index)
        if ask is not None:
            hidden = self._drop(index, layer, ask, hidden, kwargs, start)
        self._watch(index, layer)
        changed = self._arguments(index, layer, args, kwargs, hidden, start, runs=True)
        if changed is kwargs and hidden is given:
            return None
        if args:
            return (hidden, *args[1:]), changed
        return args, changed | {"hidden_states": hidden}

    def after(self, index: int, output: Any) -> Any:
        """What the host gets of a layer."""
        if threading.get_ident() != self.thread:
            return None
        self.watches.close()
        if self.going is None or output is None or not (index == self.last or self.whole(index)):
            return None
        assert self.full is not None
        hidden = output[0] if isinstance(output, tuple) else output
        full = self.full = self.going.scatter(self.full, hidden)
        self.spread = True
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def close(self) -> None:
        """Stop watching."""
        self.watches.close()

    def _rate(self, hidden: Tensor) -> None:
        """Let the method choose its raters from the embedded prompt."""
        assert self.dropping is not None and self.prompt is not None
        if any(ask.queries == "raters" for ask in self.dropping.asks.values()):
            with torch.no_grad(), Timer(self.dropping, hidden):
                view = self.prompt.view(hidden.detach(), None, None)
                self.prompt.rate = self.dropping.method.raters(view).to(hidden.device) & view.text

    def _drop(
        self,
        index: int,
        layer: nn.Module,
        ask: Ask,
        hidden: Tensor,
        kwargs: dict[str, Any],
        start: int,
    ) -> Tensor:
        """The states of the rows that go on into a layer."""
        assert self.dropping is not None and self.prompt is not None
        prompt, look, before = self.prompt, self.look, self.going
        self.look = None
        with Timer(self.dropping, hidden):
            seen = look
            if ask.attention == "own":
                rows, counted = prompt.asked(ask)
                seen = Look(rows, counted, False)
                given = self._arguments(index, layer, (), kwargs, hidden, start, runs=False)
                glance(layer, hidden, given, _keys(layer, kwargs, index), seen)
            attention = None if seen is None else seen.attention
            if attention is not None:
                attention = attention[:, -hidden.shape[1] :]
            with torch.no_grad():
                view = prompt.view(hidden.detach(), attention, look.keys if look else None)
                view = replace(view, depth=self.last + 1)
                found = self.dropping.method.drop(index, view)
            new, dropped = prompt.apply(index, found, hidden)
            if dropped and before is not None:
                assert self.full is not None
                self.full = before.scatter(self.full, hidden)
            elif dropped:
                self.full = hidden
            if dropped:
                self.memo.clear()
        return new

    def _watch(self, index: int, layer: nn.Module) -> None:
        """Look at this layer's attention if the method asked for it at the next."""
        ask = None if self.dropping is None else self.dropping.asks.get(index + 1)
        previous = ask is not None and ask.attention == "previous"
        if ask is None or not (previous or ask.keys):
            return
        assert self.prompt is not None
        rows, counted = self.prompt.asked(ask) if previous else (None, None)
        self.look = Look(rows, counted, ask.keys)
        self.watches.enter_context(watching(attention_of(layer), self.look))

    def _arguments(
        self,
        index: int,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: Tensor,
        start: int,
        runs: bool,
    ) -> dict[str, Any]:
        """A layer's keyword arguments for the rows that reach it.

        Args:
            index: of the layer.
            layer: itself.
            args: what the host gives by place.
            kwargs: and by name.
            hidden: [B, R, D] the rows' states.
            start: columns that its cache has seen.
            runs: whether the layer is about to run, and its cache to grow.
        """
        cache, going = cache_given(type(layer), kwargs), self.going
        layers = getattr(cache, "layers", None) or ()
        held = layers[index] if index < len(layers) else None
        if not isinstance(held, ShortLayer) or held.held is None:
            held = None
        if going is None and held is None:
            return kwargs
        device, batch = hidden.device, hidden.shape[0]
        length = hidden.shape[1] if going is None or self.prompt is None else self.prompt.length
        if going is not None:
            _check_arguments(args, kwargs, length)
            if held is None and cache is not None:
                held = shorten_layer(cache, index, batch, device)
                # One tensor for all layers, so that they share what is made of it.
                held.held = self._once(("all", held.start, held.stored), lambda: held.held)
            rows, real = going.slot.to(device), going.real.to(device) if going.padded else None
        else:
            rows = torch.arange(length, device=device).expand(batch, -1)
            real = None
        out = dict(kwargs)
        mask = kwargs.get("attention_mask")
        padded = real is not None or (held is not None and held.padded)
        columns = None
        if going is not None or mask is not None or padded:
            columns = self._columns(held, rows, real, start)
            out["attention_mask"] = self._once(
                ("mask", Same(mask), Same(columns)),
                lambda: ops.rows_mask(mask, rows, columns, start, length, real, padded, self.flash),
            )
        shift = self._place(out, held)
        if held is not None and runs:
            held.shift = shift
            if going is None:
                held.expect(None)
            else:
                held.expect(columns, start + length, padded)
        return out

    def _columns(
        self, held: ShortLayer | None, rows: Tensor, real: Tensor | None, start: int
    ) -> Tensor:
        """[B, C] column of all keys that rows [B, R] of a layer attend to, -1 for padding."""

        def made() -> Tensor:
            new = rows + start if real is None else (rows + start).masked_fill(~real, -1)
            return new if held is None else torch.cat((held.columns(rows.device), new), dim=1)

        if held is None:
            return self._once(("columns", Same(self.going)), made)
        return self._once(("columns", Same(self.going), Same(held.held), held.tail), made)

    def _place(self, out: dict[str, Any], held: ShortLayer | None) -> Tensor | None:
        """Put in the rotary angles of the rows; returns the layer's shift from now on."""
        shift = None if held is None else held.shift
        angles: Any = out.get("position_embeddings")
        going = self.going
        compact = self.dropping is not None and self.dropping.positions == "compact"
        if going is None and shift is None:
            return None
        if going is not None and isinstance(out.get("position_ids"), Tensor):
            # Only flash attention reads them, and would take gaps for packed sequences.
            ids = out["position_ids"]
            at = torch.arange(going.source.shape[1], device=ids.device)
            out["position_ids"] = at.expand(*ids.shape[:-1], -1)
        if going is not None and not compact and shift is None:
            source = going.source

            def gathered() -> Any:
                if isinstance(angles, Tensor):
                    return ops.gather_angles(angles, source)
                parts: tuple[Tensor, ...] = angles
                return tuple(ops.gather_angles(part, source) for part in parts)

            out["position_embeddings"] = self._once(("angles", Same(angles)), gathered)
            return None

        def moved() -> tuple[Any, Tensor | None]:
            positions = self.angles.positions(angles)
            later = shift
            if going is not None:
                assert self.prompt is not None
                positions, ahead = self.prompt.renumbered(positions, compact)
                if ahead is not None:
                    later = ahead if shift is None else ahead + shift.to(ahead.device)
            if shift is not None:
                positions = positions - shift.to(positions.device)[:, None]
            return self.angles.made(angles, positions), later

        key = ("moved", Same(angles), None if shift is None else Same(shift))
        out["position_embeddings"], later = self._once(key, moved)
        return later

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several layers need alike, made once."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def _keys(layer: nn.Module, kwargs: dict[str, Any], index: int) -> Tensor | None:
    """Keys that a layer's cache holds."""
    layers = getattr(cache_given(type(layer), kwargs), "layers", None) or ()
    if index >= len(layers) or not layers[index].get_seq_length():
        return None
    keys: Tensor = layers[index].keys
    return keys


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> None:
    """Refuse arguments that have an entry a column and that nobody here knows to gather."""
    named = {f"argument {i + 1}": value for i, value in enumerate(args[1:], 1)} | kwargs
    for name, value in named.items():
        if name in KNOWN or not isinstance(value, Tensor) or value.ndim < 2:
            continue
        if name != "hidden_states" and value.shape[1] == length:
            raise VlmpruneError(
                f"the decoder layers take {name} of each token, of which tokens cannot be "
                "dropped; prune before the language model."
            )


@contextmanager
def dropping_rows(
    model: Any, dropping: Dropping | None, cache: Any, wanted: bool
) -> Iterator[None]:
    """Let a forward inside the block drop rows, or continue a cache that lacks columns.

    Args:
        model: the host.
        dropping: the prompt that it brings; None while decoding.
        cache: the cache that it continues, or None.
        wanted: whether the states behind every layer are asked for.
    """
    short = dict(short_layers(cache))
    if dropping is None and not any(one.held is not None for one in short.values()):
        yield
        return
    layers = families.decoder_layers(model)
    last, deep = len(layers) - 1, families.deepstack_layers(model)
    kind = model.config.get_text_config(decoder=True)._attn_implementation or ""
    run = Pass(dropping, last, lambda index: wanted or index < deep, "flash" in kind)
    first = min(short, default=last)
    if dropping is not None:
        raters = any(ask.queries == "raters" for ask in dropping.asks.values())
        first = min(first, 0 if raters else min(dropping.asks) - 1)

    # While decoding no row goes, so that less is to be done at every step: layers that lack columns
    # are told which mask is theirs, and angles matter only where positions were renumbered.
    going = range(first, last + 1) if dropping is not None else [*short]
    turned = dropping is not None or any(one.shift is not None for one in short.values())
    with hooked(model, run, going, dropping is not None, turned):
        yield


@contextmanager
def hooked(
    model: Any, run: Pass, indices: Iterable[int], behind: bool, turned: bool
) -> Iterator[None]:
    """Have a forward inside the block call `run` around decoder layers.

    Args:
        model: the host.
        run: the forward.
        indices: of the layers.
        behind: whether it wants to see their output too.
        turned: whether it wants to know how rotary angles were made.
    """
    layers = families.decoder_layers(model)

    # A hook that another thread removes may be run once more by this one, without keywords.
    def before(index: int) -> Callable[..., Any]:
        def run_before(layer: nn.Module, args: Any, kwargs: Any = None) -> Any:
            return None if kwargs is None else run.before(index, layer, args, kwargs)

        return run_before

    def after(index: int) -> Callable[..., Any]:
        return lambda layer, args, output: run.after(index, output)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if output is not None and threading.get_ident() == run.thread:
            run.angles.note(module, args, kwargs, output)

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in (families.rotary_modules(model) if turned else ())
    ]
    for index in indices:
        hooks.append(layers[index].register_forward_pre_hook(before(index), with_kwargs=True))
        if behind:
            # Before the host's own hooks, which record states.
            hooks.append(
                layers[index].register_forward_hook(after(index), prepend=True, always_call=True)
            )
    try:
        yield
    finally:
        run.close()
        for hook in hooks:
            hook.remove()
