"""Attention functions that are not where the release has them: told at attach."""

from __future__ import annotations

import pytest
from transformers.models.llama import modeling_llama

from tiny import model
from vlmprune import PLPHP, VlmpruneError


def test_a_registry_without_entries_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    PLPHP().attach(built).detach()
    registry = "ALL_ATTENTION_FUNCTIONS"
    monkeypatch.setattr(modeling_llama, registry, dict(getattr(modeling_llama, registry)))
    said = (
        "^the attention registry of LlamaAttention in transformers .* has no entries of its own, so"
    )
    with pytest.raises(VlmpruneError, match=said):
        PLPHP().attach(built)


def test_an_eager_function_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    built.set_attn_implementation("eager")
    PLPHP().attach(built).detach()
    monkeypatch.delattr(modeling_llama, "eager_attention_forward")
    said = (
        "^the attention function of LlamaAttention in transformers .* is not registered and not "
        "found, .*; load the model with attn_implementation='sdpa'"
    )
    with pytest.raises(VlmpruneError, match=said):
        PLPHP().attach(built)
