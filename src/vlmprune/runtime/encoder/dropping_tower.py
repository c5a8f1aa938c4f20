"""Tokens that leave in the layers of a vision tower.

How tokens leave between a layer's attention and its MLP: the norm before the MLP is given those
that stay, and one that is made of the others where that is wanted; the MLP's output is handed back
to all, the layer itself adds what each was, and behind it only those that stay go on.

Tokens leave by whole *cells*, the patches that the host makes one visual token of. Behind the layer
whose output becomes features the tower hands on as many tokens as ever, zeros where they left; the
layers behind it see what is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, contract, decoder, towers
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.families.media import Encoder
from vlmprune.runtime.attention.interception import Changing, intercepting
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.runtime.encoder.tower_run import TowerRun
from vlmprune.runtime.hooks import Hooks
from vlmprune.select import leaving
from vlmprune.select.leaving import Leaving, put
from vlmprune.views import Inside


class DroppingTower(TowerRun):
    """Tokens that leave in the layers of an encoder.

    All that it holds is of the tower's present call: `cells` [B, c] and `here` [B, n] those cells
    and patches that are left, ascending, behind which a token made of others may stand; the layer's
    own `leaving` with the `mean` of what left; and, behind the layer whose output becomes features,
    the `states` that go on.

    Args:
        encoder: the tower's layers.
        members: [cells, g] the patches of each cell of a crop.
        inside: what is to happen.
        hooks: where they are put.
    """

    def __init__(self, encoder: Encoder, members: Tensor, inside: Inside, hooks: Hooks) -> None:
        super().__init__(inside)
        self.cls, self.rows = int(encoder.cls == 0), encoder.rows
        self.members, self.patches, self.fuse = members, members.numel(), inside.fuse
        self.cells = self.here = self.mean = self.states = torch.empty(0)
        self.leaving: Leaving | None = None
        # By layer, call by call: the patches that it sees.
        self.seen: dict[nn.Module, list[Tensor]] = {}
        for number, layer in enumerate(encoder.layers):
            goes = inside.leaves[number] if number < len(inside.leaves) else 0
            self._hook(layer, goes, number == 0, number - encoder.feature, hooks)

    def _hook(self, layer: nn.Module, goes: int, first: bool, past: int, hooks: Hooks) -> None:
        """Hooks of a layer; `past` counts layers from that whose output becomes features."""
        seen = self.seen[layer] = []

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = decoder.layer_call(layer, args, kwargs)
            if first:
                self._begin(layer, call.hidden)
            seen.append(self.here)
            return call.with_hidden(self.states).unbuilt() if past > 0 else None

        def unmasked(call: AttentionCall) -> AttentionCall:
            if call.mask is not None:
                raise VlmpruneError(
                    f"{type(layer).__name__} masks its tokens, which vlmprune cannot drop then; "
                    "pass what the model's own processor returns."
                )
            return call

        def end(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            states = decoder.states_of(output)
            if self.leaving is not None:
                states = self.leaving.after(states, self.mean)
                self.leaving = None
            if past >= 0:
                self.states = states
                prefix = torch.arange(self.cls, device=self.here.device)
                places = torch.cat((prefix.expand(len(states), -1), self.here + self.cls), dim=1)
                states = put(states[:, : places.shape[1]], places, self.cls + self.patches)
            if past == 0:
                gone = self.cells.new_full((len(states), len(self.members)), -1)
                self.shared += list(gone.scatter(1, self.cells, self.cells))
            return decoder.with_states(output, states)

        hooks.before(layer, begin)
        # Before the host's own hooks, which record the states.
        hooks.after(layer, end, first=True)
        if goes:
            tap = Tap(self.rows)
            norm, mlp = towers.parts_of(layer)

            def leave(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
                self._leave(tap.rows_seen.pop(), goes)
                assert self.leaving is not None
                self.mean = self.leaving.mean(args[0])
                return (self.leaving.before(args[0]), *args[1:]), kwargs

            def back(_: nn.Module, __: Any, ___: Any, output: Tensor) -> Tensor:
                assert self.leaving is not None
                return self.leaving.back(output)

            hooks.enter_context(tapped(layer, tap))
            hooks.before(norm, leave)
            hooks.after(mlp, back)
        hooks.enter_context(intercepting(Changing(unmasked), attention.attention_of(layer)))

    def _begin(self, layer: nn.Module, states: Tensor) -> None:
        """A call of the tower begins, with all tokens."""
        crops, tokens, _ = states.shape
        if tokens != self.cls + self.patches:
            raise contract.broken(
                layer, f"it sees {tokens} tokens of a crop of {self.patches} patches"
            )
        device = states.device
        self.members = self.members.to(device)
        self.cells = torch.arange(len(self.members), device=device).expand(crops, -1)
        self.here = torch.arange(self.patches, device=device).expand(crops, -1)
        self.leaving = None

    def _leave(self, row: Tensor, goes: int) -> None:
        """Decide who stays, by the attention [B, T] that the layer's tokens get."""
        # The tower may lie on several devices.
        members, here = self.members.to(row.device), self.here.to(row.device)
        own = slice(self.cls, self.cls + here.shape[1])
        scores = put(row[:, own, None], here, self.patches)[..., 0]
        cells = self.cells.to(row.device)
        self.cells = leaving.highest(scores, cells, members, cells.shape[1] - goes)
        self.here = members[self.cells].flatten(1).sort(dim=1).values
        places = torch.zeros(len(row), self.patches, dtype=torch.long, device=row.device)
        places = places.scatter(1, here, torch.arange(own.start, own.stop).to(here).expand_as(here))
        prefix = torch.arange(self.cls, device=row.device).expand(len(row), -1)
        stays = torch.cat((prefix, places.gather(1, self.here)), dim=1)
        self.leaving = Leaving.of(row, stays, self.fuse)

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Each call's rows on all patches; a token made of others is no patch."""
        if layer is None or layer not in self.seen:
            return rows
        found = []
        for row, here in zip(rows, self.seen[layer], strict=True):
            own = row[:, self.cls : self.cls + here.shape[1], None]
            every = put(own, here, self.patches)[..., 0]
            found.append(torch.cat((row[:, : self.cls], every), dim=1))
        return found
