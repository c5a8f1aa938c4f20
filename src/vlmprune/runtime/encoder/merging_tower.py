"""Tokens that merge in the layers of a vision tower.

What merges is a *cell*, the patches that the host makes one visual token of: each of them merges
with the patch at its own place in the other cell, so that the visual tokens are means as well.

How tokens merge between a layer's attention and its MLP: the norm before the MLP is given the
merged tokens, the MLP's output is handed back to all members of each, the layer itself adds what
each was, and the mean over the members, by size, is the merged token plus its MLP's output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, decoder, towers
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.families.media import Encoder
from vlmprune.runtime.attention.interception import Changing, intercepting
from vlmprune.runtime.attention.taps import KeyTap, tapped
from vlmprune.runtime.encoder.tower_run import TowerRun
from vlmprune.runtime.hooks import Hooks
from vlmprune.select import bipartite
from vlmprune.select.leaving import taken
from vlmprune.select.precision import unrounded
from vlmprune.views import Inside


class MergingTower(TowerRun):
    """Tokens that merge in the layers of an encoder.

    All that it holds is of the tower's present call: `places` [B, T] where each token that the
    tower began with is by now, `size` [B, t] of how many each is made, `cells` [B, c, g] the tokens
    of each cell that is left, and the layer's own merge.

    Args:
        encoder: the tower's layers.
        members: [cells, g] the patches of each cell of a crop.
        inside: what is to happen.
        hooks: where they are put.
    """

    def __init__(self, encoder: Encoder, members: Tensor, inside: Inside, hooks: Hooks) -> None:
        super().__init__(inside)
        self.cls, self.members = int(encoder.cls == 0), members
        self.places = self.size = self.cells = self.into = self.weights = torch.empty(0)
        # By layer, call by call: places and sizes as the layer begins.
        self.begun: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        last = len(inside.merges) - 1
        for number, (layer, merge) in enumerate(zip(encoder.layers, inside.merges, strict=False)):
            self._hook(layer, merge, number == 0, number == last, hooks)

    def _hook(self, layer: nn.Module, merge: int, first: bool, last: bool, hooks: Hooks) -> None:
        norm, mlp = towers.parts_of(layer)
        tap = KeyTap()
        begun = self.begun[layer] = []

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first:
                tokens = decoder.layer_call(layer, args, kwargs).hidden[..., 0]
                self.size = torch.ones_like(tokens, dtype=torch.float32)
                every = torch.arange(tokens.shape[1], device=tokens.device)
                self.places = every.expand(tokens.shape)
                self.cells = (self.members.to(every) + self.cls).expand(len(tokens), -1, -1)
            begun.append((self.places, self.size))

        def weigh(call: AttentionCall) -> AttentionCall:
            if call.mask is not None:
                raise VlmpruneError(
                    f"{type(layer).__name__} masks its tokens, which vlmprune cannot merge then; "
                    "pass what the model's own processor returns."
                )
            # The tower may lie on several devices.
            device, dtype = call.query.device, call.query.dtype
            self.places, self.size = self.places.to(device), self.size.to(device)
            weights = None if first else self.size.log().to(dtype)[:, None, None]
            return replace(call, mask=weights)

        def merged(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            self._match(tap.rows_seen.pop(), merge)
            left = self.size.shape[1] - merge * self.members.shape[1]
            self.weights, self.size = bipartite.averaging(self.into, self.size, left)
            return (self._mean(args[0]), *args[1:]), kwargs

        def back(_: nn.Module, __: Any, ___: Any, output: Tensor) -> Tensor:
            return taken(output, self.into)

        def end(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            states = decoder.states_of(output)
            if merge:
                states = self._mean(states)
                self.places = self.into.gather(1, self.places)
            if last:
                states = taken(states, self.places)
                # Cells lie one behind the other by now, or as they were.
                first = self.members[:, 0].to(self.places.device) + self.cls
                of_cell = self.places[:, first] - self.cls
                self.shared += list(of_cell // self.members.shape[1])
            return decoder.with_states(output, states)

        hooks.before(layer, begin)
        # Before the host's own hooks, which record the states.
        hooks.after(layer, end, first=True)
        if merge:
            hooks.enter_context(tapped(layer, tap))
            hooks.before(norm, merged)
            hooks.after(mlp, back)
        hooks.enter_context(intercepting(Changing(weigh), attention.attention_of(layer)))

    def _match(self, keys: Tensor, merge: int) -> None:
        """Decide where each token [B, t] goes, by keys [B, t, D] put end to end in a cell."""
        each, cells = self.members.shape[1], self.cells.to(keys.device)
        count, own = cells.shape[1], cells.flatten(1)
        units = taken(keys, own).unflatten(1, (count, each)).flatten(2)
        if self.cls:
            units = torch.cat((keys[:, :1].repeat(1, 1, each), units), dim=1)
        into = bipartite.match(units, merge, bool(self.cls))[:, self.cls :] - self.cls
        place = torch.arange(each, device=keys.device)
        places = (into[..., None] * each + place).flatten(1) + self.cls
        # The CLS token stays the first.
        self.into = torch.zeros_like(keys[..., 0], dtype=torch.long).scatter(1, own, places)
        left = torch.arange((count - merge) * each, device=keys.device) + self.cls
        self.cells = left.view(-1, each).expand(len(keys), -1, -1)

    def _mean(self, states: Tensor) -> Tensor:
        """[B, T, C] states by the layer's own merge, in float32."""
        with unrounded(states):
            return (self.weights @ states.float()).to(states.dtype)

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Each call's rows by where each token was as the layer began."""
        if layer is None or layer not in self.begun:
            return rows
        return [
            (row / size.to(row.device)).gather(1, places.to(row.device))
            for row, (places, size) in zip(rows, self.begun[layer], strict=True)
        ]
