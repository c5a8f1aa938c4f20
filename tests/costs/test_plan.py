"""Plans reproduce the published tables, read local configs and refuse in one sentence."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from vlmprune import costs
from vlmprune.cli.plan import plans_table
from vlmprune.costs.architectures import SHAPES
from vlmprune.costs.plan import Plan, plan
from vlmprune.costs.units import MIB
from vlmprune.errors import VlmpruneError
from vlmprune.study.bench import shapes


@pytest.mark.parametrize(
    ("keep", "budget", "tokens", "tflops", "mib"),
    [
        (None, "crop", 2880, "43.6", 1440),
        (144, "crop", 720, "11.5", 360),
        (0.25, "crop", 720, "11.5", 360),
        (58, "crop", 290, "5.7", 145),
        (29, "crop", 145, "3.8", 72.5),
        (640, "image", 640, "10.4", 320),
        (160, "image", 160, "4.0", 80),
    ],
)
def test_llava_next_7b(keep: Any, budget: Any, tokens: int, tflops: str, mib: float) -> None:
    """As published, without newlines; by default each of the 48 is one token more."""
    made = plan("llava-next-7b", keep, budget, newlines="drop")
    assert (made.crops, made.visual_tokens_before, made.visual_tokens_after) == (5, 2928, tokens)
    assert f"{made.total_tflops_after:.1f}" == tflops
    assert (made.kv_bytes_before, made.kv_bytes_after) == (1464 * MIB, mib * MIB)
    usual = plan("llava-next-7b", keep, budget)
    assert usual.visual_tokens_after == tokens + 48
    assert (usual.newline_tokens_before, usual.newline_tokens_after) == (48, 48)
    assert usual.kv_bytes_after == (mib + 24) * MIB
    assert usual.total_tflops_after > made.total_tflops_after


@pytest.mark.parametrize(
    ("keep", "tflops"),
    [(None, "8.02"), (192, "2.89"), (128, "2.05"), (64, "1.21"), (32, "0.80")],
)
def test_llava_15_7b(keep: int | None, tflops: str) -> None:
    made = plan("llava-1.5-7b", keep)
    assert f"{made.total_tflops_after:.2f}" == tflops
    assert made.visual_tokens_after == (keep or 576)


def test_the_other_convention_is_half() -> None:
    """PyramidDrop prints 3.82 for LLaVA-1.5-7B (arXiv 2410.17247); SparseVLM counts so, too."""
    made = plan("llava-1.5-7b", 64, per_multiply_add=1)
    assert f"{made.llm_tflops_before:.2f}" == "3.82"
    two = plan("llava-1.5-7b", 64)
    for name in ("llm_tflops_before", "llm_tflops_after", "encoder_tflops", "total_tflops_after"):
        assert 2 * getattr(made, name) == getattr(two, name)
    assert made.kv_bytes_after == two.kv_bytes_after and made.flops_saving == two.flops_saving
    assert (made.as_dict()["flops_per_multiply_add"], two.flops_per_multiply_add) == (1, 2)
    with pytest.raises(VlmpruneError, match=r"^per_multiply_add=3 is no convention; use 2 or 1"):
        plan("llava-1.5-7b", per_multiply_add=3)


def test_the_headline_saving() -> None:
    made, whole = (plan("llava-next-7b", keep, newlines="drop") for keep in (29, None))
    assert f"{1 - made.total_tflops_after / whole.total_tflops_after:.0%}" == "91%"
    assert f"{made.flops_saving:.0%}" == "91%"
    assert made.kv_saving == 1 - 145 / 2928
    usual = plan("llava-next-7b", 29)
    assert f"{usual.flops_saving:.0%}" == "90%" and usual.kv_saving == 1 - 193 / 2928
    nothing = plan("llava-next-7b")
    assert nothing.flops_saving == nothing.kv_saving == 0


def test_13b_is_wider_and_deeper() -> None:
    n, d, m = 2928, 5120, 13824
    made = plan("llava-next-13b")
    assert made.llm_tflops_before == 40 * 2 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m) / 1e12
    assert made.kv_bytes_before == 2 * 40 * d * 2 * n
    assert made.encoder_tflops == plan("llava-next-7b").encoder_tflops
    assert plan("llava-1.5-13b").visual_tokens_before == 576


def test_crops_fractions_and_cache_width() -> None:
    for newlines, left in (("keep", 1), ("drop", 0)):

        def after(*settings: Any, newlines: Any = newlines, **crops: Any) -> int:
            return plan("llava-next-7b", *settings, newlines=newlines, **crops).visual_tokens_after

        # Two crops side by side end 24 rows, and so do three; two over two end 48.
        assert after(10, crops=3) == 30 + 24 * left
        assert after(10, "image", crops=4) == 10 + 24 * left
        assert after(10, crops=1) == 10
        assert after(0.1) == 5 * 58 + 48 * left
        assert after(0.1, "image") == 288 + 48 * left
        assert plan("llava-1.5-7b", 10, newlines=newlines).visual_tokens_after == 10  # type: ignore[arg-type]
    assert plan("llava-1.5-7b", bytes_per_value=4).kv_bytes_before == 2 * 288 * MIB
    single = plan("llava-next-7b", crops=1)
    assert single.total_tflops_before == plan("llava-1.5-7b").total_tflops_before


def test_known_architectures_agree_with_the_config_classes(tmp_path: Path) -> None:
    for kind, config in (
        ("llava-1.5-7b", LlavaConfig(text_config=LlamaConfig())),
        ("llava-next-7b", LlavaNextConfig(text_config=LlamaConfig())),
    ):
        config.save_pretrained(tmp_path / kind)
        local, known = plan(str(tmp_path / kind), 64), plan(kind, 64)
        assert {**local.as_dict(), "model": kind} == known.as_dict()
    from_file = plan(str(tmp_path / "llava-1.5-7b" / "config.json"), 64)
    assert from_file.total_tflops_after == plan("llava-1.5-7b", 64).total_tflops_after


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_that_is_timed_is_planned(name: str) -> None:
    """What is counted is what the class with random weights is given, and what it costs."""
    config = shapes.config_of(name)
    made = plan(name, 0.25, newlines="drop")
    assert made.visual_tokens_before == shapes.tokens_per_image(config)
    crops = shapes.crops_of(config)
    assert (made.crops, made.tokens_per_crop) == (crops, shapes.tokens_per_crop(config))
    assert made.visual_tokens_after == crops * made.tokens_per_crop // 4
    assert made.llm_tflops_after * 1e12 == costs.prefill_flops(config, made.visual_tokens_after)
    assert made.kv_bytes_before == costs.kv_bytes(config, made.visual_tokens_before)
    patches = made.tokens_per_crop * (4 if "qwen" in name else 1)
    assert made.encoder_tflops * 1e12 == costs.encoder_flops(config, crops, patches=patches)


def test_a_model_of_any_size_takes_the_pictures() -> None:
    made = plan("qwen2.5-vl-7b", size=(448, 616))
    assert (made.visual_tokens_before, made.size) == (16 * 22, (448, 616))
    assert plan("qwen2.5-vl-7b", size=(1, 1)).visual_tokens_before == 1
    assert plan("qwen2.5-vl-7b", 353, size=(448, 616)).crops_below_keep == 1
    assert "crops=2" in refused("qwen2.5-vl-7b", crops=2)


TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 70,
    "patch_size": 14,
}


def tiny(folder: Path, **changes: Any) -> str:
    tower = CLIPVisionConfig(**TOWER)
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    LlavaConfig(vision_config=tower, text_config=text, **changes).save_pretrained(folder)
    return str(folder)


def test_a_local_gqa_config(tmp_path: Path) -> None:
    made = plan(tiny(tmp_path), 5)
    assert (made.visual_tokens_before, made.visual_tokens_after) == (25, 5)
    assert made.kv_bytes_after == 5 * 2 * 2 * (2 * 8) * 2


def test_the_size_that_the_model_is_really_fed(tmp_path: Path) -> None:
    stated = tiny(tmp_path / "stated", image_seq_length=16)
    assert plan(stated).tokens_per_crop == 16
    full = tiny(tmp_path / "full", image_seq_length=17, vision_feature_select_strategy="full")
    assert plan(full).tokens_per_crop == 17
    assert plan(full).encoder_tflops == plan(stated).encoder_tflops
    nested = {
        "image_processor": {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 28}}
    }
    (tmp_path / "stated" / "processor_config.json").write_text(json.dumps(nested))
    assert plan(stated).tokens_per_crop == 6
    plain = tiny(tmp_path / "plain")
    (tmp_path / "plain" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 28, "width": 28}})
    )
    assert plan(plain).tokens_per_crop == 4
    tower = CLIPVisionConfig(**{**TOWER, "image_size": 28})
    assert plan(plain).encoder_tflops == costs.encoder_flops(tower) / 1e12


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(VlmpruneError) as caught:
        plan(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_refusals(tmp_path: Path) -> None:
    for model in ("llava-2-7b", str(tmp_path / "nowhere"), str(tmp_path)):
        sentence = refused(model)
        why = (
            "has no config.json" if model == str(tmp_path) else "is neither known nor a local path"
        )
        assert f"model {model!r} {why}" in sentence
        assert ", or a local directory with a config.json" in sentence
        assert all(name in sentence for name in SHAPES)
    assert "keep=0 " in refused("llava-next-7b", 0)
    assert "budget='video'" in refused("llava-next-7b", 1, "video")
    assert "crops=0 is too few; use 1 or more" in refused("llava-next-7b", 1, crops=0)
    assert f"crops={10**20} is too many; use 10000 or fewer" in refused(
        "llava-next-7b", 1, crops=10**20
    )
    assert "newlines='no'" in refused("llava-next-7b", 1, newlines="no")
    assert "size=(0, 5) with crops=None does not go together" in refused(
        "llava-next-7b", 1, size=(0, 5)
    )
    assert "size=(5, 5) with crops=3 does not go together; give one of" in refused(
        "llava-next-7b", 1, size=(5, 5), crops=3
    )
    assert "bytes_per_value=0 must be 1 or more" in refused("llava-next-7b", 1, bytes_per_value=0)


def test_configs_that_cannot_be_used(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{ not json")
    assert f"{config} cannot be read by Transformers (" in refused(str(tmp_path))
    config.write_text(json.dumps({"model_type": "no_such_model"}))
    sentence = refused(str(tmp_path))
    assert f"{config} cannot be read by Transformers (" in sentence and "no_such_model" in sentence
    LlamaConfig().save_pretrained(tmp_path)
    assert "is of type 'llama', whose visual tokens cannot be counted yet" in refused(str(tmp_path))
    tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{ not json")
    said = f"{tmp_path / 'preprocessor_config.json'} cannot be read as JSON ("
    assert said in refused(str(tmp_path)) and "mend or remove it" in refused(str(tmp_path))


def test_json_and_table() -> None:
    plans = [plan("llava-next-7b", keep) for keep in (None, 144, 29)]
    loaded = json.loads(json.dumps(plans[1].as_dict()))
    assert loaded["visual_tokens_after"] == 768
    assert loaded["total_tflops_after"] == plans[1].total_tflops_after
    assert Plan(**{k: loaded[k] for k in Plan.__dataclass_fields__}) == plans[1]
    console = Console(file=StringIO(), width=160)
    console.print(plans_table(plans, 2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in (
        "2928 → 768",
        "44.3 → 12.2",
        "1464 → 384",
        "44.3 → 4.43",
        "1464 → 96.5",
        "90 %",
        "48 of the tokens are newlines",
    ):
        assert cell in text


def test_crops_with_fewer_than_keep_keep_all() -> None:
    for keep, below in ((576, 4), (577, 5), (9999, 5)):
        made = plan("llava-next-7b", keep, size=(480, 640), newlines="drop")
        assert made.visual_tokens_after == 2304 and made.crops_below_keep == below
        assert made.as_dict()["crops_below_keep"] == below
    for keep, below in ((2880, 0), (2881, 5)):
        made = plan("llava-next-7b", keep, "image", newlines="drop")
        assert made.visual_tokens_after == 2880 and made.crops_below_keep == below
    assert (
        plan("llava-next-7b", 0.5).crops_below_keep == plan("llava-next-7b").crops_below_keep == 0
    )
