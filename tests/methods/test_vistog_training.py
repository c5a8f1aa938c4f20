"""VisToG in training: who gets gradients, its stages, and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import model, request
from vistog_host import host, vistog
from vlmprune import VisToG, VlmpruneError
from vlmprune.hosts import contract
from vlmprune.runtime.family import family_of

KINDS = ["clip", "siglip", "dinov2"]


def labelled(inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return labels


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_module_alone(kind: str) -> None:
    """From a fresh module on, though its semantic tokens are in no group's token yet."""
    built = model(kind=kind)  # not frozen
    pruner = VisToG.fresh(built, tokens=5)
    pruner.module.train()
    req = request(built, [2, 1])
    layer = family_of(built).media[0].encoder(built, {}).layers[0]
    passes: list[tuple[int, bool]] = []
    hook = layer.register_forward_hook(
        lambda _, __, out: passes.append(
            ((out if isinstance(out, Tensor) else out[0]).shape[1], out[0].requires_grad)
        )
    )
    torch.manual_seed(0)
    # The contract's own run of the tower aside.
    with contract.switched_off(), pruner(built):
        built(**req.inputs, labels=labelled(req.inputs)).loss.backward()
    hook.remove()
    # Patches go without gradients, the tokens with.
    assert passes == [(16 + (kind != "siglip"), False), (5, True)]
    for name, weight in pruner.module.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 1e-7, name
    for name, weight in built.named_parameters():
        reached = weight.grad is not None and bool(weight.grad.abs().max() > 0)
        assert reached == ("language_model" in name or "lm_head" in name), name
        assert weight.requires_grad


def test_stages() -> None:
    """What each moves, of a model that is frozen."""
    built = model().requires_grad_(False)
    pruner = VisToG.fresh(built, tokens=5)
    parts = [
        f"{part}.{kind}" for part in ("keys.0", "keys.1", "values") for kind in ("weight", "bias")
    ]
    parts += ["gain", "queries.0.weight", "queries.1.weight"]
    grouping = [f"grouping.{name}" for name in parts]
    projector = [f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert sorted(pruner.trains("align")) == sorted(["semantic", *grouping])
    assert sorted(pruner.trains("tune")) == sorted([*grouping, *projector])
    with pytest.raises(VlmpruneError, match="stage='both' is not known; use align or tune"):
        pruner.trains("both")
    req = request(built, [1])
    for stage in ("align", "tune"):
        for name, weight in pruner.module.named_parameters():
            weight.requires_grad_(name in pruner.trains(stage))
            weight.grad = None
        with pruner(built):
            built(**req.inputs, labels=labelled(req.inputs)).loss.backward()
        moved = [n for n, w in pruner.module.named_parameters() if w.grad is not None]
        assert sorted(moved) == sorted(pruner.trains(stage))
    assert all(weight.grad is None for weight in built.parameters())


def test_steps_lower_the_loss_on_a_fixed_batch() -> None:
    built = model().requires_grad_(False)
    pruner = VisToG.fresh(built, tokens=5)
    pruner.module.train()
    req = request(built, [1, 1])
    optimizer = torch.optim.Adam(pruner.module.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    with pruner(built):
        for _ in range(15):
            loss = built(**req.inputs, labels=labelled(req.inputs)).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0] - 0.2


def test_saved_and_loaded(tmp_path: Any) -> None:
    built = host()
    pruner = vistog(built, temperature=0.5)
    pruner.save_pretrained(tmp_path)
    again = VisToG.from_pretrained(tmp_path)
    assert again == VisToG(weights=str(tmp_path))
    assert again.settings == pruner.settings and again.settings["temperature"] == 0.5
    req = request(built, [1, 1])
    with torch.no_grad():
        with pruner(built):
            want = built(**req.inputs).logits
        with again(built):
            assert torch.equal(built(**req.inputs).logits, want)
        with vistog(built, seed=1)(built):
            assert (built(**req.inputs).logits - want).abs().max() > 1e-3
