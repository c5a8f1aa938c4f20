"""Methods inside the language model against their releases' own decoders, run as released."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_inputs as seeded
from golden_host import CLOSE, decoder_host, embedded, golden, prompt
from vlmprune import DART, FastV, PyramidDrop, SparseVLM

SMALL = (seeded.BEFORE, 144, seeded.BEHIND)
LARGE = (seeded.SPARSE_BEFORE, seeded.SPARSE_IMAGE, seeded.SPARSE_BEHIND)
# Layers of the decoder, the prompt, and for each key of the file the method and one that differs.
CASES: dict[str, tuple[int, tuple[int, int, int], dict[str, tuple[Any, Any]]]] = {
    "fastv": (6, SMALL, {
        "layer2.keep36": (FastV(keep=36), FastV(keep=36, layer=1)),
        "layer3.keep20": (FastV(keep=20, layer=3), FastV(keep=20, layer=3, positions="compact")),
    }),
    "dart": (6, SMALL, {
        "layer2.keep36.ascending": (DART(keep=36), DART(keep=36, normed=False)),
        "layer3.keep68.ascending": (DART(keep=68, layer=3), DART(keep=68, layer=3, text_pivots=3)),
    }),
    "pyramiddrop": (8, SMALL, {
        "ratio0.5": (PyramidDrop(), PyramidDrop(positions="original")),
        "ratio0.75": (PyramidDrop(ratio=0.75), PyramidDrop(ratio=0.7)),
    }),
    "sparsevlm": (32, LARGE, {
        "keep192": (SparseVLM(keep=192), SparseVLM(keep=192, recycle=0)),
        "keep64": (SparseVLM(keep=64), SparseVLM(keep=64, positions="original")),
    }),
}  # fmt: skip
RUNS = [(name, key) for name, (_, _, keys) in CASES.items() for key in keys]


@cache
def host(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    layers, shape, _ = CASES[name]
    built = decoder_host(name, layers, shape[1])
    inputs = prompt(built, name, *shape)
    return built, inputs, golden(name, prompt=embedded(built, name, inputs))


@torch.no_grad()
def ran(name: str, pruner: Any) -> tuple[Tensor, Tensor, list[int], Any]:
    """States of text and of the visual tokens that reach the end, rows by layer, the report."""
    built, inputs, _ = host(name)
    with pruner(built) as handle:
        states = built.model(**inputs, use_cache=False).last_hidden_state[0]
    before, image, _ = CASES[name][1]
    assert handle.report is not None
    text = torch.cat((states[:before], states[before + image :]))
    kept = handle.report.layers[-1].kept[0]
    rows = [len(layer.kept[0]) + len(text) for layer in handle.report.layers]
    return text, states[before : before + image][kept], rows, kept


@pytest.mark.parametrize(("name", "key"), RUNS)
def test_equals_the_release(name: str, key: str) -> None:
    before, image, behind = CASES[name][1]
    _, _, file = host(name)
    states, rows = file[f"{key}.states"], file[f"{key}.rows"].tolist()
    visual = len(states) - before - behind
    pruner, other = CASES[name][2][key]
    text, seen, lengths, kept = ran(name, pruner)
    # The layers that the report leaves out are whole.
    assert rows == [before + image + behind] * (len(rows) - len(lengths)) + lengths
    want = torch.cat((states[:before], states[before + visual :]))
    torch.testing.assert_close(text, want, rtol=0, atol=CLOSE)
    # Merged rows stand in other places of the report than in the release.
    near = torch.cdist(seen, states[before : before + visual])
    assert len(seen) == visual and sorted(near.argmin(dim=1).tolist()) == list(range(visual))
    assert float((seen - states[before:][near.argmin(dim=1)]).abs().max()) < CLOSE
    if f"{key}.kept" in file:
        assert kept.tolist() == file[f"{key}.kept"].tolist()
    # Control.
    text, _, _, _ = ran(name, other)
    assert float((text - want).abs().max()) > 100 * CLOSE


def test_dart_differs_from_the_release_by_the_order_of_pivots_alone() -> None:
    """As a Python set is walked other tokens are kept, as many of them, most of them the same."""
    _, _, file = host("dart")
    for key in ("layer2.keep36", "layer3.keep68"):
        ours, theirs = (
            set(file[f"{key}.{order}.kept"].tolist()) for order in ("ascending", "release")
        )
        assert len(ours) == len(theirs) and ours != theirs
        assert len(ours & theirs) > 0.8 * len(ours)
