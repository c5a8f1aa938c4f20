"""Who has which heads of an attention, told without processes; with them `test_processes` does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmprune import VlmpruneError
from vlmprune.hosts import parallel
from vlmprune.hosts.parallel import WHOLE, Sharing


class Mesh:
    """Stands for a mesh of devices of which this process has the second place."""

    def __init__(self, size: int) -> None:
        self.ranks = size

    def size(self, number: int) -> int:
        return self.ranks

    def get_group(self, number: int) -> str:
        return f"group {number}"

    def get_local_rank(self, number: int) -> int:
        return 1


def test_a_process_has_its_part_of_the_heads() -> None:
    values = torch.arange(24).view(1, 4, 6)
    assert WHOLE.own(values) is values
    assert torch.equal(Sharing(object(), 2, 0).own(values), values[:, :2])
    assert torch.equal(Sharing(object(), 2, 1).own(values), values[:, 2:])


def test_weights_tell_who_has_the_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.Linear(2, 2)
    module.config = SimpleNamespace(num_attention_heads=8)
    monkeypatch.setattr(parallel.distributed, "is_available", lambda: True)
    assert parallel.sharing(module, 4) is WHOLE
    monkeypatch.setattr(parallel.distributed, "is_initialized", lambda: True)

    def over(*meshes: Mesh) -> None:
        monkeypatch.setattr(parallel, "_shards", lambda _: {(mesh, 0) for mesh in meshes})

    over(Mesh(2))
    assert parallel.sharing(module, 4) == Sharing("group 0", 2, 1)
    # Projections that are gathered, and none that are cut.
    assert parallel.sharing(module, 8) is WHOLE
    over()
    assert parallel.sharing(module, 4) is WHOLE
    # Parts that do not make the whole, and weights that are cut in two ways.
    for meshes in ((Mesh(4),), (Mesh(2), Mesh(2))):
        over(*meshes)
        with pytest.raises(VlmpruneError, match="has 4 of 8 heads in this process"):
            parallel.sharing(module, 4)
