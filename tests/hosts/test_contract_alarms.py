"""What is unusual and yet right is not refused, and a call within a call is one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import tiny
from vlmprune import PLPHP, EViT, FastV, ToMe, VisPruner
from vlmprune.pruner import Pruner

METHODS: dict[str, Callable[[], Pruner]] = {
    "VisPruner": lambda: VisPruner(keep=4),
    "PLPHP": lambda: PLPHP(r=0.4),
    "FastV": lambda: FastV(keep=0.5, layer=1),
}


def answer(built: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Ids of three new tokens."""
    ids: Tensor = built.generate(**inputs, do_sample=False, max_new_tokens=3, **more)
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_mostly_padding(method: str, attention: str, dtype: torch.dtype) -> None:
    """Queries of padding see nothing, and what a host makes of them is its own affair."""
    built = tiny.model(attention=attention).to(dtype)
    inputs = dict(tiny.request(built, [4, 1]).inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert int(inputs["attention_mask"][1].sum()) * 2 < inputs["attention_mask"].shape[1]
    with METHODS[method]()(built):
        assert len(answer(built, inputs)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    built = tiny.model()
    inputs = tiny.request(built, [2, 1]).inputs
    with torch.autocast("cpu", dtype=torch.bfloat16), METHODS[method]()(built):
        assert len(answer(built, inputs)) == 2


def layers_of(model: Any) -> Any:
    """Layers of a CLIP tower."""
    return model.model.vision_tower.encoder.layers


def zeroed(module: Any) -> None:
    for weight in module.parameters():
        weight.data.zero_()


@pytest.mark.parametrize(
    "still",
    [
        lambda model: zeroed(model.model.multi_modal_projector),
        lambda model: [zeroed(one.self_attn.out_proj) for one in layers_of(model)],
        lambda model: zeroed(model.model.vision_tower),
    ],
    ids=["projector", "attention", "tower"],
)
@pytest.mark.parametrize("pruner", [VisPruner(keep=4), ToMe(keep=6), EViT(keep=6)])
def test_a_tower_in_which_nothing_moves(pruner: Pruner, still: Callable[[Any], Any]) -> None:
    """As where a training begins; it proves nothing, and nothing wrong."""
    built = tiny.model()
    still(built)
    with pruner(built):
        answer(built, tiny.request(built, [1]).inputs)


def test_a_tower_with_dropout_is_proved_when_it_has_none() -> None:
    built = tiny.model()
    built.config.vision_config.attention_dropout = 0.5
    for layer in layers_of(built):
        layer.self_attn.dropout = 0.5
    inputs = tiny.request(built, [1]).inputs
    with VisPruner(keep=4)(built) as handle:
        built.train()(**inputs)
        key = ("cells", "get_image_features")
        assert not any(one[:2] == key for one in handle.attachment.ledger._proved)
        built.eval()(**inputs)
        assert any(one[:2] == key for one in handle.attachment.ledger._proved)


def test_one_picture_that_is_not_a_number_is_no_broken_contract() -> None:
    built = tiny.model()
    inputs = tiny.request(built, [1, 1]).inputs
    inputs["pixel_values"][0] = torch.nan
    with VisPruner(keep=4)(built):
        answer(built, inputs)


class Meanwhile(LogitsProcessor):
    """Runs the model on something else at each step."""

    def __init__(self, model: Any, asked: dict[str, Tensor]) -> None:
        self.model, self.asked = model, asked
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append(self.model(**self.asked).logits)
        return scores


class Showing:
    """A streamer that runs the model on words before the prompt is read, and after."""

    def __init__(self, model: Any, asked: dict[str, Tensor]) -> None:
        self.model, self.asked = model, asked
        self.seen: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(self.model(**self.asked).logits)

    def end(self) -> None:
        pass


@torch.no_grad()
@pytest.mark.parametrize("picture", [False, True], ids=["words", "picture"])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_within_a_call(method: str, picture: bool) -> None:
    """Neither has to do with the other."""
    built = tiny.model()
    inputs = tiny.request(built, [1]).inputs
    asked = tiny.request(built, [2 if picture else 0], seed=5).inputs
    with METHODS[method]()(built):
        alone, expected = built(**asked).logits, answer(built, inputs)
        for watch, how in (
            (Meanwhile(built, asked), "logits_processor"),
            (Showing(built, asked), "streamer"),
        ):
            given = [watch] if how == "logits_processor" else watch
            assert torch.equal(answer(built, inputs, **{how: given}), expected)
            assert watch.seen and all(torch.equal(one, alone) for one in watch.seen)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_towers() -> None:
    built = tiny.model()
    small = torch.ao.quantization.quantize_dynamic(built, {torch.nn.Linear}, torch.qint8)
    with VisPruner(keep=4)(small):
        answer(small, tiny.request(built, [1]).inputs)
