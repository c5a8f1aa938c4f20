"""Attention that a method wants to look at and cannot read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from answers import generate
from sabotage import ROWS
from tiny import model, request
from vlmprune import PLPHP, FastV, GSearch, Recall, VlmpruneError


@pytest.fixture
def biased(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose decoder hands a bias on to its attention function, which adds it."""
    built = model()
    cls = type(built.get_decoder().layers[0].self_attn)
    own, sdpa = cls.forward, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs, position_bias=torch.zeros(1, 1, 1, 1))

    def attend(module: Any, *args: Any, position_bias: Any = None, **kwargs: Any) -> Any:
        return sdpa(module, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    return built


def test_biases_are_refused_where_rows_leave(biased: Any) -> None:
    said = (
        r"^the attention of LlamaAttention has sinks or biases \(position_bias\), which a method "
        "that drops rows does not know; prune before the language model"
    )
    with FastV(keep=4)(biased), pytest.raises(VlmpruneError, match=said):
        generate(biased, request(biased, [1]).inputs)


@pytest.mark.parametrize("pruner", [PLPHP(), Recall(read=2, floor=0, always=True)], ids=repr)
def test_biases_are_refused_over_a_cut_cache(biased: Any, pruner: Any) -> None:
    said = (
        "^attention with position_bias cannot be used with a cut cache; prune before the language"
    )
    with pruner(biased), pytest.raises(VlmpruneError, match=said):
        generate(biased, request(biased, [1]).inputs)


def test_a_layer_past_the_registry_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's own attention is wanted, before the layer runs."""
    built = model()
    inputs = request(built, [1]).inputs
    pruner = GSearch(rates=(1.0, 0.5, 0.5))
    with pruner(built):
        generate(built, inputs)
    (row,) = [one for one in ROWS if one.name == "attention passes the registry by, decoder"]
    row.change(built, monkeypatch)
    said = "^LlamaDecoderLayer does not attend through Transformers' attention registry, so its att"
    with pruner(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)
