"""Which tokens of a tower become features: selections that do not fit the tower or the host."""

from __future__ import annotations

import pytest

from vlmprune import VisPruner, VlmpruneError
from zoo import ZOO

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
