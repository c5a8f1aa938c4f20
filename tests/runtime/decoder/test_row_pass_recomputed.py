"""Rows that leave layers under gradient checkpointing: what is recomputed has the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT
from vlmprune import DART, FastV, PyramidDrop, SparseVLM, VisPruner, VlmpruneError, ZipVL
from vlmprune.hosts import decoder, release
from zoo import ZOO, Request

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

METHODS = {
    "fastv": FastV(keep=3, layer=1),
    "fastv compact": FastV(keep=3, layer=2, positions="compact"),
    "dart": DART(keep=3, layer=1),
    "pyramiddrop": PyramidDrop(ratio=0.5, stages=2),
    "sparsevlm": SparseVLM(keep=3),
    "chain": VisPruner(keep=8) | FastV(keep=3, layer=1),
}
ROWS = [["image"], ["image", "image"]]


def step(built: Any, req: Request, pruner: Any) -> tuple[float, dict[str, Tensor], int]:
    """The loss of a training step, its gradients, and how often decoder layers ran."""
    calls = []
    layers = decoder.decoder_layers(built)
    norms = [
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1)) for layer in layers
    ]
    built.zero_grad()
    labels = req.inputs["input_ids"].masked_fill(req.inputs["attention_mask"] == 0, -100)
    inputs = {**req.inputs, "labels": labels, "use_cache": False}
    if pruner is None:
        loss = built(**inputs).loss
    else:
        with pruner(built) as handle:
            loss = built(**inputs).loss
        assert handle.report.layers
    # The pruner is off: what is recomputed is so by what was given to the layers.
    loss.backward()
    for one in norms:
        one.remove()
    grads = {n: w.grad.clone() for n, w in built.named_parameters() if w.grad is not None}
    return float(loss.detach()), grads, len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "family"),
    # Qwen's three positions cannot be renumbered.
    [(method, "llava") for method in METHODS]
    + [(method, "qwen2_5_vl") for method in METHODS if "compact" not in method],
)
def test_loss_and_gradients_are_those_without(method: str, family: str, reentrant: bool) -> None:
    built, pruner = ZOO[family].build().train(), METHODS[method]
    req = ZOO[family].request(built, ROWS, text=[5, 8])
    loss, grads, once = step(built, req, pruner)
    whole, _, _ = step(built, req, None)
    assert abs(loss - whole) > DIFFERENT
    name = "activation_checkpointing_enable"
    getattr(built, name, None) or (name := "gradient_checkpointing_enable")
    getattr(built, name)({"use_reentrant": reentrant})
    if release.recomputes_hooks():
        with pruner(built), pytest.raises(VlmpruneError, match="turn gradient checkpointing off"):
            built(**req.inputs)
        return
    again, theirs, twice = step(built, req, pruner)
    assert twice > once
    assert abs(again - loss) < 1e-6
    assert theirs.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(theirs[name], grad, rtol=1e-4, atol=1e-6), name


def test_it_is_told_by_what_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On releases that recompute hooks too, the call is refused before any work."""
    built = ZOO["llava"].build().train()
    req = ZOO["llava"].request(built, [["image"]], text=[5])
    name = "activation_checkpointing_enable"
    getattr(built, name, None) or (name := "gradient_checkpointing_enable")
    getattr(built, name)()
    monkeypatch.setattr("vlmprune.runtime.call.refusals.recomputes_hooks", lambda: True)
    with (
        FastV(keep=3)(built),
        pytest.raises(VlmpruneError, match="turn gradient checkpointing off"),
    ):
        built(**req.inputs)


def test_what_needs_a_cache_says_that_there_is_none() -> None:
    """ZipVL takes part in attention, which is recomputed without it, too."""
    built = ZOO["llava"].build().train()
    req = ZOO["llava"].request(built, [["image"]], text=[5])
    name = "activation_checkpointing_enable"
    getattr(built, name, None) or (name := "gradient_checkpointing_enable")
    getattr(built, name)()
    said = (
        r"^ZipVL\(.* in attention, which is computed twice here, and cuts a cache, which is not th"
    )
    with ZipVL(tau=0.6)(built), pytest.raises(VlmpruneError, match=said):
        built(**req.inputs)
