"""Classes whose `generate` lets go of positions: compact ones alone are right, and it is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from answers import DIFFERENT, TOLERANCE, generate
from counted_cases import QWEN_TOWER, grids
from rows_alone import apart, exchanged, kept_columns, shortened
from vlmprune import RandomTokens, VisPruner, VlmpruneError
from vlmprune.hosts import families, generation
from vlmprune.hosts.contract import ContractError
from zoo import ZOO
from zoo.base import IMAGE, TEXT, WORDS, loud, pad

pytestmark = pytest.mark.oracle


class Dropping(LlavaForConditionalGeneration):
    """As EXAONE 4.5 does, in the record of LLaVA."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        made = super().prepare_inputs_for_generation(*args, **kwargs)
        made["position_ids"] = None
        return made


def dropping() -> Any:
    torch.manual_seed(0)
    return loud(Dropping(ZOO["llava"].make().config))


def asked(model: Any) -> dict[str, Tensor]:
    return ZOO["llava"].request(model, [["image", "image"], ["image"]]).inputs


def counted(mask: Tensor) -> Tensor:
    """[1, B, L] positions of all columns, gaps included once some are left out."""
    return (mask.cumsum(1) - 1).clamp(min=0)[None]


def prefer_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the family's release keep gaps."""
    record = replace(families.FAMILIES["llava"], positions="original")
    monkeypatch.setitem(families._records, "llava", record)


@pytest.mark.parametrize("make", [VisPruner, RandomTokens], ids=lambda make: make.__name__)
def test_auto_is_compact_whatever_the_release_did(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_original(monkeypatch)
    model = dropping()
    inputs = asked(model)
    ids = inputs["input_ids"]
    with make(keep=4)(model) as handle:
        found = generate(model, inputs)
    assert handle.report.positions == "compact"
    kept = kept_columns(handle.report, ids)
    expected = shortened(model, inputs, kept, found.sequences)
    assert apart(found.logits, expected) < TOLERANCE
    gaps = shortened(model, inputs, kept, found.sequences, counted(inputs["attention_mask"]))
    others = shortened(model, inputs, exchanged(kept, ids), found.sequences)
    assert min(apart(found.logits, gaps), apart(found.logits, others)) > DIFFERENT


def test_the_class_that_keeps_them_has_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands above tells the two policies apart."""
    prefer_original(monkeypatch)
    model = ZOO["llava"].build()
    inputs = asked(model)
    with RandomTokens(keep=4)(model) as handle:
        found = generate(model, inputs)
    assert handle.report.positions == "original"
    kept = kept_columns(handle.report, inputs["input_ids"])
    gaps = shortened(model, inputs, kept, found.sequences, counted(inputs["attention_mask"]))
    assert apart(found.logits, gaps) < TOLERANCE
    assert apart(found.logits, shortened(model, inputs, kept, found.sequences)) > DIFFERENT


def test_gaps_are_refused_at_attach() -> None:
    with pytest.raises(VlmpruneError, match="drops the position_ids that it is given"):
        VisPruner(keep=4, positions="original").attach(dropping())


@pytest.mark.parametrize("rows", [[["image"]], [["image", "image"], ["image"]]], ids=["one", "two"])
def test_the_contract_finds_what_attach_could_not(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "drops_positions", lambda model: False)
    model = dropping()
    inputs = ZOO["llava"].request(model, rows).inputs
    with (
        VisPruner(keep=4, positions="original")(model),
        pytest.raises(ContractError, match="does not come at the positions that are due"),
    ):
        generate(model, inputs)


def exaone4_5() -> Any:
    tower = QWEN_TOWER | {"num_key_value_heads": 2, "fullatt_block_indexes": [1], "window_size": 16}
    text = {**TEXT, "head_dim": 8, "layer_types": ["full_attention"] * 3, "sliding_window": None}
    config = transformers.Exaone4_5_Config(
        text_config={**text, "model_type": "exaone4"},
        vision_config=tower,
        image_token_id=IMAGE,
        video_token_id=6,
    )
    return transformers.Exaone4_5_ForConditionalGeneration(config)


REAL: dict[str, Callable[[], Any]] = {"Exaone4_5_ForConditionalGeneration": exaone4_5}


@pytest.mark.parametrize("name", [name for name in REAL if hasattr(transformers, name)])
def test_real_classes_are_compact(name: str) -> None:
    torch.manual_seed(0)
    model = loud(REAL[name]())
    assert generation.drops_positions(model)
    prompts = [
        [1, *([WORDS + r, *[IMAGE] * 8] * count), *range(WORDS + 5, WORDS + 9 + r)]
        for r, count in enumerate([2, 1])
    ]
    ids, mask = pad(prompts, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, **grids([2, 1])}
    with RandomTokens(keep=0.4)(model) as handle:
        found = generate(model, inputs)
    assert handle.report.positions == "compact"
    kept = kept_columns(handle.report, ids)
    assert apart(found.logits, shortened(model, inputs, kept, found.sequences)) < TOLERANCE
    others = shortened(model, inputs, exchanged(kept, ids), found.sequences)
    assert apart(found.logits, others) > DIFFERENT
