"""What `bench` works on: shapes with random weights, and real models' prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from commandline import COFFEE
from vlmprune import VisPruner, costs, embedded
from vlmprune.costs.architectures import KNOWN
from vlmprune.errors import VlmpruneError
from vlmprune.io import models
from vlmprune.study import measure
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import shapes, workload

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", KNOWN)
def test_a_shape_is_the_architecture(name: str) -> None:
    config = shapes.config_of(name)
    assert config.model_type == KNOWN[name].model_type
    for tokens in (64, 2880):
        assert costs.prefill_flops(config, tokens) == costs.prefill_flops(KNOWN[name], tokens)
        assert costs.kv_bytes(config, tokens) == costs.kv_bytes(KNOWN[name], tokens)
    assert costs.encoder_flops(config) == costs.encoder_flops(KNOWN[name])
    # The published checkpoints have 7.06 and 13.35 thousand million weights.
    billions = shapes.parameters(config) / 1e9
    assert billions == pytest.approx(7.06 if name.endswith("7b") else 13.35, abs=0.01)


def shrunk(name: str) -> Any:
    """A shape's config with narrow layers and pictures of 4 x 4 patches."""
    config = shapes.config_of(name)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = 32, 48, 2
        part.num_attention_heads = 2
    config.text_config.num_key_value_heads, config.text_config.head_dim = 1, 16
    config.text_config.vocab_size = 50
    config.vision_config.image_size = 56
    if config.model_type == "llava_next":
        config.image_grid_pinpoints = [[56, 112], [112, 112]]
    return config


@pytest.mark.parametrize(("name", "tokens"), [("llava-1.5-7b", 16), ("llava-next-7b", 16 + 64 + 8)])
def test_prompts_hold_what_the_model_wants(name: str, tokens: int) -> None:
    config = shrunk(name)
    assert shapes.tokens_per_image(config) == tokens
    built = shapes.build(config, CPU, torch.bfloat16)
    assert built.dtype == torch.bfloat16 and not built.training
    inputs = shapes.prompt(built, batch=3, images=2, text_tokens=7)
    ids = inputs["input_ids"]
    assert ids.shape == (3, 2 * tokens + 7)
    assert ((ids == config.image_token_id).sum(dim=1) == 2 * tokens).all()
    # The model refuses placeholders that do not fit its features.
    result = bench.compare(
        bench.Work(built, inputs, name, 2),
        {"few": VisPruner(5), "fewest": VisPruner(5, newlines="drop")},
        new_tokens=2,
        repeat=1,
    )
    assert result.full.visual_tokens == 3 * 2 * tokens
    crops, newlines = (1, 0) if name == "llava-1.5-7b" else (5, 8)
    assert shapes.crops_of(config) == crops
    assert [one.visual_tokens for one in result.methods] == [
        3 * 2 * (5 * crops + newlines),
        3 * 2 * 5 * crops,
    ]


def test_random_weights_repeat_and_leave_the_random_state() -> None:
    config = shrunk("llava-1.5-7b")
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first, second = (shapes.build(config, CPU, torch.float32) for _ in range(2))
    other = shapes.build(config, CPU, torch.float32, seed=1)
    assert torch.equal(torch.randn(3), expected)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    head = first.lm_head.weight.detach()
    assert not torch.equal(head, other.lm_head.weight)
    one, two = (shapes.prompt(first, 2, 1, 6, seed=seed) for seed in (1, 2))
    assert not torch.equal(one["pixel_values"], two["pixel_values"])
    assert not torch.equal(one["input_ids"][0], one["input_ids"][1])
    # Wide enough for answers to depend on what is seen.
    assert head.std() * head.shape[1] ** 0.5 == pytest.approx(0.8, rel=0.1)


@given(st.integers(1, 10**5))
def test_a_picture_of_any_size(wanted: int) -> None:
    config = shapes.config_of("small-qwen")
    rows, columns = shapes.grid_of(wanted)
    assert rows * columns == shapes.tokens_per_image(config, wanted)
    assert wanted <= rows * columns < wanted + rows and rows <= columns <= rows + 3
    assert shapes.images_for(config, wanted) == shapes.crops_of(config) == 1


def test_qwens_shape_is_the_published_one() -> None:
    config = shapes.config_of("qwen2.5-vl-7b")
    # The published checkpoint has 8.29 thousand million weights.
    assert shapes.parameters(config) / 1e9 == pytest.approx(8.29, abs=0.005)
    # 28 layers with 4 KV heads of 128, two bytes.
    assert costs.kv_bytes(config, 1) == 2 * 28 * 4 * 128 * 2
    few = shapes.config_of("qwen2.5-vl-7b", layers=2, tower_layers=3)
    assert shapes.depths(few) == (2, 3) and few.vision_config.fullatt_block_indexes == [2]
    assert shapes.depths(shapes.config_of("llava-next-7b", layers=5)) == (5, 24)


def test_half_a_billion_weights_for_a_cpu() -> None:
    """A Qwen2.5-0.5B below its words behind CLIP's ViT-B/16, to which 384 pixels are 576 tokens."""
    config = shapes.config_of("llava-0.5b")
    # The published decoder has 0.358 thousand million weights without its words, the tower 0.086;
    # our projector and the few words that are made up add 0.009.
    assert shapes.parameters(config) / 1e9 == pytest.approx(0.358 + 0.086 + 0.009, abs=0.001)
    assert shapes.tokens_per_image(config) == 576 and shapes.images_for(config, 2880) == 5
    assert shapes.depths(config) == (24, 12)
    # 24 layers with 2 KV heads of 64, two bytes.
    assert costs.kv_bytes(config, 1) == 2 * 24 * 2 * 64 * 2


@given(st.integers(1, 10**5))
def test_enough_images(wanted: int) -> None:
    images = shapes.images_for(shapes.config_of("small"), wanted)
    assert (images - 1) * 576 < wanted <= images * 576


def test_shapes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shapes.config_of("llava-1.5-7b")
    free = 24 * shapes.GIB
    monkeypatch.setattr(shapes, "free_bytes", lambda device: free)
    with pytest.raises(VlmpruneError) as caught:
        shapes.check_memory("llava-1.5-7b", config, CPU, torch.float32, 640)
    said = str(caught.value)
    # 7.06e9 weights of 4 bytes are 26.3 GiB; 640 tokens of 1 MiB each.
    assert "26.3 of weights in float32, 0.6 of KV cache" in said
    assert "24.0 GiB are free" in said and said.count("\n") == 0
    shapes.check_memory("llava-1.5-7b", config, CPU, torch.bfloat16, 640)
    with pytest.raises(VlmpruneError, match="use a smaller shape, a smaller batch"):
        shapes.check_memory("llava-1.5-7b", config, CPU, torch.bfloat16, 64 * 640)
    monkeypatch.setattr(shapes, "free_bytes", lambda device: None)
    shapes.check_memory("llava-1.5-7b", config, CPU, torch.float32, 640)


def test_free_memory_is_told() -> None:
    free = shapes.free_bytes(CPU)
    assert free is None or free > 0
    assert shapes.free_bytes(torch.device("meta")) is None


def test_scenes_differ_from_row_to_row() -> None:
    pictures, questions = workload._scenes(batch=3, images=2)
    listed = json.loads((embedded.scenes() / "scenes.json").read_text())
    assert [len(row) for row in pictures] == [2, 2, 2]
    assert questions == [listed[at]["questions"][0]["question"] for at in (0, 2, 0)]
    assert pictures[0][0] is pictures[2][0] and pictures[0][0] is not pictures[0][1]


def test_a_batch_answers_as_its_rows_do() -> None:
    """Prompts are padded on the left, or a batch would measure something else."""
    loaded = models.Loaded(*embedded.load())
    pictures, _ = workload._scenes(batch=2, images=1)
    questions = ["where is the cat?", "is there a cake on the table?"]
    batch = models.prepare_batch(loaded, pictures, questions)
    assert (batch["attention_mask"] == 0).any() and (batch["attention_mask"][:, -1] == 1).all()
    new = measure.timed(loaded.model, batch, 4).new
    for row, (one, question) in enumerate(zip(pictures, questions, strict=True)):
        inputs = models.prepare(loaded, one, question)
        assert torch.equal(measure.timed(loaded.model, inputs, 4).new[0], new[row])


def test_a_tokenizer_without_padding() -> None:
    loaded = models.Loaded(*embedded.load())
    loaded.processor.tokenizer.pad_token = None
    pictures, questions = workload._scenes(batch=2, images=1)
    batch = models.prepare_batch(loaded, pictures, ["cat?", questions[1]])
    assert (batch["attention_mask"] == 0).any()


def test_pictures_may_be_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "2"
    Image.new("RGB", (9, 9)).save(other, "PNG")
    found = workload.parse_images([COFFEE, str(other)])
    assert isinstance(found, list) and [one.size for one in found][1] == (9, 9)
    # A number alone is a number, even beside a file of that name.
    monkeypatch.chdir(tmp_path)
    assert workload.parse_images(["2"]) == 2
    assert isinstance(workload.parse_images(["./2"]), list)
