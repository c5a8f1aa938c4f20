"""Attention that does something to what its cache returns: known of at attach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DiffLlamaConfig,
    JetMoeConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from answers import generate
from vlmprune import PLPHP, FastV, Recall, VlmpruneError
from vlmprune.hosts import decoder
from vlmprune.hosts.contract import ContractError
from zoo.base import IMAGE, TEXT, VISION, WORDS, loud

DECODERS: dict[str, Callable[[], Any]] = {
    "DiffLlamaAttention": lambda: DiffLlamaConfig(**TEXT, head_dim=8),
    "JetMoeAttention": lambda: JetMoeConfig(
        **{k: v for k, v in TEXT.items() if k != "num_attention_heads"},
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}
RECALL = Recall(read=0.3, floor=0, rest="none")
TWICE = FastV(keep=4, layer=1)


def built(name: str) -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=28, patch_size=7)
    text = DECODERS[name]()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return loud(LlavaForConditionalGeneration(config))


CASES = [(name, pruner) for name in DECODERS for pruner in (PLPHP(), RECALL)]
CASES.append(("DiffLlamaAttention", TWICE))
# What the first call says.
SAID = {
    ("DiffLlamaAttention", "PLPHP"): "the keys that one cache layer returns are attended to twice",
    ("DiffLlamaAttention", "Recall"): "the keys that one cache layer returns are attended to twice",
    ("DiffLlamaAttention", "FastV"): "it attends more than once a layer",
    ("JetMoeAttention", "PLPHP"): "the attention registry to the keys that its cache returns",
    ("JetMoeAttention", "Recall"): "the attention registry to the keys that its cache returns",
}


@pytest.mark.parametrize(("name", "pruner"), CASES, ids=str)
def test_it_is_refused_at_attach(name: str, pruner: Any) -> None:
    with pytest.raises(VlmpruneError, match=f"have {name}, which .* its cache returns"):
        pruner.attach(built(name))


@pytest.mark.parametrize(("name", "pruner"), CASES, ids=str)
def test_the_first_call_tells_it_where_attach_does_not_know(
    name: str, pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no entry outlives what it says."""
    for table in (decoder._TWICE, decoder._CHANGED):
        monkeypatch.delitem(table, name, raising=False)
    model = built(name)
    ids = torch.tensor([[1, *[IMAGE] * 16, WORDS, WORDS + 1]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    said = (
        f"^{name} cannot be pruned rightly .*{SAID[name, type(pruner).__name__]}; the model is as"
    )
    with pruner(model), pytest.raises(ContractError, match=said):
        generate(model, inputs)


def test_rows_may_leave_where_keys_are_repeated() -> None:
    FastV(keep=4, layer=1).attach(built("JetMoeAttention")).detach()
