"""Visions that version 0.2 stored stand under the defaults of then, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vlmprune import (
    CDPruner,
    DivPrune,
    PruMerge,
    Vision,
    VisionZip,
    VisPruner,
    VlmpruneError,
    embedded,
)
from vlmprune.method import by_default, defaults_then, name_then
from vlmprune.version import __version__

FILES = Path(__file__).parents[2] / "earlier"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return embedded.load()


def inputs(processor: Any) -> Any:
    picture = Image.open(sorted(embedded.held_out().glob("*.jpg"))[0]).convert("RGB")
    return processor(images=picture, text="<image> what", return_tensors="pt")


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("vispruner", VisPruner(keep=4)),
        ("divprune", DivPrune(keep=4, budget="crop")),
        ("prumerge", PruMerge(keep=4, plus=False, heads="mean")),
    ],
)
def test_the_former_defaults_give_what_was_stored(
    name: str, then: Any, loaded: Any, tmp_path: Path
) -> None:
    model, processor = loaded
    stored = Vision.load(FILES / f"{name}.safetensors")
    given = inputs(processor)
    with then(model) as handle:
        again = handle.encode(**given)
        del given["pixel_values"]
        answers = [
            model.generate(**given, vision=one, max_new_tokens=4, do_sample=False)
            for one in (stored, again)
        ]
    assert stored.method != again.method
    assert int(stored.items[0].kept.sum()) == int(again.items[0].kept.sum())
    # On another processor, and with another release than the files were written with, the tower's
    # last digits differ, by which VisPruner tells duplicates.
    then_kept, now_kept = stored.items[0].kept, again.items[0].kept
    common = int((then_kept & now_kept).sum()) / int(then_kept.sum())
    assert common >= 0.5 > int(then_kept.sum()) / len(then_kept)
    if name != "vispruner" or common == 1:
        assert torch.equal(then_kept, now_kept)
        torch.testing.assert_close(stored.items[0].features, again.items[0].features)
        assert torch.equal(*answers)
    again.save(tmp_path / "new.safetensors")
    for file, version in (
        (tmp_path / "new.safetensors", __version__),
        (FILES / f"{name}.safetensors", None),
    ):
        with safe_open(file, framework="pt") as one:
            assert one.metadata().get("version") == version


@pytest.mark.parametrize(
    ("name", "now", "settings"),
    [
        ("divprune", DivPrune(keep=4), "give budget='crop' for DivPrune"),
        ("prumerge", PruMerge(keep=4), "give plus=False and heads='mean' for PruMerge"),
        # Half of it is not the former way, and no setting of another method's is told.
        ("prumerge", PruMerge(keep=4, plus=False), "give heads='mean' for PruMerge"),
        ("prumerge", PruMerge(keep=5), None),
        ("vispruner", VisPruner(keep=4, newlines="drop"), None),
        ("vispruner", DivPrune(keep=4), None),
    ],
)
def test_others_are_refused_by_name(name: str, now: Any, settings: str | None, loaded: Any) -> None:
    model, processor = loaded
    stored = Vision.load(FILES / f"{name}.safetensors")
    given = inputs(processor)
    del given["pixel_values"]
    with now(model), pytest.raises(VlmpruneError, match="with another method") as told:
        model.generate(**given, vision=stored, max_new_tokens=1)
    said = str(told.value)
    assert stored.method in said and repr(now) in said
    assert (settings in said) if settings else ("default" not in said)


def test_names_of_then() -> None:
    """As version 0.2.0 printed them."""
    for now, name in (
        (
            VisionZip(keep=4),
            "VisionZip(keep=4, positions='auto', budget='crop', contextual_ratio=0.15625)",
        ),
        (
            PruMerge(keep=4, plus=False, heads="mean") | DivPrune(keep=2, budget="crop"),
            "PruMerge(keep=4, plus=False, positions='auto', neighbours=32) | "
            "DivPrune(keep=2, positions='auto', budget='crop')",
        ),
    ):
        assert name_then(now.links) == name
    # What there was none of has the name of now.
    assert name_then([PruMerge(keep=4)]) == repr(PruMerge(keep=4))
    assert defaults_then([CDPruner(keep=4), VisPruner(keep=4)]) == "question='prompt' for CDPruner"
    assert by_default([CDPruner(keep=4)]) == (CDPruner(keep=4, question="prompt"),)
