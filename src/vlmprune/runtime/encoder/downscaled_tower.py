"""Pixels scaled down in front of a vision tower, and its tokens put back on the full grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import outputs, towers
from vlmprune.hosts.towers import TowerCall
from vlmprune.runtime.encoder.tower_run import TowerRun
from vlmprune.runtime.hooks import Hooks
from vlmprune.select import coarse_grid
from vlmprune.views import Inside


class DownscaledTower(TowerRun):
    """Pixels scaled down in front of a tower, and its tokens put back on the full grid."""

    def __init__(
        self,
        tower: Any,
        grid: tuple[int, int],
        inside: Inside,
        cls: int | None,
        hooks: Hooks,
    ) -> None:
        super().__init__(inside)
        small = inside.grid or grid
        cells, prefix = coarse_grid.sources(grid, small), int(cls == 0)
        self.index = torch.cat((torch.arange(prefix), cells + prefix))
        if cls == -1:
            self.index = torch.cat((cells, torch.tensor([small[0] * small[1]])))
        size = [n * towers.patch_size(tower) for n in small]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = TowerCall(tower, args, kwargs)
            pixels = call.pixels
            self.shared += [cells.to(pixels.device)] * len(pixels)
            few = nn.functional.interpolate(
                pixels.float(), size=size, mode="bilinear", antialias=True
            ).to(pixels.dtype)
            return call.scaled(few)

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            states = outputs.states_of(output)
            full = tuple(None if one is None else _put(one, self.index) for one in states)
            if full:
                outputs.set_states(output, full)
            outputs.set_last(output, _put(outputs.last_of(output), self.index))

        hooks.before(tower, before)
        hooks.after(tower, after)

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Each call's rows on the full grid; the layer makes no difference."""
        return [_put(row / self.index.bincount().to(row.device), self.index) for row in rows]


def _put(states: Tensor, index: Tensor) -> Tensor:
    return states[:, index.to(states.device)]
