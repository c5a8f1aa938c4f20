"""Methods in front of the language model against their releases' own towers, run as released."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import golden_inputs as seeded
from golden_host import CLOSE, golden, request, tower_host, visual_tokens
from vlmprune import FasterVLM, PruMerge, ToMe, VisionZip

CELLS = seeded.SIDE**2
project = seeded.projector()


def inputs(pixels: Tensor) -> dict[str, Tensor]:
    return {**request(CELLS, len(pixels)), "pixel_values": pixels}


def alike(found: Tensor, wanted: Tensor) -> float:
    """How far rows are from those of another order, each of which must be met once."""
    assert found.shape == wanted.shape
    near = torch.cdist(found, wanted).argmin(dim=1)
    assert sorted(near.tolist()) == list(range(len(wanted)))
    return float((found - wanted[near]).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("form", ["plus", "plain"])
def test_prumerge(form: str) -> None:
    """Kept tokens stand in raster order here, by falling attention there; the residual is last."""
    pixels = seeded.pixels("prumerge", 2)
    file = golden("prumerge", pixels=pixels)
    built = tower_host("prumerge", seeded.PRUMERGE_PEAK)
    pruner = PruMerge() if form == "plus" else PruMerge(plus=False)
    rows, _ = visual_tokens(built, pruner, inputs(pixels))
    old = PruMerge(plus=form == "plus", heads="mean")
    others, _ = visual_tokens(built, old, inputs(pixels))
    for number, (found, other) in enumerate(zip(rows, others, strict=True)):
        wanted = project(file[f"{form}.{number}"])
        assert alike(found, wanted) < CLOSE
        torch.testing.assert_close(found[-1], wanted[-1], rtol=0, atol=CLOSE)
        # Control: heads averaged find another number of tokens, and another residual.
        assert len(other) != len(wanted)
        assert float((other[-1] - wanted[-1]).abs().max()) > 100 * CLOSE


@torch.no_grad()
def test_visionzip() -> None:
    """The release's CLS token, which is first, is no visual token of ours."""
    pixels = seeded.pixels("visionzip", 5)
    wanted = project(golden("visionzip", pixels=pixels)["plain"])[:, 1:]
    built = tower_host("visionzip", 2.0)
    rows, _ = visual_tokens(built, VisionZip(keep=63, contextual_ratio=10 / 63), inputs(pixels[:2]))
    torch.testing.assert_close(torch.stack(rows), wanted, rtol=0, atol=CLOSE)
    other, _ = visual_tokens(built, VisionZip(keep=63, contextual_ratio=9 / 63), inputs(pixels[:2]))
    assert float((torch.stack(other) - wanted).abs().max()) > 100 * CLOSE


@torch.no_grad()
def test_visionzip_on_llava_next() -> None:
    """In the release's order: contextual tokens of four crops behind the dominant ones of all."""
    rows, columns = seeded.NEXT_GRID
    crops = rows * columns
    pixels = seeded.pixels("visionzip", 1 + crops)
    wanted = golden("visionzip", pixels=pixels)["next"]
    # Without CLS tokens: of the whole view the first, of the crops those between the kinds.
    dominant = 64 + 53 * crops
    wanted = torch.cat((wanted[1:dominant], wanted[dominant + crops :]))
    built = tower_host("visionzip", 2.0, seeded.NEXT_GRID)
    side = seeded.SIDE * seeded.PATCH
    newlines = rows * seeded.SIDE
    given = {
        **request(CELLS * (1 + crops) + newlines, 1),
        "pixel_values": pixels[None],
        "image_sizes": torch.tensor([[rows * side, columns * side]]),
    }
    pruner = VisionZip(keep=63, contextual_ratio=10 / 63)
    (found,), report = visual_tokens(built, pruner, given)
    newline = built.model.image_newline.detach()
    real = (found != newline).any(dim=1)
    assert int((~real).sum()) == report.newline_tokens == newlines
    torch.testing.assert_close(found[real], wanted, rtol=0, atol=CLOSE)
    # Control: crop by crop they would be the same tokens in another order.
    turned = [wanted[:63]]
    for crop in range(crops):
        behind = wanted[63 + 53 * crops + 10 * crop :][:10]
        turned += [wanted[63 + 53 * crop :][:53], behind]
    assert alike(torch.cat(turned), wanted) == 0
    assert float((torch.cat(turned) - wanted).abs().max()) > 100 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("keep", [64, 29])
def test_fastervlm(keep: int) -> None:
    pixels = seeded.pixels("fastervlm", 2)
    file = golden("fastervlm", pixels=pixels)
    built = tower_host("fastervlm", 2.0)
    rows, report = visual_tokens(built, FasterVLM(keep=keep), inputs(pixels))
    for picture, kept in enumerate(report.kept):
        assert kept.tolist() == file[f"keep{keep}.kept"][picture].nonzero()[:, 0].tolist()
    wanted = project(file[f"keep{keep}.features"])
    torch.testing.assert_close(torch.stack(rows), wanted, rtol=0, atol=CLOSE)
    built = tower_host("fastervlm", 1.0)
    _, other = visual_tokens(built, FasterVLM(keep=keep), inputs(pixels))
    assert [one.tolist() for one in other.kept] != [one.tolist() for one in report.kept]


@torch.no_grad()
@pytest.mark.parametrize("keep", sorted(seeded.TOME_MERGES))
def test_tome(keep: int) -> None:
    """Merged tokens stand in other places here, where the first of their patches did."""
    pixels = seeded.pixels("tome", 2)
    file = golden("tome", pixels=pixels)
    built = tower_host("tome", 1.5)
    pruner: Any = ToMe(keep=keep)
    assert list(pruner.inside((24, 24), 23).merges) == seeded.TOME_MERGES[keep]
    rows, report = visual_tokens(built, pruner, inputs(pixels))
    other, _ = visual_tokens(built, ToMe(keep=keep + 1), inputs(pixels))
    for picture, found in enumerate(rows):
        wanted = project(file[f"keep{keep}.states"][picture])
        assert alike(found, wanted) < CLOSE
        # And of as many patches.
        near = torch.cdist(found, wanted).argmin(dim=1)
        members = report.members[picture]
        sizes = [int((members == int(cell)).sum()) for cell in report.kept[picture]]
        assert sizes == file[f"keep{keep}.sizes"][picture][near].long().tolist()
        control = torch.cdist(other[picture], wanted).amin(dim=1)
        assert float(control.max()) > 100 * CLOSE
