"""Which tokens of a tower become features: selections that do not fit the tower or the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from answers import generate
from tiny import model, request
from vlmprune import DivPrune, VisPruner, VlmpruneError
from zoo import ZOO
from zoo.gemma3n import FAMILIES as GEMMA3N

FULL = {"llava_next_video": "pool", "llava_onevision": "pack"}


@pytest.mark.parametrize("name", FULL)
def test_cls_tokens_that_the_host_cannot_take_are_refused(name: str) -> None:
    built = ZOO[name].build()
    VisPruner(keep=4).attach(built).detach()
    if name == "llava_onevision":
        # Its usual tower has no CLS token; that of another family has.
        built.model.vision_tower = ZOO["llava_next"].build().model.vision_tower
        built.config.vision_config = built.model.vision_tower.config
    built.config.vision_feature_select_strategy = "full"
    said = (
        "^vision_feature_select_strategy='full' passes CLS tokens on, which "
        f"{type(built).__name__} cannot {FULL[name]}; set it to 'default'"
    )
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=4).attach(built)


def test_the_first_patch_is_not_taken_for_a_cls_token() -> None:
    built = ZOO["llava_onevision"].build()
    built.config.vision_feature_select_strategy = "default"
    said = "^vision_feature_select_strategy='default' drops the first patch of a tower without"
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=4).attach(built)


def test_frames_without_a_cls_token_are_refused() -> None:
    built = ZOO["video_llava"].build()
    VisPruner(keep=4).attach(built).detach()
    other = model(kind="siglip")
    built.model.video_tower = built.model.image_tower = other.model.vision_tower
    built.config.vision_config = other.config.vision_config
    said = "^the vision tower 'siglip_vision_model' has no CLS token, which vlmprune expects before"
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=4).attach(built)


def test_a_config_of_another_depth_is_refused() -> None:
    built = model()
    built.config.vision_config.num_hidden_layers = 5
    with pytest.raises(VlmpruneError, match=r"^no list of 5 layers was found in CLIPVisionModel"):
        VisPruner(keep=4).attach(built)


def test_more_tokens_beside_the_patches_than_a_cls_token_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As registers are."""
    built = model()
    inputs = request(built, [1]).inputs
    cls = type(built.model.vision_tower.embeddings)
    own = cls.forward

    def with_a_register(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = own(self, *args, **kwargs)
        return torch.cat((tokens[:, :1], tokens), dim=1)

    monkeypatch.setattr(cls, "forward", with_a_register)
    said = "^the vision tower makes 18 tokens for 16 patches, which vlmprune cannot follow; towers"
    with VisPruner(keep=4)(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)


def test_a_number_of_tokens_that_makes_no_square_is_refused() -> None:
    built = GEMMA3N["gemma3n"].build()
    built.config.vision_soft_tokens_per_image = 15
    said = (
        "^vision_soft_tokens_per_image=15 is no square, which the host takes the visual tokens of"
    )
    with pytest.raises(VlmpruneError, match=said):
        DivPrune(keep=4).attach(built)
