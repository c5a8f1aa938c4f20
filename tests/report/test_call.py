"""A call's bytes: of the model's own type, and of every layer, whether it was cut or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from answers import generate
from cut_cache import SETTINGS
from deep import deep
from stock import cache_of
from tiny import model, request, sliding_config
from vlmprune import PLPHP, Pruner, Recall, VisPruner
from vlmprune.hosts import layer_sizes
from vlmprune.methods import FastV
from vlmprune.report.call import make
from vlmprune.views import layout

VISUAL = 16
# A token's key and value in a layer: 2 heads of 8 numbers, twice.
NUMBERS = 2 * 2 * 8


def in_type(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    pixels = {"pixel_values": inputs["pixel_values"].to(dtype)}
    return inputs | pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("pruner", "tokens"),
    [(VisPruner(keep=6), [6, 6, 6]), (FastV(keep=6, layer=1), [16, 6, 6])],
    ids=["before", "inside"],
)
def test_bytes_are_of_the_models_type(pruner: Pruner, tokens: list[int], dtype: Any) -> None:
    built = model().to(dtype)
    inputs = in_type(request(built, [1]).inputs, dtype)
    with pruner(built) as handle:
        pruned = generate(built, inputs, max_new_tokens=1)
    report = handle.report
    assert report is not None
    each = NUMBERS * dtype.itemsize
    assert report.kv_bytes_before == len(tokens) * VISUAL * each
    assert report.kv_bytes_after == sum(tokens) * each
    assert list(report.kv_bytes_by_layer) == [n * each for n in tokens]
    # As the cache itself has it, its text aside.
    text = inputs["input_ids"].shape[1] - VISUAL
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache_of(pruned).layers]
    assert [size - text * each for size in held] == [n * each for n in tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cut_cache_are_of_the_models_type(dtype: Any) -> None:
    built = model().to(dtype)
    inputs = in_type(request(built, [1]).inputs, dtype)
    with PLPHP(**SETTINGS)(built) as handle:
        generate(built, inputs, max_new_tokens=1)
    report = handle.report
    assert report is not None and len(report.cut) == 3
    kept = sum(len(numbers) for layer in report.cut for head in layer.kept for numbers in head)
    # What each head keeps: a key and a value of 8 numbers.
    assert report.kv_bytes_after == kept * 2 * 8 * dtype.itemsize
    assert report.kv_bytes_before == 3 * VISUAL * NUMBERS * dtype.itemsize
    text = inputs["input_ids"].shape[1]
    assert all(layer.bytes_before == text * NUMBERS * dtype.itemsize for layer in report.cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cache_that_is_read_in_part_are_of_the_models_type(dtype: Any) -> None:
    """All keys are read as a sketch, and four tokens whole."""
    built = model().to(dtype)
    inputs = in_type(request(built, [1]).inputs, dtype)
    pruner = Recall(read=4, floor=0, sketch="exact", rest="none", first_layer=0, always=True)
    with pruner(built) as handle:
        generate(built, inputs, max_new_tokens=2)
    assert handle.report is not None and handle.report.reading is not None
    reading = handle.report.reading
    dense = 3 * VISUAL * NUMBERS * dtype.itemsize
    assert reading.dense_bytes == dense and len(reading.steps) == 1
    assert reading.steps[0].bytes_dense == dense
    assert reading.steps[0].bytes_read == dense // 2 + dense * 4 // VISUAL


def test_layers_that_stay_whole_count_beside_those_that_were_cut() -> None:
    """A window of 12 columns, whose layer holds 11 of an image's tokens and is not cut."""
    config = sliding_config()
    built = model(text_config=config)
    with PLPHP(**SETTINGS)(built) as handle:
        generate(built, request(built, [1, 1]).inputs, max_new_tokens=1)
    report = handle.report
    assert report is not None and [layer.index for layer in report.cut] == [0, 2]
    cut = sum(layer.kv_bytes for layer in report.cut)
    assert 0 < cut < 2 * 2 * VISUAL * NUMBERS * 4
    assert report.kv_bytes_after == cut + 2 * 11 * NUMBERS * 4
    assert report.kv_bytes_before == 2 * (VISUAL + 11 + VISUAL) * NUMBERS * 4


def test_a_cut_that_comes_after_others_counts_what_they_left() -> None:
    """Half of the tokens reach the later layers, of which each head keeps some."""
    built = deep()
    with (VisPruner(keep=8) | PLPHP(**SETTINGS))(built) as handle:
        generate(built, request(built, [1]).inputs, max_new_tokens=1)
    report = handle.report
    assert report is not None and len(report.cut) == 5
    assert report.kv_bytes_after == sum(layer.kv_bytes for layer in report.cut)
    assert report.kv_bytes_after < 5 * 8 * NUMBERS * 4 < report.kv_bytes_before


def test_sizes_of_layers_are_those_of_the_config() -> None:
    """Whether they were read before, or are read as a report is made."""
    config = model().config
    given = ([torch.arange(VISUAL) < 6], [{}], [1], [VISUAL], torch.float16, 0.0)
    grid = [layout.plain(1, (4, 4), torch.device("cpu"))]
    made = [
        make(config, "method", "compact", "", grid, *given, layers=layers)
        for layers in (None, layer_sizes.layers(config))
    ]
    assert made[0].kv_bytes_after == 6 * NUMBERS * 3 * 2
    assert made[0].as_dict() == made[1].as_dict()
