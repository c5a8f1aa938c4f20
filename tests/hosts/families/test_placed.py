"""Patches that bring their places: which make a token, in whatever order they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance, generate
from stock import CACHE, cache_of
from vlmprune import DivPrune, VisPruner, VlmpruneError
from vlmprune.hosts.families import FAMILIES
from zoo import UNATTENDED, ZOO

pytestmark = pytest.mark.oracle

EVERY = {**ZOO, **UNATTENDED}
NAMES = [name for name in ("gemma4", "gemma4_small", "gemma4_unified") if name in EVERY]
TOWERED = [name for name in NAMES if name in ZOO]
ROWS: list[list[Any]] = [["image", "image", "image"]]


def choosing(name: str) -> Any:
    return (VisPruner if name in ZOO else DivPrune)(keep=0.4)


def tokens_of(built: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = built.base_model.get_image_features(
            inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
        )
    return list(output.pooler_output)


@pytest.mark.parametrize("name", TOWERED)
def test_each_token_is_made_of_its_members_alone(name: str) -> None:
    """A patch is moved behind the tower's last layer: the token that moves has it for a member."""
    built = EVERY[name].build()
    inputs = EVERY[name].request(built, ROWS).inputs
    medium: Any = FAMILIES["gemma4"].media[0]
    members = medium.members(built, inputs)
    moved: list[tuple[int, int]] = []

    def move(_: Any, __: Any, output: Any) -> Any:
        states = output.clone()
        if moved:
            states[moved[-1]] += 3 * torch.randn(states.shape[-1])
        return states

    hook = medium.scored(built, inputs).layer.register_forward_hook(move, prepend=True)
    before = tokens_of(built, inputs)
    for crop, own in enumerate(members):
        owners: list[list[int]] = [[] for _ in own]
        for patch in own.flatten().tolist():
            moved.append((crop, patch))
            for image, (new, old) in enumerate(zip(tokens_of(built, inputs), before, strict=True)):
                changed = ((new - old).abs().amax(dim=1) > 1e-5).nonzero()[:, 0].tolist()
                assert len(changed) == (image == crop)
                for token in changed:
                    owners[token].append(patch)
        assert [sorted(one) for one in owners] == [sorted(one) for one in own.tolist()]
        assert own.unique().numel() == own.numel()
    # The control: padding moves nothing.
    last = inputs["pixel_values"].shape[1] - 1
    moved.append((0, last))
    again = tokens_of(built, inputs)
    assert all(torch.equal(new, old) for new, old in zip(again, before, strict=True))
    hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_patches_may_come_in_any_order(name: str) -> None:
    """With a tower, tokens lie by place; without one, as the patches come."""
    built, entry = EVERY[name].build(), EVERY[name]
    req = entry.request(built, ROWS)
    order = torch.randperm(
        req.inputs["pixel_values"].shape[1], generator=torch.Generator().manual_seed(3)
    )
    shuffled = {n: req.inputs[n][:, order] for n in ("pixel_values", "image_position_ids")}
    pruner = choosing(name)
    with pruner(built) as handle:
        straight = generate(built, req.inputs)
        first = handle.report
        mixed = generate(built, req.inputs | shuffled)
        second = handle.report
    for one, two in zip(first.layouts, second.layouts, strict=True):
        assert one.grid == two.grid and torch.equal(
            one.labels.sort().values, two.labels.sort().values
        )
        assert torch.equal(one.labels, two.labels) == (name in TOWERED)
    cells = [
        [layout.labels[kept].sort().values for layout, kept in zip(r.layouts, r.kept, strict=True)]
        for r in (first, second)
    ]
    # The same places of the pictures are kept, whichever patch came first.
    assert all(torch.equal(a, b) for a, b in zip(*cells, strict=True))
    if name in TOWERED:
        # The tower's sums run in another order.
        assert distance(straight, mixed) < 10 * TOLERANCE
    # The control: patches that lie elsewhere.
    other = {"pixel_values": shuffled["pixel_values"]}
    with pruner(built):
        assert distance(straight, generate(built, req.inputs | other)) > DIFFERENT


def without(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k != "image_position_ids"}


def short(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"image_position_ids": inputs["image_position_ids"][:, 1:]}


def torn(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    places = inputs["image_position_ids"].clone()
    places[0, 0] = -1
    return inputs | {"image_position_ids": places}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without, "pixel_values came without image_position_ids"),
        (short, "came with image_position_ids of shape"),
        (torn, r"image_position_ids place \d+ patches on a grid of"),
    ],
)
def test_odd_places_are_refused(name: str, change: Any, match: str) -> None:
    built, entry = EVERY[name].build(), EVERY[name]
    inputs = entry.request(built, ROWS).inputs
    with choosing(name)(built), pytest.raises(VlmpruneError, match=match):
        generate(built, change(inputs))


@pytest.mark.parametrize("name", NAMES)
def test_odd_frames_are_refused(name: str) -> None:
    built, entry = EVERY[name].build(), EVERY[name]
    inputs = entry.request(built, [["video", "video"]]).inputs
    if "num_frames_per_video" in inputs:
        counts = inputs["num_frames_per_video"]
        for odd, match in (
            (counts + 1, "counts 7 frames but 5 came"),
            (counts.flip(0), "frames of a"),
        ):
            with choosing(name)(built), pytest.raises(VlmpruneError, match=match):
                generate(built, inputs | {"num_frames_per_video": odd})
    else:
        places = inputs["video_position_ids"].clone()
        places[0, 0] = places[1, 0]
        with choosing(name)(built), pytest.raises(VlmpruneError, match="frames of a video"):
            generate(built, inputs | {"video_position_ids": places})


def test_a_pooling_that_mixes_squares_is_refused() -> None:
    built, entry = ZOO["gemma4_small"].build(), ZOO["gemma4_small"]
    inputs = entry.request(built, [["image"]]).inputs

    def mixed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": (states + states.roll(1, 1)) / 2}

    built.model.vision_tower.pooler.register_forward_pre_hook(mixed, with_kwargs=True)
    said = "^Gemma4.* does not make a visual token of each square of patches, so its tokens cannot"
    with choosing("gemma4_small")(built), pytest.raises(VlmpruneError, match=said):
        generate(built, inputs)


def test_inputs_of_each_layer_are_those_of_the_kept_tokens() -> None:
    """They are made of ids, in which placeholders are padding: the shorter ids make them right."""
    entry = ZOO["gemma4_small"]
    built = entry.build()
    req = entry.request(built, [["image", "image"]])
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["per_layer_inputs"])

    decoder = built.get_decoder()
    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    generate(built, req.inputs, max_new_tokens=1)
    with VisPruner(keep=0.4)(built) as handle:
        generate(built, req.inputs, max_new_tokens=1)
    hook.remove()
    whole, pruned = seen
    visual = (req.inputs["input_ids"][0] == built.config.image_token_id).nonzero()[:, 0]
    stays = torch.ones(whole.shape[1], dtype=torch.bool)
    stays[visual] = False
    own = visual.split([len(one.labels) for one in handle.report.layouts])
    for columns, kept in zip(own, handle.report.kept, strict=True):
        stays[columns[kept]] = True
    assert torch.equal(pruned, whole[:, stays])
    # The control: text and images differ in them.
    assert not torch.equal(whole[0, visual[0]], whole[0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_brings_another_image(name: str) -> None:
    """On the cache that the first left, with the new image alone; equal to masking in one go."""
    built, entry = EVERY[name].build(), EVERY[name]
    one, two = (entry.request(built, [["image"]], seed=seed) for seed in (1, 2))
    with choosing(name)(built) as handle:
        first = generate(built, one.inputs)
        reports = [handle.report]
        ids = torch.cat((first.sequences, two.inputs["input_ids"][:, 1:]), dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **entry.aligned(ids)}
        places = ("pixel_values", "image_position_ids")
        new = {n: two.inputs[n] for n in places}
        pruned = generate(built, whole | new | {CACHE: cache_of(first)})
        reports.append(handle.report)
    every = whole | {n: torch.cat((one.inputs[n], two.inputs[n])) for n in places}
    visual = (ids[0] == built.config.image_token_id).nonzero()[:, 0]
    both = visual.split([len(report.layouts[0].labels) for report in reports])

    def masked(kept: list[Tensor]) -> Any:
        mask = torch.ones_like(ids)
        for columns, stays in zip(both, kept, strict=True):
            mask[0, columns] = 0
            mask[0, columns[stays]] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return generate(built, every | {"attention_mask": mask, "position_ids": positions})

    kept = [report.kept[0] for report in reports]
    assert distance(pruned, masked(kept)) < TOLERANCE
    # The control: as many of the first image, but others.
    others = [i for i in range(len(both[0])) if i not in kept[0].tolist()][: len(kept[0])]
    assert distance(pruned, masked([torch.tensor(others), kept[1]])) > DIFFERENT
