"""Qwen3.5: pruning equals a prompt without the dropped tokens; a recurrence cannot be masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from answers import DIFFERENT, distance, generate
from shortened import in_float64, shortened
from vlmprune import PLPHP, DivPrune, FastV, Recall, VisPruner, VlmpruneError
from zoo import ZOO
from zoo_oracle import dropped_columns, others, three_positions

pytestmark = pytest.mark.oracle

NAMES = [name for name in ("qwen3_5", "qwen3_5_moe") if name in ZOO]
BATCHES: dict[str, list[list[Any]]] = {
    "one image": [["image"]],
    "padded": [["video", "image"], ["image", "video", "image"], []],
}
# Of what padding alone moves the unpruned model by.
TIMES = 3


# Eager attention makes padding nan in float64, without a pruner too.
@pytest.mark.parametrize(
    ("batch", "attention"), [("one image", "sdpa"), ("one image", "eager"), ("padded", "sdpa")]
)
@pytest.mark.parametrize("name", NAMES)
def test_in_float64_it_is_the_shorter_prompt(name: str, batch: str, attention: str) -> None:
    with in_float64(ZOO[name].build(attention)) as built:
        req = ZOO[name].request(built, BATCHES[batch])
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in req.inputs.items()}
        three = three_positions(built, inputs)
        for pruner in (VisPruner(keep=0.4), DivPrune(keep=0.4)):
            with pruner(built) as handle:
                pruned = generate(built, inputs)
            dropped = dropped_columns(req, handle.report)
            expected = shortened(built, inputs, dropped, three)
            assert torch.equal(pruned.sequences, expected.sequences)
            assert distance(pruned, expected) < 1e-9
            control = dropped_columns(req, handle.report, others(handle.report))
            assert distance(pruned, shortened(built, inputs, control, three)) > DIFFERENT


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_it_is_each_rows_own_prompt_but_for_what_padding_moves(name: str) -> None:
    built = ZOO[name].build()
    req = ZOO[name].request(built, BATCHES["padded"])
    plain = generate(built, req.inputs)
    with VisPruner(keep=0.4)(built) as handle:
        pruned = generate(built, req.inputs)
    dropped = dropped_columns(req, handle.report)
    usual, found, control = 0.0, 0.0, 0.0
    for row, own in enumerate(BATCHES["padded"]):
        alone = one_row(built, name, req.inputs, row, own)
        real = req.inputs["attention_mask"][row] != 0
        three = three_positions(built, alone)
        expected = shortened(built, alone, dropped[row, real][None], three)
        whole = generate(built, alone)
        usual = max(usual, apart(plain, whole, row))
        found = max(found, apart(pruned, expected, row))
        control = max(control, apart(pruned, whole, row))
    assert 0 < usual < 1e-4 and found < TIMES * usual
    assert control > DIFFERENT


def apart(batch: Any, alone: Any, row: int) -> float:
    """How far the logits of a batch's row are from those of a row that came alone."""
    each = zip(batch.logits, alone.logits, strict=True)
    return max(float((a[row] - b[0]).abs().max()) for a, b in each)


def one_row(built: Any, name: str, inputs: dict[str, Any], row: int, own: list[str]) -> Any:
    """A row of `BATCHES["padded"]` without its padding and without the other rows' items."""
    real = inputs["attention_mask"][row] != 0
    columns = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone = {k: inputs[k][row : row + 1, real] for k in columns}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = f"{kind}_grid_thw"
        before = sum(one.count(kind) for one in BATCHES["padded"][:row])
        sizes = inputs[grid].prod(dim=1)
        start, count = int(sizes[:before].sum()), own.count(kind)
        if count:
            alone[grid] = inputs[grid][before : before + count]
            end = start + int(sizes[before : before + count].sum())
            alone[pixels] = inputs[pixels][start:end]
    return alone


@pytest.mark.parametrize("name", NAMES)
def test_methods_inside_act_on_full_attention_alone(name: str) -> None:
    built = ZOO[name].build()
    req = ZOO[name].request(built, [["image", "image"], ["image"]])
    with PLPHP(alpha=0.8, beta=0.6)(built) as handle:
        generate(built, req.inputs)
    assert [layer.index for layer in handle.report.layers] == [1, 3]
    with Recall(read=0.2, floor=0, rest="none")(built) as handle:
        generate(built, req.inputs)
    assert handle.report.reading is not None
    with pytest.raises(VlmpruneError, match="linear attention, whose state every token passes"):
        FastV(keep=0.4, layer=1).attach(built)
