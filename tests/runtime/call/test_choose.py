"""What a model's images are pruned to is VisPruner's choice on its encoder's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import model, request
from vlmprune import VisPruner, select

pytestmark = pytest.mark.oracle


def eager_rows(built: Any, pixels: Any, layer: int, cls: bool) -> Any:
    """[crops, N] attention of one layer, from all the weights that eager attention returns."""
    tower = built.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    weights = out.attentions[layer].mean(dim=1)
    return (weights[:, 0, 1:] if cls else weights.mean(dim=1)), out.hidden_states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "feature_layer", "layer"),
    [
        # Hidden state 0 is the embedding: of three layers, -2 is the output of number 1.
        ("clip", -2, 1),
        ("clip", -1, 2),
        ("clip", 1, 0),
        ("clip", [1, -2], 1),
        ("dinov2", -2, 1),
        # Without a CLS token: what the last layer's queries give.
        ("siglip", -2, 2),
    ],
)
def test_the_choice_follows_the_feature_layer(
    kind: str, feature_layer: Any, layer: int, attention: str
) -> None:
    built = model(kind=kind, attention=attention, vision_feature_layer=feature_layer)
    req = request(built, [2])
    with VisPruner(keep=5)(built) as handle:
        built.generate(**req.inputs, max_new_tokens=1)
    assert handle.report is not None
    assert f"encoder layer {layer}" in handle.report.score

    cls = kind != "siglip"
    layers = feature_layer if isinstance(feature_layer, list) else [feature_layer]

    def choice(number: int) -> list[list[int]]:
        rows, hidden = eager_rows(built, req.inputs["pixel_values"], number, cls)
        features = torch.cat([hidden[i][:, int(cls) :] for i in layers], dim=-1)
        return select.vispruner(rows, features, 5).tolist()

    kept = [k.tolist() for k in handle.report.kept]
    assert kept == choice(layer)
    assert all(kept != choice(other) for other in range(3) if other != layer)


def test_a_layer_given_in_the_call_counts() -> None:
    built = model()
    req = request(built, [2])
    with VisPruner(keep=5)(built) as handle, torch.no_grad():
        built(**req.inputs, vision_feature_layer=-1)
        assert handle.report is not None and "encoder layer 2" in handle.report.score
        rows, hidden = eager_rows(built, req.inputs["pixel_values"], 2, True)
        expected = select.vispruner(rows, hidden[-1][:, 1:], 5)
    assert [k.tolist() for k in handle.report.kept] == expected.tolist()


def test_any_resolution_crops_are_chosen_one_by_one() -> None:
    built = model("llava_next")
    req = request(built, [1])
    with VisPruner(keep=5)(built) as handle:
        built.generate(**req.inputs, max_new_tokens=1)
    assert handle.report is not None
    layout = handle.report.layouts[0]
    rows, hidden = eager_rows(built, req.inputs["pixel_values"][0, : layout.crops], 1, True)
    labels = layout.labels[handle.report.kept[0]]
    for crop, seen in enumerate(layout.candidates()):
        # The choice among the patches that the language model would see.
        cells = seen.nonzero()[:, 0]
        mine = select.vispruner(
            rows[crop][cells][None], hidden[-2][crop, 1:][cells][None], min(5, len(cells))
        )
        expected = (cells[mine[0]] + 16 * crop).tolist()
        own = labels[(labels >= 16 * crop) & (labels < 16 * (crop + 1))]
        assert sorted(own.tolist()) == expected
