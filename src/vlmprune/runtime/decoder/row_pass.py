"""Dropping rows between decoder layers, with hooks that are there only while a forward runs.

Where a method drops rows, the states that go on are gathered, and every later layer gets the
host's own mask, rotary angles and cache for these rows alone. Behind the last layer all rows are
put back in their places: those that were dropped keep the state that they left with. The host
sees a forward of the usual shape, and its cache the usual length. The prompt's last token goes on
whatever a method says, for the first new token is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, caches, config, decoder
from vlmprune.hosts.contract import Reached, broken
from vlmprune.hosts.decoder import LayerCall, RotaryCall
from vlmprune.runtime.attention.interception import watching
from vlmprune.runtime.cache.gapped_layer import GappedLayer, gapped_at, gapped_layers
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.dropping import Dropping, PromptRows, Timer
from vlmprune.runtime.decoder.looks import Look, glance
from vlmprune.runtime.decoder.rotary_angles import Angles, Same
from vlmprune.runtime.decoder.rows import Going
from vlmprune.runtime.scope import OwnThread
from vlmprune.views import Ask


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
        self.thread = OwnThread()
        self.prompt: PromptRows | None = None
        self.look: Look | None = None
        # What looks at the layer that runs.
        self.watched: Look | None = None
        self.watches = ExitStack()
        # States of all rows, once any were dropped: those that were as they left.
        self.full: Tensor | None = None
        # Whether the host has all rows in their places.
        self.restored = False
        self.memo: dict[Any, Any] = {}
        self.reached = Reached()

    @property
    def going(self) -> Going | None:
        """The rows that reach the present layer; None while all do."""
        return None if self.prompt is None else self.prompt.going

    def before(self, index: int, layer: nn.Module, call: LayerCall) -> LayerCall | None:
        """What a layer gets instead of what the host gives it; None for the same."""
        if not self.thread.runs:
            return None
        self.reached.note(index, layer)
        given = hidden = call.hidden
        start = caches.length_of(call.cache, index)
        if self.dropping is not None and self.prompt is None:
            self.prompt = PromptRows(self.dropping, hidden.shape[0], hidden.shape[1], start)
            self._rate(hidden)
        if self.going is not None and self.restored:
            self.full, self.restored = hidden, False
            hidden = ops.gather_rows(hidden, self.going.source)
        ask = None if self.dropping is None else self.dropping.asks.get(index)
        if ask is not None:
            hidden = self._drop(index, layer, ask, call.with_hidden(hidden), start)
        self._watch(index, layer)
        changed = self._arguments(index, call, hidden, start, runs=True)
        return None if changed is call and hidden is given else changed.with_hidden(hidden)

    def after(self, index: int, layer: nn.Module, output: Any) -> Any:
        """What the host gets of a layer.

        Raises:
            ContractError: its attention was to be seen, and was not.
        """
        if not self.thread.runs:
            return None
        self.watches.close()
        watched, self.watched = self.watched, None
        # Where the layer failed, its error is on its way.
        if output is None:
            return None
        if watched is not None and not watched.called:
            raise broken(layer, "it does not attend through the attention registry")
        if self.going is None or not (index == self.last or self.whole(index)):
            return None
        assert self.full is not None
        full = self.full = self.going.scatter(self.full, decoder.states_of(output))
        self.restored = True
        return decoder.with_states(output, full)

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
        call: LayerCall,
        start: int,
    ) -> Tensor:
        """The states of the rows that go on into a layer."""
        assert self.dropping is not None and self.prompt is not None
        prompt, look, before, hidden = self.prompt, self.look, self.going, call.hidden
        self.look = None
        if look is None and (ask.attention == "previous" or ask.keys):
            raise broken(layer, f"decoder layer {index - 1} did not run before layer {index}")
        with Timer(self.dropping, hidden):
            seen = look
            if ask.attention == "own":
                rows, counted = prompt.asked(ask)
                seen = Look(rows, counted, False)
                given = self._arguments(index, call, hidden, start, runs=False)
                glance(layer, given, caches.stored_keys(call.cache, index), seen)
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
        self.watched = self.look
        self.watches.enter_context(watching(attention.attention_of(layer), self.look))

    def _arguments(
        self, index: int, call: LayerCall, hidden: Tensor, start: int, runs: bool
    ) -> LayerCall:
        """A layer's call for the rows that reach it.

        Args:
            index: of the layer.
            call: as the host makes it.
            hidden: [B, R, D] the rows' states.
            start: columns that its cache has seen.
            runs: whether the layer is about to run, and its cache to grow.
        """
        cache, going = call.cache, self.going
        layers = caches.layers_of(cache)
        held = layers[index] if index < len(layers) else None
        if not isinstance(held, GappedLayer) or held.held is None:
            held = None
        if going is None and held is None:
            return call
        device, batch = hidden.device, hidden.shape[0]
        length = hidden.shape[1] if going is None or self.prompt is None else self.prompt.length
        if going is not None:
            _check_arguments(call, length)
            if held is None and cache is not None:
                held = gapped_at(cache, index, batch, device)
                # One tensor for all layers, so that they share what is made of it.
                held.held = self._once(("all", held.start, held.stored), lambda: held.held)
            rows, real = going.slot.to(device), going.real.to(device) if going.padded else None
        else:
            rows = torch.arange(length, device=device).expand(batch, -1)
            real = None
        out, mask = call, call.mask
        padded = real is not None or (held is not None and held.padded)
        columns = None
        if going is not None or mask is not None or padded:
            columns = self._columns(held, rows, real, start)
            made = self._once(
                ("mask", Same(mask), Same(columns)),
                lambda: ops.rows_mask(mask, rows, columns, start, length, real, padded, self.flash),
            )
            out = out.with_mask(made)
        out, shift = self._place(out, held)
        if held is not None and runs:
            held.shift = shift
            if going is None:
                held.expect(None)
            else:
                held.expect(columns, start + length, padded)
        return out

    def _columns(
        self, held: GappedLayer | None, rows: Tensor, real: Tensor | None, start: int
    ) -> Tensor:
        """[B, C] column of all keys that rows [B, R] of a layer attend to, -1 for padding."""

        def made() -> Tensor:
            new = rows + start if real is None else (rows + start).masked_fill(~real, -1)
            return new if held is None else torch.cat((held.columns(rows.device), new), dim=1)

        if held is None:
            return self._once(("columns", Same(self.going)), made)
        return self._once(("columns", Same(self.going), Same(held.held), held.tail), made)

    def _place(self, call: LayerCall, held: GappedLayer | None) -> tuple[LayerCall, Tensor | None]:
        """Put in the rotary angles of the rows; returns the layer's shift from now on, too."""
        shift = None if held is None else held.shift
        angles, going = call.angles, self.going
        compact = self.dropping is not None and self.dropping.positions == "compact"
        if going is None and shift is None:
            return call, None
        ids = call.positions
        if going is not None and ids is not None:
            # Only flash attention reads them, and would take gaps for packed sequences.
            at = torch.arange(going.source.shape[1], device=ids.device)
            call = call.with_positions(at.expand(*ids.shape[:-1], -1))
        if going is not None and not compact and shift is None:
            source = going.source

            def gathered() -> Any:
                if isinstance(angles, Tensor):
                    return ops.gather_angles(angles, source)
                parts: tuple[Tensor, ...] = angles
                return tuple(ops.gather_angles(part, source) for part in parts)

            return call.with_angles(self._once(("angles", Same(angles)), gathered)), None

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
        made, later = self._once(key, moved)
        return call.with_angles(made), later

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several layers need alike, made once."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def _check_arguments(call: LayerCall, length: int) -> None:
    """Refuse arguments that have an entry a column and that nobody here knows to gather."""
    name = call.unfollowed(length)
    if name is not None:
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
    short = dict(gapped_layers(cache))
    if dropping is None and not any(one.held is not None for one in short.values()):
        yield
        return
    last, deep = len(decoder.decoder_layers(model)) - 1, config.deepstack_layers(model.config)
    flash = "flash" in config.attention_implementation(config.of_text(model.config))
    run = Pass(dropping, last, lambda index: wanted or index < deep, flash)
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
    layers, indices = decoder.decoder_layers(model), [*indices]

    # A hook that another thread removes may be run once more by this one, without keywords.
    def before(index: int) -> Callable[..., Any]:
        def run_before(layer: nn.Module, args: Any, kwargs: Any = None) -> Any:
            if kwargs is None:
                return None
            changed = run.before(index, layer, decoder.layer_call(layer, args, kwargs))
            return None if changed is None else changed.unbuilt()

        return run_before

    def after(index: int) -> Callable[..., Any]:
        return lambda layer, args, output: run.after(index, layer, output)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if output is not None and run.thread.runs:
            run.angles.note(RotaryCall(module, args, kwargs, output))

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in (decoder.rotary_modules(model) if turned else ())
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
    run.reached.check(model, indices, "ran around the hooks that drop tokens there")
