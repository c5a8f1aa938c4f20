"""Figures that no config tells: calls go on, print says "unknown", JSON null."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, Zamba2Config

import pages
from commandline import call
from deep import deep, generate
from tiny import request
from vlmprune import PLPHP, Recall, VisPruner, VlmpruneError, costs
from vlmprune.costs.equal_compute import budget_of, pairs
from vlmprune.costs.plan import plan
from vlmprune.hosts import layer_sizes
from vlmprune.methods import FastV
from vlmprune.report.call import make
from vlmprune.study.bench.results import Figures, Quartiles
from vlmprune.study.bench.tables import part
from vlmprune.study.compare import plot, tables
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.evals.store import Store
from vlmprune.study.tasks.answered import Answered
from vlmprune.views import layout

UNKNOWN = costs.UNKNOWN


def strictly(content: Any) -> Any:
    """What JSON makes of content, which must hold nothing that JSON does not know."""
    return json.loads(json.dumps(content, allow_nan=False))


@pytest.mark.parametrize(
    "method",
    [
        VisPruner(keep=4),
        FastV(keep=4),
        PLPHP(r=0.4),
        VisPruner(keep=8) | Recall(read=2, floor=0, always=True),
    ],
)
@pytest.mark.parametrize("depth", [True, False])
def test_a_call_whose_costs_are_unknown_goes_on(
    method: Any, depth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = deep()
    req = request(built, [2, 1])
    with method(built) as handle:
        told = generate(built, req.inputs).sequences
    known = handle.report
    assert known is not None and "unknown" not in str(known)
    layers = [layer_sizes.NOTHING_KNOWN] * 5
    monkeypatch.setattr(layer_sizes, "layers", lambda config: layers if depth else None)
    with method(built) as handle:
        assert torch.equal(generate(built, req.inputs).sequences, told)
    report = handle.report
    assert report is not None and "nan" not in str(report)
    assert "unknown → unknown FLOPs, KV unknown" in str(report)
    assert math.isnan(report.flops_after) and math.isnan(report.kv_bytes_before)
    content = strictly(report.as_dict())
    assert content == json.loads(report.json())
    assert content["flops_before"] is content["kv_bytes_before"] is None
    assert content["kept"] == known.as_dict()["kept"]


def report_of(patches: list[int] | None) -> Any:
    return make(
        LlavaConfig(),
        "method",
        "compact",
        "",
        [layout.plain(1, (24, 24), torch.device("cpu"))],
        [torch.arange(576) < 64],
        [{}],
        [1],
        patches,
        torch.float16,
        0.0,
    )


def test_of_an_unknown_tower_the_language_models_flops_are_told() -> None:
    report = report_of(None)
    assert math.isnan(report.flops_before) and math.isnan(report.flops_after)
    assert report.decoder_flops_after == costs.prefill_flops(LlavaConfig(), 64)
    assert "7.63 T → 831 GFLOPs in the language model, KV 288 → 32.0 MiB" in str(report)
    assert strictly(report.as_dict())["flops_before"] is None
    assert "8.02 T → 1.21 TFLOPs, KV" in str(report_of([576]))
    # Where nothing was encoded, nothing was spent.
    assert report_of([]).flops_before == report_of([]).decoder_flops_before


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A LLaVA with a decoder of which only the kinds of layers are understood."""
    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    config = LlavaConfig(text_config=Zamba2Config(), vision_config=vision)
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_plan_of_an_unknown_decoder(folder: str) -> None:
    made = plan(folder, 64)
    assert made.visual_tokens_after == 64 and made.encoder_tflops > 0
    content = strictly(made.as_dict())
    assert content["llm_tflops_after"] is content["flops_saving"] is content["kv_saving"] is None
    shown = call("plan", folder, "--keep", 64).stdout
    assert "576 → 64" in shown and "unknown" in shown and "nan" not in shown
    assert json.loads(call("plan", folder, "--json").stdout)["kv_bytes_before"] is None


def test_pairs_with_an_unknown_decoder_come_last(folder: str) -> None:
    found = pairs(8.0, 50, ["vicuna-7b", folder])
    assert [one.model for one in found] == ["vicuna-7b", folder]
    assert found[1].visual_tokens is None and math.isnan(found[1].tflops)
    assert strictly(found[1].as_dict())["parameters"] is None
    shown = call("plan", folder, "--compute-budget", 8).stdout
    assert "unknown" in shown and "nan" not in shown
    with pytest.raises(VlmpruneError, match="is unknown, as its config does not tell"):
        budget_of(f"{folder}@576", 50)


def answered(**changes: Any) -> Answered:
    names = ("decoder_flops", "flops", "kv_bytes")
    figures = {f"{name}{when}": 2.0 for name in names for when in ("", "_before")}
    about = {"id": "a", "group": "g", "kind": "", "answer": "x", "score": 1.0, "seconds": 1.0}
    tokens = {"visual_tokens": 1.0, "visual_tokens_before": 2.0}
    return Answered(**{**about, **tokens, **figures, **changes})


def test_results_that_are_kept_come_back_unknown(tmp_path: Path) -> None:
    one = answered(flops=UNKNOWN, flops_before=UNKNOWN)
    evaluation = Evaluation("task", "method", "model", (one,))
    assert strictly(evaluation.as_dict())["shares"] == {
        "visual_tokens": 0.5,
        "decoder_flops": 1,
        "flops": None,
        "kv_bytes": 1,
        "kv_read": 1,
    }
    again = Evaluation.from_dict(strictly(evaluation.as_dict())).results[0]
    assert math.isnan(again.flops) and again.kv_bytes == 2
    path = tmp_path / "store.jsonl"
    with Store(path, evaluation) as store:
        store.append(one)
    assert "NaN" not in path.read_text()
    with Store(path, evaluation) as store:
        assert math.isnan(store.results["a"].flops)


def test_a_comparison_draws_what_is_known() -> None:
    whole = pages.result()
    assert len(plot.axes_of(whole)) == 3
    rows = [replace(row, flops=UNKNOWN) for row in whole.rows]
    some = replace(whole, rows=rows)
    axes, dots = plot.axes_of(some), plot.dots_of(some)
    assert len(axes) == 2 and "KV" in axes[0]
    assert [dot.costs for dot in dots] == [dot.costs[1:] for dot in plot.dots_of(whole)]
    assert plot.plot(dots, axes, "score").startswith(b"\x89PNG")
    cells = [line.texts for _, lines in tables.sections(some) for line in lines]
    assert {cell["flops"] for cell in cells} == {"unknown"}
    assert all("nan" not in text for cell in cells for text in cell.values())
    # The scale is the language model's, which is known.
    assert all(float(cell["decoder"]) < 1000 for cell in cells)
    assert {row["flops"] for row in strictly(some.as_dict())["rows"]} == {None}


def test_a_bench_makes_no_ratio_of_what_is_unknown() -> None:
    once = Quartiles.of([1.0, 2.0])
    assert once is not None
    full = Figures(
        *("all", 8, once, None, None, None, once),
        *(UNKNOWN, UNKNOWN, 0, 64, None, UNKNOWN, (1,)),
    )
    few = replace(full, name="few", visual_kv_bytes=4.0)
    against = few.against(full)
    assert against["flops_ratio"] is against["visual_kv_ratio"] is None
    assert against["cache_ratio"] == 1
    assert part(UNKNOWN, UNKNOWN) == "unknown MiB"


@pytest.mark.parametrize("text", [0, 10])
def test_what_an_unknown_model_affords_is_not_told(
    text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its layers are counted, but their sizes are not told."""
    (known,) = pairs(1.0, text, ["qwen2.5-7b"])
    assert known.visual_tokens is not None and not math.isnan(known.tflops)
    monkeypatch.setattr(layer_sizes, "layers", lambda config: [layer_sizes.NOTHING_KNOWN] * 4)
    (found,) = pairs(1.0, text, ["qwen2.5-7b"])
    assert found.visual_tokens is None and math.isnan(found.tflops)
