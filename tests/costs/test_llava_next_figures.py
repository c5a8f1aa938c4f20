"""What README and docs say of LLaVA-NeXT-7B is what a request of the real geometry leaves.

The model has its real sizes but no weights, and what is counted is what its own packing and a
method's own choice make of a picture: no formula of `costs.plan` is asked.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from repository import ROOT
from vlmprune import FasterVLM, RandomTokens, UniformGrid, VisPruner, costs
from vlmprune.costs.plan import plan
from vlmprune.costs.units import MIB, TERA, digits, mib, percent
from vlmprune.hosts import pretrained
from vlmprune.hosts.families import FAMILIES
from vlmprune.integrations.vllm import policy
from vlmprune.study.bench import shapes
from vlmprune.views import EncoderView
from vlmprune.views.layout import Layout

CONFIG = shapes.config_of("llava-next-7b")
SQUARE, WIDE = (672, 672), (480, 640)
README, BENCHMARKS, METHODS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/benchmarks.md", "docs/methods.md")
)


@cache
def layout(size: tuple[int, int]) -> Layout:
    """Where the visual tokens of a picture lie, by the host's own packing."""
    with torch.device("meta"):
        model = pretrained.model_of(CONFIG)
    side = CONFIG.vision_config.image_size
    inputs = {"pixel_values": torch.zeros(1, 5, 3, side, side), "image_sizes": torch.tensor([size])}
    (found,) = FAMILIES["llava_next"].media[0].layouts(model, inputs, torch.empty(0))
    return found


@cache
def chosen(keep: float, size: tuple[int, int]) -> torch.Tensor:
    """[crops, patches] bool; VisPruner's own choice in a picture."""
    one = layout(size)
    generator = torch.Generator().manual_seed(0)
    shape = one.crops, one.patches
    view = EncoderView(
        torch.rand(*shape, generator=generator),
        torch.randn(*shape, 8, generator=generator),
        one.candidates(),
        (0,) * one.crops,
        (one.grid,) * one.crops,
        (False,),
    )
    return VisPruner(keep).select(view).kept


@cache
def left(keep: float | None, newlines: Any, size: tuple[int, int] = SQUARE) -> int:
    """Visual tokens that VisPruner's own choice leaves of a picture; None keeps all patches."""
    one = layout(size)
    method = VisPruner(1.0 if keep is None else keep, newlines=newlines)
    tokens = int(one.to_tokens(chosen(method.keep, size), method.newlines).sum())
    assert tokens == policy.count(method, one)
    return tokens


def figures(tokens: int) -> tuple[str, str, str]:
    """TFLOPs of the decoder, with five crops' encoding, and MiB of keys and values."""
    spent = costs.spent(CONFIG, [tokens], 2)
    encoder = costs.encoder_flops(CONFIG, 5)
    return (
        digits(spent.flops / TERA),
        digits((spent.flops + encoder) / TERA),
        mib(spent.kv_bytes),
    )


@pytest.mark.parametrize(
    ("size", "whole", "kept"), [(SQUARE, 2928, 193), (WIDE, 2340, 181), ((640, 480), 2352, 193)]
)
def test_what_is_left_of_a_picture(size: tuple[int, int], whole: int, kept: int) -> None:
    assert len(layout(size).labels) == whole
    assert (left(29, "keep", size), left(29, "drop", size)) == (kept, 5 * 29)
    for method in (FasterVLM, RandomTokens, UniformGrid):
        for newlines, wanted in (("keep", kept), ("drop", 5 * 29)):
            assert policy.count(method(29, newlines=newlines), layout(size)) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [29, 58, 144, 336, 337, 576])
def test_exactly_crops_times_keep_wherever_each_crop_has_as_many(keep: int) -> None:
    for size in (SQUARE, WIDE, (1080, 1920), (2000, 400)):
        available = layout(size).candidates().sum(dim=1)
        tokens = left(keep, "drop", size)
        assert tokens == int(available.clamp(max=keep).sum())
        assert (tokens == layout(size).crops * keep) == bool((available >= keep).all())
    assert left(keep, "drop", SQUARE) == 5 * keep


@pytest.mark.parametrize("keep", [None, 29, 144, 400, 0.25])
@pytest.mark.parametrize("size", [None, SQUARE, WIDE, (640, 480), (1080, 1920), (90, 1000)])
@pytest.mark.parametrize("newlines", ["keep", "drop"])
def test_plan_says_what_a_request_leaves(keep: Any, size: Any, newlines: Any) -> None:
    made = plan("llava-next-7b", keep, newlines=newlines, size=size)
    picture = layout(size or SQUARE)
    wanted = left(keep, newlines, size or SQUARE)
    assert (made.visual_tokens_before, made.visual_tokens_after) == (len(picture.labels), wanted)
    assert (made.crops, made.newline_tokens_before) == (picture.crops, picture.newlines)
    assert made.newline_tokens_after == (picture.newlines if newlines == "keep" else 0)
    assert digits(made.llm_tflops_after) == figures(wanted)[0]
    assert mib(made.kv_bytes_after) == figures(wanted)[2]


def words(page: str) -> str:
    """A page without its line breaks."""
    return " ".join(page.split()).replace("\N{MULTIPLICATION SIGN}", "x")


def test_the_readmes_figures() -> None:
    lines = re.findall(r"^llava-next-7b +(.*)$", README, re.MULTILINE)
    before, encoder = len(layout(SQUARE).labels), digits(costs.encoder_flops(CONFIG, 5) / TERA)
    llm, total, kv = figures(before)
    quarter, after = left(144, "keep"), left(29, "keep")
    for line, tokens in zip(lines, (quarter, after), strict=True):
        few, short, cached = figures(tokens)
        cells = [f"{before} → {tokens}", f"{llm} → {few}", encoder, f"{total} → {short}"]
        cells += [f"{kv} → {cached}", saved(tokens)]
        assert re.split(r"  +", line.strip()) == cells
    text = words(README)
    assert f"a quarter of the tokens takes {saved(quarter)} fewer FLOPs" in text
    assert f"29 a crop take {saved(after)} fewer and a fifteenth of the visual KV." in text
    newlines = layout(SQUARE).newlines
    assert f"{newlines} of the {after} tokens that are then left of a 672 x 672 picture" in text
    without = left(29, "drop")
    assert f"{without} tokens are left, {saved(without)} fewer FLOPs" in text
    assert "and a twentieth of the visual KV." in text
    assert round(before / after) == 15 and round(before / without) == 20
    assert f"{newlines} of the tokens are newlines" in README


def saved(tokens: int) -> str:
    """Share of a square picture's FLOPs, the encoder's included, that is saved."""
    encoder = costs.encoder_flops(CONFIG, 5)
    flops = [
        costs.spent(CONFIG, [n], 2).flops + encoder for n in (tokens, len(layout(SQUARE).labels))
    ]
    return percent(1 - flops[0] / flops[1])


def test_the_table_of_costs() -> None:
    table = BENCHMARKS.split("| LLaVA-NeXT-7B |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+) \| (keep|drop) \| (.+) \| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == 11 == table.count("\n") - 1
    for what, newlines, *cells in rows:
        keep = re.search(r"--keep (\d+)", what)
        size = re.search(r"--size (\d+)x(\d+)", what)
        picture = SQUARE if size is None else (int(size[1]), int(size[2]))
        tokens = left(None if keep is None else int(keep[1]), newlines, picture)
        _, total, kv = figures(tokens)
        assert cells == [str(tokens), total, kv], what
    text = words(BENCHMARKS)
    assert f"end in {layout(SQUARE).newlines} newline tokens" in text
    assert f"has {layout(WIDE).newlines} newlines." in text


def test_the_page_of_methods() -> None:
    text = words(METHODS)
    kept = f"leaves {left(29, 'keep')} tokens in LLaVA-NeXT, {layout(SQUARE).newlines} of them"
    assert kept in text and f"480 x 640 leaves {left(29, 'keep', WIDE)}." in text
    assert left(29, "drop") == left(29, "drop", WIDE)
    assert f"leave 5 · 29 = {left(29, 'drop')}." in text


def test_a_wrong_figure_would_be_found() -> None:
    """The published table's cache, and what a picture of other newlines would take."""
    assert costs.spent(CONFIG, [left(29, "drop")], 2).kv_bytes == 72.5 * MIB
    assert costs.spent(CONFIG, [left(29, "keep")], 2).kv_bytes == 96.5 * MIB
    assert figures(left(29, "keep")) != figures(left(29, "keep", WIDE)) != figures(145)
