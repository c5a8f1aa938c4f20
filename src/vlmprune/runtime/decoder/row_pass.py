"""One forward of the decoder in which rows are missing from layers, by hooks that exist meanwhile.

Where rows go, the states of the others are gathered, and the layers get the host's own mask, rotary
angles and cache for these alone. Rows that leave for good keep the state that they left with, and
are put back in their places behind the last layer. Rows that skip one layer keep theirs, too, and
are back behind it; of what that layer works on, a visual token with a weight comes out as
x + weight · (layer(x) - x), and text plainly. A row leaves no key in the cache of a layer that it
is missing from. The host sees a forward of the usual shape, and its cache the usual length. The
prompt's last token leaves no layer for good whatever a method says, for the first new token is
made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import attention, caches, config, decoder
from vlmprune.hosts.contract import Reached, broken
from vlmprune.hosts.decoder import LayerCall, RotaryCall
from vlmprune.runtime.attention.interception import intercepting
from vlmprune.runtime.cache.gapped_layer import GappedLayer, gapped_layers
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.layer_arguments import LayerArguments
from vlmprune.runtime.decoder.looks import Look, glance
from vlmprune.runtime.decoder.missing_rows import MissingRows
from vlmprune.runtime.decoder.prompt_rows import PromptRows
from vlmprune.runtime.decoder.rows import Going
from vlmprune.runtime.hooks import After, Before, Hooks
from vlmprune.runtime.timer import Timer
from vlmprune.select.precision import unrounded
from vlmprune.views import Ask


@dataclass(frozen=True)
class Skipped:
    """A layer that some rows skip, while it runs.

    Attributes:
        given: [B, R, D] states of the rows that it works on.
        weight: [B, R] factors of what it adds to them, not a number for text; None for 1.
    """

    given: Tensor
    weight: Tensor | None

    def weighted(self, made: Tensor) -> Tensor:
        """[B, R, D] what comes of the layer, where it made that."""
        if self.weight is None:
            return made
        weight = self.weight.to(made.device)[..., None]
        plain = weight.isnan()
        mixed = self.given + weight.masked_fill(plain, 1).to(made.dtype) * (made - self.given)
        return torch.where(plain, made, mixed)


class Pass:
    """One forward of the decoder, layer by layer."""

    def __init__(
        self,
        missing: MissingRows | None,
        last: int,
        whole: Callable[[int], bool],
        flash: bool,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Prepare a forward.

        Args:
            missing: the prompt that it brings; None while decoding.
            last: number of the last layer.
            whole: whether the host wants all rows in their places behind a layer.
            flash: whether attention takes masks of two dimensions.
            norm: that behind the last layer; None unless asked for.
        """
        self.missing, self.last, self.whole, self.norm = missing, last, whole, norm
        self.arguments = LayerArguments(
            missing is not None and missing.positions == "compact", flash
        )
        self.look: Look | None = None
        # What looks at the layer that runs.
        self.watched: Look | None = None
        self.watches = ExitStack()
        # Of the layer that runs, if rows may skip it.
        self.skipped: Skipped | None = None
        # States of all rows, once any went: those that were as they left.
        self.full: Tensor | None = None
        # Whether the host has all rows in their places.
        self.restored = False
        self.reached = Reached()

    @property
    def prompt(self) -> PromptRows:
        """The rows of the prompt that the forward brings."""
        assert self.arguments.prompt is not None
        return self.arguments.prompt

    def before(self, index: int, layer: nn.Module, call: LayerCall) -> LayerCall | None:
        """What a layer gets instead of what the host gives it; None for the same."""
        self.reached.note(index, layer)
        given = hidden = call.hidden
        start = caches.length_of(call.cache, index)
        if self.missing is not None:
            hidden = self._present(self.missing, index, layer, call, start)
            self._watch(self.missing, index, layer)
        changed = self.arguments.of(index, call, hidden, start, runs=True)
        return None if changed is call and hidden is given else changed.with_hidden(hidden)

    def after(self, index: int, layer: nn.Module, output: Any) -> Any:
        """What the host gets of a layer.

        Raises:
            ContractError: its attention was to be seen, and was not.
        """
        self.watches.close()
        watched, self.watched = self.watched, None
        # Where the layer failed, its error is on its way.
        if output is None:
            return None
        if watched is not None and not watched.called:
            raise broken(layer, "it does not attend through the attention registry")
        going, (skipped, self.skipped) = self.arguments.going, (self.skipped, None)
        back = skipped is not None or index == self.last or self.whole(index)
        if not back or (going is None and (skipped is None or skipped.weight is None)):
            return None
        states = decoder.states_of(output)
        if skipped is not None:
            states = skipped.weighted(states)
        if going is not None:
            assert self.full is not None
            states = self.full = going.scatter(self.full, states)
            self.restored = True
        if skipped is not None:
            # All rows reach the next layer.
            self.prompt.going, self.full, self.restored = None, None, False
        return decoder.with_states(output, states)

    def close(self) -> None:
        """Stop watching."""
        self.watches.close()

    def _present(
        self, missing: MissingRows, index: int, layer: nn.Module, call: LayerCall, start: int
    ) -> Tensor:
        """[B, R, D] the states of the rows that a layer works on."""
        hidden = call.hidden
        if self.arguments.prompt is None:
            batch, length = hidden.shape[:2]
            self.arguments.prompt = PromptRows(missing, batch, length, start)
            self._rate(missing, hidden)
        going = self.prompt.going
        if going is not None and self.restored:
            self.full, self.restored = hidden, False
            hidden = ops.gather_rows(hidden, going.source)
        if index in missing.skips:
            return self._skip(missing, index, hidden)
        ask = missing.asks.get(index)
        if ask is None:
            return hidden
        return self._leave(missing, index, layer, ask, call.with_hidden(hidden), start)

    def _rate(self, missing: MissingRows, hidden: Tensor) -> None:
        """Let the method choose its raters from the embedded prompt."""
        if missing.rates:
            with torch.no_grad(), Timer(missing.spent, hidden):
                view = self.prompt.view(hidden.detach(), self.last + 1, None, None)
                with unrounded(hidden):
                    rate = missing.method.raters(view)
                self.prompt.rate = rate.to(hidden.device) & view.text

    def _leave(
        self,
        missing: MissingRows,
        index: int,
        layer: nn.Module,
        ask: Ask,
        call: LayerCall,
        start: int,
    ) -> Tensor:
        """The states of the rows that go on into a layer."""
        prompt, look, hidden = self.prompt, self.look, call.hidden
        self.look = None
        if look is None and (ask.attention == "previous" or ask.keys):
            raise broken(layer, f"decoder layer {index - 1} did not run before layer {index}")
        with Timer(missing.spent, hidden):
            seen = look
            if ask.attention == "own":
                rows, counted = prompt.asked(ask)
                seen = Look(rows, counted, False)
                given = self.arguments.of(index, call, hidden, start, runs=False)
                glance(layer, given, caches.stored_keys(call.cache, index), seen)
            attention = None if seen is None else seen.attention
            if attention is not None:
                attention = attention[:, -hidden.shape[1] :]
            with torch.no_grad():
                keys = look.keys if look else None
                view = prompt.view(hidden.detach(), self.last + 1, attention, keys)
                if ask.normed and self.norm is not None:
                    both = (self.norm(states) for states in (view.hidden, view.text_hidden))
                    normed, text_normed = (states.to(hidden.device) for states in both)
                    view = replace(view, normed=normed, text_normed=text_normed)
                with unrounded(hidden):
                    found = missing.method.drop(index, view)
            before = prompt.going
            new, fewer = prompt.leave(index, found, hidden)
            if fewer:
                self._part(before, hidden)
        return new

    def _skip(self, missing: MissingRows, index: int, hidden: Tensor) -> Tensor:
        """The states of the rows that do not skip a layer."""
        prompt = self.prompt
        with Timer(missing.spent, hidden):
            with unrounded(hidden):
                found = missing.method.route(index, prompt.frame_view(hidden))
            new, weight, fewer = prompt.skip(index, found, hidden)
            if fewer:
                self._part(None, hidden)
            self.skipped = Skipped(new, weight)
        return new

    def _part(self, before: Going | None, hidden: Tensor) -> None:
        """Keep the states of rows that go, among those that were there before."""
        if before is not None:
            assert self.full is not None
            hidden = before.scatter(self.full, hidden)
        self.full = hidden
        self.arguments.forget()

    def _watch(self, missing: MissingRows, index: int, layer: nn.Module) -> None:
        """Look at this layer's attention if the method asked for it at the next."""
        ask = missing.asks.get(index + 1)
        previous = ask is not None and ask.attention == "previous"
        if ask is None or not (previous or ask.keys):
            return
        rows, counted = self.prompt.asked(ask) if previous else (None, None)
        self.look = Look(rows, counted, ask.keys)
        self.watched = self.look
        self.watches.enter_context(intercepting(self.look, attention.attention_of(layer)))


@contextmanager
def leaving_out(
    model: Any, missing: MissingRows | None, cache: Any, wanted: bool
) -> Iterator[None]:
    """Let rows be missing from layers of a forward inside the block.

    Args:
        model: the host.
        missing: the prompt that it brings; None while decoding.
        cache: the cache that it continues, whose layers may lack columns, or None.
        wanted: whether the states behind every layer are asked for.
    """
    short = dict(gapped_layers(cache))
    if missing is None:
        short = {index: one for index, one in short.items() if one.held is not None}
        if not short:
            yield
            return
    depth, deep = len(decoder.decoder_layers(model)), config.deepstack_layers(model.config)
    flash = "flash" in config.attention_implementation(config.of_text(model.config))
    normed = missing is not None and any(ask.normed for ask in missing.asks.values())
    norm = decoder.final_norm(model) if normed else None
    run = Pass(missing, depth - 1, lambda index: wanted or index < deep, flash, norm)
    try:
        if missing is None:
            with _stepping(model, run, short):
                yield
        else:
            indices = sorted({*short, *missing.followed(depth)})
            with hooked(model, run, indices, indices, True, True):
                yield
    except BaseException:
        for one in dict(gapped_layers(cache)).values():
            one.expect_nothing()
        raise


@contextmanager
def _stepping(model: Any, run: Pass, short: Mapping[int, GappedLayer]) -> Iterator[None]:
    """Let a forward inside the block go on from layers that lack columns.

    While decoding no row goes, and all that such a layer needs is a mask of its own, where the host
    gives it one, and angles, where positions were renumbered. So only the first layer of each kind
    is hooked, and the others as it finds a mask; what they are reached by is their cache.
    """
    turned = any(one.shift is not None for one in short.values())
    kinds = dict(enumerate(config.layer_kinds(model.config)))
    alike = {index: (kinds.get(index), one.window) for index, one in short.items()}
    first: dict[Any, int] = {}
    for index, one in short.items():
        own = one.padded or one.shift is not None
        first.setdefault(index if own else alike[index], index)
    hooks = {*first.values()}
    for index in short.keys() - hooks:
        short[index].expect_step(partial(run.reached.note, index, short[index]))

    def others(index: int) -> Iterable[int]:
        """The layers that are to be hooked besides, as one was given a mask."""
        for other, one in short.items():
            if other not in hooks and alike[other] == alike[index]:
                hooks.add(other)
                one.expect_nothing()
                yield other

    with hooked(model, run, [*short], sorted(hooks), False, turned, others):
        yield


@contextmanager
def hooked(
    model: Any,
    run: Pass,
    due: Sequence[int],
    indices: Sequence[int],
    behind: bool,
    turned: bool,
    others: Callable[[int], Iterable[int]] = lambda index: (),
) -> Iterator[None]:
    """Have a forward inside the block call `run` around decoder layers.

    Args:
        model: the host.
        run: the forward.
        due: the layers that are to be reached.
        indices: those that are hooked.
        behind: whether it wants to see their output too.
        turned: whether it wants to know how rotary angles were made.
        others: which later layers are to be hooked as well, as one of them is given a mask.
    """
    layers = decoder.decoder_layers(model)

    def before(index: int) -> Before:
        def run_before(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            call = decoder.layer_call(layer, args, kwargs)
            if call.mask is not None:
                for other in others(index):
                    hooks.before(layers[other], before(other))
            changed = run.before(index, layer, call)
            return None if changed is None else changed.unbuilt()

        return run_before

    def after(index: int) -> After:
        return lambda layer, args, kwargs, output: run.after(index, layer, output)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run.arguments.angles.note(RotaryCall(module, args, kwargs, output))

    with Hooks() as hooks:
        hooks.callback(run.close)
        for module in decoder.rotary_modules(model) if turned else ():
            hooks.after(module, note)
        for index in indices:
            hooks.before(layers[index], before(index))
            if behind:
                hooks.after(layers[index], after(index), first=True, always=True)
        yield
    run.reached.check(model, due, "ran around the hooks that leave tokens out there")
