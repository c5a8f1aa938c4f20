"""Layers whose caches are cut together: the same as one by one, in any call."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tiny import model, request
from vlmprune import PLPHP, VisPruner
from vlmprune.runtime.attention import interception
from vlmprune.runtime.decoder import cache_cut
from vlmprune.views import LayerView, Retention

LEVELS: dict[str, Any] = {"r": 0.4, "dr": 0.3, "alpha": 0.65, "beta": 0.6}
SETTINGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "adaptive": {"per_head": "adaptive"},
    "a window": {"window": 4},
    "evenly spread in part": {"coverage": 0.5},
    "a limit": {"max_layer_bytes": 4096},
    "from the second layer on": {"first_pruned_layer": 1},
}


def cut(method: Any, images: list[int], monkeypatch: Any, held: int) -> tuple[Any, list[Any]]:
    """What a call generates, and what its layers keep, when layers of so many bytes may wait."""
    built = model()
    monkeypatch.setattr(cache_cut, "HELD", held)
    with method(built) as handle:
        out = built.generate(**request(built, images).inputs, max_new_tokens=6, do_sample=False)
    return out, handle.report.layers


@pytest.mark.parametrize("images", [[2], [1, 1], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_together_as_one_by_one(
    settings: dict[str, Any], images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PLPHP(**{**LEVELS, **settings})
    alone, each = cut(method, images, monkeypatch, held=0)
    together, found = cut(method, images, monkeypatch, held=2**28)
    assert torch.equal(alone, together)
    assert [one.index for one in found] == [one.index for one in each]
    for one, other in zip(found, each, strict=True):
        assert torch.equal(one.mask, other.mask) and torch.equal(one.images, other.images)
        assert one.as_dict() == other.as_dict()
        assert one.kv_bytes == other.kv_bytes
    # Layers differ, so that what one keeps does not pass for what another does.
    assert not torch.equal(found[-1].mask, found[-2].mask)


class Own(PLPHP):
    """Has a rule of its own, in the call that is made layer by layer."""

    asked: ClassVar[list[int]] = []

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        self.asked.append(layer)
        found = super().retain(layer, view)
        assert found is not None
        kept = torch.zeros_like(found.kept)
        kept[:, :, layer] = True
        return Retention(kept, found.gamma, found.rate)


def test_a_subclass_with_a_rule_of_its_own_is_asked_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert PLPHP().retains_together and (VisPruner(keep=8) | PLPHP()).retains_together
    assert not Own().retains_together and not VisPruner(keep=8).retains_together
    Own.asked.clear()
    _, layers = cut(Own(), [1], monkeypatch, held=2**28)
    assert Own.asked == [0, 1, 2]
    for number, one in enumerate(layers):
        assert one.mask[0].nonzero()[:, 1].tolist() == [number] * one.mask.shape[1]


@pytest.mark.parametrize("per_head", ["equal", "adaptive"])
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=["no padding", "padding"])
def test_later_steps_are_not_taken_apart(
    per_head: Any, images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no mask comes; and they say the same as those that are."""
    built, calls = model(), list[Any]()
    plainly = interception.called

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        return plainly(*args, **kwargs)

    def answer(tokens: int) -> torch.Tensor:
        calls.clear()
        out = built.generate(
            **request(built, images).inputs,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    monkeypatch.setattr(interception, "called", counted)
    with PLPHP(**LEVELS, per_head=per_head)(built):
        answer(4)
        few = len(calls)
        quick = answer(8)
        # The prompt's attention and that of the first step, or of every one of seven.
        layers, padded = 3, len(images) > 1
        assert len(calls) - few == (4 * layers if padded else 0)
        assert few <= (4 if padded else 2) * layers
        monkeypatch.setattr("vlmprune.runtime.cache.tail_layer.TailLayer.at_once", _never)
        monkeypatch.setattr("vlmprune.runtime.cache.ragged_layer.RaggedLayer.at_once", _never)
        slow = answer(8)
        assert len(calls) == 8 * layers
    assert torch.equal(quick, slow)


def _never(*_: Any) -> None:
    return None
