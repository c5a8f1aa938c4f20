"""Models that no record knows: followed by a self-check, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Cohere2VisionForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from answers import DIFFERENT, TOLERANCE, distance
from unrecorded import MAKES, SIDE, built_by, cohere2_vision, deepseek_vl, got_ocr2, request
from vlmprune import VisPruner, VlmpruneError
from vlmprune.hosts.families import FAMILIES
from vlmprune.hosts.families.generic import unfit
from vlmprune.runtime.encoder import trial
from vlmprune.runtime.family import family_of
from zoo.base import IMAGE, TEXT


def generate(built: Any, inputs: dict[str, Tensor]) -> Any:
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    config = built.generation_config
    # Some of these classes have no pad token of their own.
    config.pad_token_id = TEXT["pad_token_id"]
    return built.generate(**inputs, **settings, output_logits=True)


@pytest.mark.oracle
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_models_of_no_record_equal_masking(make: Callable[[], Any], attention: str) -> None:
    built = built_by(make, attention)
    assert built.config.model_type not in FAMILIES
    inputs = request(built, [2, 1, 0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with VisPruner(keep=0.4, positions="original")(built) as handle:
        pruned = generate(built, inputs)
    report = handle.report
    assert report is not None and "encoder layer" in report.score
    places = (ids == IMAGE).nonzero().split([len(one.labels) for one in report.layouts])
    for chosen in (report.kept, [(kept + 1) % 9 for kept in report.kept]):
        dropped = torch.zeros_like(mask, dtype=torch.bool)
        for place, kept in zip(places, chosen, strict=True):
            goes = torch.ones(len(place), dtype=torch.bool)
            goes[kept] = False
            dropped[place[goes, 0], place[goes, 1]] = True
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        changed = {"attention_mask": mask * ~dropped, "position_ids": positions}
        expected = generate(built, inputs | changed)
        if chosen is report.kept:
            assert torch.equal(pruned.sequences, expected.sequences)
            assert distance(pruned, expected) < TOLERANCE
        else:
            assert distance(pruned, expected) > DIFFERENT


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_keeping_everything_changes_no_bit(make: Callable[[], Any]) -> None:
    built = built_by(make)
    inputs = request(built, [2, 1])
    plain = generate(built, inputs)
    with VisPruner(keep=1.0)(built):
        same = generate(built, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))


def test_the_self_check_runs_once_and_leaves_no_trace(monkeypatch: Any) -> None:
    built = built_by(cohere2_vision)
    trial._found.clear()
    calls = []
    check = trial._self_check
    monkeypatch.setattr(trial, "_self_check", lambda model: calls.append(1) or check(model))
    built.train()
    before = {name: dict(vars(module)) for name, module in built.named_modules()}
    first = family_of(built)
    assert family_of(built_by(cohere2_vision)) is first and len(calls) == 1
    for name, module in built.named_modules():
        assert module.training and not module._forward_hooks and not module._forward_pre_hooks
        assert vars(module).keys() == before[name].keys()
    assert all(weight.grad is None for weight in built.parameters())


class Swapped(Cohere2VisionForConditionalGeneration):
    """Two of its visual tokens change places, which nothing but a measurement can tell."""


class MixedForConditionalGeneration(Cohere2VisionForConditionalGeneration):
    """The same with a class name that qualifies."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inner = self.model.multi_modal_projector
        self.model.multi_modal_projector = Exchange(inner)


class Exchange(nn.Module):
    """A projector whose first two tokens are exchanged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        out = self.inner(features).flatten(1, 2)
        return torch.cat((out[:, 1:2], out[:, :1], out[:, 2:]), dim=1)


def mixed() -> Any:
    return MixedForConditionalGeneration(cohere2_vision().config)


def swapped() -> Any:
    return Swapped(cohere2_vision().config)


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def without_size() -> Any:
    built = cohere2_vision()
    built.config.vision_config.image_size = SIDE + 1
    return built


def without_layers() -> Any:
    built = cohere2_vision()
    built.config.vision_config.num_hidden_layers = 17
    return built


class FlatForConditionalGeneration(Cohere2VisionForConditionalGeneration):
    """Its tokens lie in one row, whatever image they are of."""


class DoubleForConditionalGeneration(Cohere2VisionForConditionalGeneration):
    """It wants the size of each image, too."""


def flat() -> Any:
    built = FlatForConditionalGeneration(cohere2_vision().config)
    own = built.model.get_image_features

    def features(pixel_values: Tensor, **more: Any) -> Any:
        output = own(pixel_values, **more)
        output.pooler_output = torch.cat(list(output.pooler_output)).flatten(0, -2)
        return output

    built.model.get_image_features = features
    return built


def double() -> Any:
    built = DoubleForConditionalGeneration(cohere2_vision().config)

    def features(pixel_values: Tensor, image_sizes: Tensor) -> Any:
        raise AssertionError("no sizes came")

    built.model.get_image_features = features
    return built


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (without_size, "its vision config gives no image size in whole patches"),
        (without_layers, "its vision tower is no list of layers"),
        (flat, "its get_image_features does not return [images, tokens, width]"),
        (double, "its get_image_features does not take one plain image (TypeError)"),
        (got_ocr2, "its image features do not come from one list of layers"),
        (mixed, "its visual tokens are not each made of one square of patches"),
        (swapped, "its class is no …ForConditionalGeneration"),
        (t5, "it has no get_image_features"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unfit_classes_are_refused_by_name(make: Callable[[], Any], why: str) -> None:
    torch.manual_seed(0)
    built = make().eval()
    with pytest.raises(VlmpruneError) as refusal:
        VisPruner(keep=0.5).attach(built)
    said = f"vlmprune cannot follow {type(built).__name__}: {why}; `vlmprune models` lists"
    assert str(refusal.value).startswith(said)


def other_first(built: Any) -> None:
    own = built.model.get_image_features
    built.model.get_image_features = lambda sizes, pixel_values: own(pixel_values)


def unplaced(built: Any) -> None:
    # Past the config's own checks.
    vars(built.config)["image_token_id"] = None


def blind(built: Any) -> None:
    built.config.vision_config = None


def encoding(built: Any) -> None:
    built.config.is_encoder_decoder = True


def turning(built: Any) -> None:
    built.model.get_rope_index = lambda *_: None


def sparse(built: Any) -> None:
    built.config.text_config.layer_types = ["sparse", *["full_attention"] * 2]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_first, "its get_image_features does not begin with pixel_values"),
        (unplaced, "its config has no image_token_id"),
        (blind, "its config has no vision_config"),
        (encoding, "its language model has an encoder of its own"),
        (turning, "its visual tokens have three positions each"),
        (sparse, "its language model has layers of sparse"),
    ],
)
def test_what_a_class_says_of_itself_is_told_without_a_trial(
    change: Callable[[Any], Any], why: str
) -> None:
    built = built_by(cohere2_vision)
    assert unfit(built) is None
    change(built)
    assert unfit(built) == why


def test_images_of_another_size_are_refused() -> None:
    built = built_by(deepseek_vl)
    inputs = request(built, [1])
    inputs["pixel_values"] = inputs["pixel_values"][..., : SIDE - 8, :]
    with VisPruner(keep=0.5)(built), pytest.raises(VlmpruneError, match="checked at 48 x 48"):
        generate(built, inputs)


def test_pictures_of_another_size_than_was_checked_are_refused() -> None:
    built = cohere2_vision()
    inputs = request(built, [1])
    pixels = inputs["pixel_values"]
    wide = torch.zeros(*pixels.shape[:3], pixels.shape[3] + 14)
    height, width = wide.shape[2:]
    sentence = rf"pixel_values are {height} x {width}, but the layout of .* was checked at"
    with VisPruner(keep=2)(built), pytest.raises(VlmpruneError, match=sentence):
        generate(built, {**inputs, "pixel_values": wide})


def test_a_model_that_is_trained_is_checked_without_dropout() -> None:
    """And is in training again afterwards, but for what was not."""
    built = cohere2_vision().train()
    for module in built.modules():
        if type(module).__name__ == "SiglipAttention":
            module.dropout = 0.5
    built.lm_head.eval()
    # What an earlier test found would do.
    trial._found.clear()
    before = [module.training for module in built.modules()]
    with VisPruner(keep=2)(built):
        assert [module.training for module in built.modules()] == before
    assert before.count(False) == 1
