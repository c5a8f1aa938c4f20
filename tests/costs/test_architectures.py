"""The one table of sizes: what stands in it, and that everything reads it there."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from vlmprune import costs
from vlmprune.costs import architectures, equal_compute
from vlmprune.costs.architectures import CROPS, DECODERS, KNOWN, SHAPES, SMALL
from vlmprune.costs.plan import plan
from vlmprune.study.bench import shapes


def test_the_names_of_plans_pairs_and_shapes() -> None:
    assert list(SHAPES) == [*KNOWN, "qwen2.5-vl-7b", *SMALL] == list(shapes.NAMES)
    assert {one.text_config for one in KNOWN.values()} <= set(DECODERS.values())
    assert {one.model for one in equal_compute.pairs(8)} == set(DECODERS)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_sizes_of_the_table(name: str) -> None:
    known, config = SHAPES[name], shapes.config_of(name)
    for part in ("text_config", "vision_config"):
        wanted, made = asdict(getattr(known, part)), getattr(config, part)
        wanted.pop("model_type", None)
        got = {field: getattr(made, field) for field in wanted}
        assert {k: list(v) if isinstance(v, list | tuple) else v for k, v in got.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()
        }


@pytest.mark.parametrize("name", KNOWN)
def test_crops_are_the_same_to_plans_and_shapes(name: str) -> None:
    config = shapes.config_of(name)
    crops = CROPS[config.model_type].count
    assert crops == shapes.crops_of(config) == plan(name).crops
    assert plan(name).visual_tokens_before == shapes.tokens_per_image(config)
    without = plan(name, newlines="drop").visual_tokens_after
    assert without == crops * shapes.tokens_per_crop(config)
    assert costs.patch_count(KNOWN[name]) == shapes.tokens_per_crop(config) == 576


def test_an_any_resolution_model_has_a_base_view_and_a_grid() -> None:
    assert {kind: one.count for kind, one in CROPS.items()} == {
        "llava": 1,
        "vipllava": 1,
        "llava_next": 5,
    }
    assert architectures.Crops(grid=3).count == 10
