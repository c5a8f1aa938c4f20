"""PLPHP's controls keep as much as PLPHP does, and other tokens; vlmprune's commands know them."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from torch import Tensor

from peaks import layer_view
from repository import ROOT
from retention import OneChoice, RandomHeads
from vlmprune import METHODS, PLPHP
from vlmprune.views import LayerView

RATES = {"r": 0.4, "dr": 0.3, "alpha": 0.9, "beta": 0.1}


def kept(pruner: PLPHP, view: LayerView) -> Tensor:
    found = pruner.retain(1, view)
    assert found is not None
    return found.kept


def test_controls_keep_as_many_tokens_of_each_head() -> None:
    view = layer_view(64)
    ours, drawn, one = (kept(cls(**RATES), view) for cls in (PLPHP, RandomHeads, OneChoice))
    counts = ours.sum(dim=2)
    for other in (drawn, one):
        assert torch.equal(other.sum(dim=2), counts) and not torch.equal(other, ours)
    # Each head has tokens of its own, or all have the same, those attended to most on average.
    assert not torch.equal(drawn[:, :1].expand_as(drawn), drawn)
    assert torch.equal(one[:, :1].expand_as(one), one)
    most = view.attention.mean(dim=1)[0].topk(int(counts[0, 0])).indices
    assert one[0, 0].nonzero()[:, 0].tolist() == sorted(most.tolist())
    # The same question draws the same, another seed or question others.
    assert torch.equal(kept(RandomHeads(**RATES), view), drawn)
    assert not torch.equal(kept(RandomHeads(**RATES, seed=1), view), drawn)


def test_the_commands_have_them_among_the_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cls in (("random_heads", RandomHeads), ("one_choice", OneChoice)):
        # So that they are gone afterwards.
        monkeypatch.setitem(METHODS, name, cls)
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setattr(sys, "argv", ["retention.py", "methods", "--brief"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "retention.py"), run_name="__main__")
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "random_heads" in told and "one_choice" in told
