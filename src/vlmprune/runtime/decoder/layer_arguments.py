"""What decoder layers are given for the rows that reach them: masks, rotary angles, cache layers.

All are made of the host's own: gathered, where rows are missing; made again by the host's module,
where positions are renumbered. What several layers need alike is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches
from vlmprune.hosts.decoder import LayerCall
from vlmprune.runtime.cache.gapped_layer import GappedLayer, gapped_at
from vlmprune.runtime.decoder import rows as ops
from vlmprune.runtime.decoder.prompt_rows import PromptRows
from vlmprune.runtime.decoder.rotary_angles import Angles, Same
from vlmprune.runtime.decoder.rows import Going


class LayerArguments:
    """The arguments of one forward's layers.

    Attributes:
        prompt: the prompt that it brings; None before it is known, and while decoding.
        angles: how the host made its rotary angles.
    """

    def __init__(self, compact: bool, flash: bool) -> None:
        """Prepare a forward.

        Args:
            compact: whether rows that reach a layer are renumbered.
            flash: whether attention takes masks of two dimensions.
        """
        self.compact, self.flash = compact, flash
        self.prompt: PromptRows | None = None
        self.angles = Angles()
        self.memo: dict[Any, Any] = {}

    @property
    def going(self) -> Going | None:
        """The rows that reach the present layer; None while all do."""
        return None if self.prompt is None else self.prompt.going

    def forget(self) -> None:
        """Other rows reach the layers from now on, for which all is made anew."""
        self.memo.clear()

    def of(self, index: int, call: LayerCall, hidden: Tensor, start: int, runs: bool) -> LayerCall:
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
        real = going.real.to(device) if going is not None and going.padded else None
        out, mask = call, call.mask
        padded = real is not None or (held is not None and held.padded)
        columns = None
        if going is not None or mask is not None or padded:
            rows = (
                torch.arange(length, device=device).expand(batch, -1)
                if going is None
                else going.slot.to(device)
            )
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
        if going is None and shift is None:
            return call, None
        ids = call.positions
        if going is not None and ids is not None:
            # Only flash attention reads them, and would take gaps for packed sequences.
            at = torch.arange(going.source.shape[1], device=ids.device)
            call = call.with_positions(at.expand(*ids.shape[:-1], -1))
        if angles is None:
            # A layer that turns nothing, as some do among others that turn.
            return call, None
        if going is not None and not self.compact and shift is None:
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
                positions, ahead = self.prompt.renumbered(positions, self.compact)
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
