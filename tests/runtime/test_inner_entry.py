"""`model.model(...)` and `base_model(...)` are pruned as `model(...)` is, at the user's columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from answers import same
from vlmprune import PLPHP, FastV, VisPruner, VlmpruneError
from zoo import ZOO

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]


def request(family: str, rows: list[list[Any]], side: str = "left") -> tuple[Any, dict[str, Any]]:
    model = ZOO[family].build()
    return model, dict(ZOO[family].request(model, rows, text=[5, 8][: len(rows)], side=side).inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_stand_at_the_users_columns(family: str, side: str) -> None:
    """Heads of one's own give what the model's head gives, whose logits are the shorter ones."""
    model, inputs = request(family, [["image"], ["image", "image"]], side)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad(), VisPruner(keep=3)(model) as handle:
        short = model(**inputs)
        kept = handle.report.kept
        out = model.model(**inputs, output_hidden_states=True)
        assert all(torch.equal(a, b) for a, b in zip(handle.report.kept, kept, strict=True))
        states = out.last_hidden_state
        assert states.shape[:2] == inputs["input_ids"].shape
        assert all(one.shape[:2] == states.shape[:2] for one in out.hidden_states)
        logits = model.lm_head(states)
        assert short.logits.shape[1] < logits.shape[1]
        # The words behind the last image, row by row, and the state that foretells the first.
        for row in range(2):
            words = 6 if row == 0 else 9
            ours = logits[row][mask[row]][-words:]
            theirs = short.logits[row]
            places = [
                at
                for at in range(len(theirs) - words + 1)
                if torch.allclose(theirs[at : at + words], ours, atol=1e-5)
            ]
            assert len(places) == 1
    with torch.no_grad():
        whole = model.model(**inputs).last_hidden_state
    assert whole.shape == states.shape
    assert not torch.allclose(whole[mask], states[mask], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_no_bit(family: str) -> None:
    model, inputs = request(family, [["image"], ["image", "image"]])
    with torch.no_grad():
        plain = model.model(**inputs).last_hidden_state
        with VisPruner(keep=1.0)(model):
            assert torch.equal(model.base_model(**inputs).last_hidden_state, plain)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_a_fused_head_trains_as_the_models_own_loss(family: str) -> None:
    """A trainer's head that calls the model below, and labels at the user's columns."""
    model, inputs = request(family, [["image"], ["image", "image"]])
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    loss: dict[str, Any] = {}
    grads = {}
    with VisPruner(keep=3)(model):
        for way in ("own", "fused"):
            model.zero_grad()
            if way == "own":
                loss[way] = model(**inputs, labels=labels).loss
            else:
                states = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
                logits = model.lm_head(states).flatten(0, 1).float()
                loss[way] = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            loss[way].backward()
            grads[way] = model.lm_head.weight.grad.clone()
    assert abs(float((loss["own"] - loss["fused"]).detach())) < 1e-5
    assert same(grads["own"], grads["fused"])
    with torch.no_grad():
        assert abs(float((model(**inputs, labels=labels).loss - loss["own"]).detach())) > 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_tuples_are_put_at_the_users_columns_too(family: str) -> None:
    model, inputs = request(family, [["image"]])
    with torch.no_grad(), VisPruner(keep=3)(model):
        named = model.model(**inputs, output_hidden_states=True)
        plain = model.model(**inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.last_hidden_state)
    assert any(
        isinstance(one, tuple) and len(one) == len(named.hidden_states) and same(one[1], states)
        for one in plain
        for states in [named.hidden_states[1]]
    )


def test_methods_inside_the_language_model_act_there_too() -> None:
    model, inputs = request("llava", [["image"]])
    with torch.no_grad():
        whole = model.model(**inputs).last_hidden_state
        with FastV(keep=2, layer=1)(model) as handle:
            states = model.model(**inputs).last_hidden_state
            assert handle.report.layers
        assert states.shape == whole.shape
        assert not torch.allclose(states[:, -1], whole[:, -1], atol=1e-4)
        with PLPHP(r=0.3)(model) as handle:
            out = model.model(**inputs, use_cache=True)
            # Prefill is whole; the cache is cut.
            assert same(out.last_hidden_state, whole)
            assert handle.report.layers


def test_what_shows_no_images_is_refused_there_too() -> None:
    model, inputs = request("llava", [["image"]])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    with VisPruner(keep=3)(model), pytest.raises(VlmpruneError, match="inputs_embeds"):
        model.model(**inputs, inputs_embeds=embedded)
