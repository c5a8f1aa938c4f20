"""The command line: its figures against independent facts, and its sentences for mistakes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlmprune import METHODS, VisPruner, __version__, costs, embedded, running
from vlmprune.cli import app
from vlmprune.families import FAMILIES, TOWERS

COFFEE = str(embedded.scenes() / "coffee.jpg")
QUESTION = "where is the cat?"


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def sentence(*words):
    """The sentence of a mistake; checks exit code and form."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("vlmprune: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def no_loading(monkeypatch):
    """For mistakes that must be found before a model is loaded."""

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(running, "load", load)


@pytest.fixture(scope="module")
def loaded():
    return embedded.load()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run as JSON: its content and the overlay that it drew."""
    target = tmp_path_factory.mktemp("run") / "new" / "overlay.png"
    result = call(
        *("run", COFFEE, QUESTION, "--keep", 64, "--repeat", 1, "--json"),
        *("--device", "cpu", "--save-overlay", target),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout), target


def config_of_embedded():
    return json.loads((embedded.path() / "config.json").read_text())


def test_run_tells_tokens_and_bytes(ran):
    content, target = ran
    text = config_of_embedded()["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    # Keys and values of all layers, four bytes each.
    token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * 4
    for side, tokens in (("full", 256), ("pruned", 64)):
        assert content[side]["visual_tokens"] == tokens
        assert content[side]["kv_bytes"] == token * tokens
        assert min(content[side]["prefill_ms"], content[side]["total_ms"]) > 0
        assert 0 < content[side]["new_tokens"] <= 64
    assert content["report"]["kv_bytes_after"] == token * 64
    assert len(content["report"]["kept"][0]) == 64
    assert (content["device"], content["dtype"], content["repeat"]) == ("cpu", "float32", 1)
    assert content["overlays"] == [str(target)]
    assert content["question"] == QUESTION and content["images"] == [COFFEE]
    speedup = content["full"]["prefill_ms"] / content["pruned"]["prefill_ms"]
    assert content["prefill_speedup"] == pytest.approx(speedup)


def test_run_tells_flops(ran, loaded):
    content, _ = ran
    config = loaded[0].config
    encoder = costs.encoder_flops(config, 1, pixels=224)
    for side, tokens in (("full", 256), ("pruned", 64)):
        assert content[side]["decoder_flops"] == costs.prefill_flops(config, tokens)
        assert content[side]["flops"] == content[side]["decoder_flops"] + encoder


def test_run_answers_as_the_library_does(ran, loaded):
    content, _ = ran
    model, processor = loaded
    with Image.open(COFFEE) as image:
        inputs = processor(
            text=f"USER: <image>\n{QUESTION} ASSISTANT:", images=image, return_tensors="pt"
        )

    def answer():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=64)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert content["full"]["answer"] == answer().strip() != ""
    with VisPruner(keep=64)(model) as handle:
        assert content["pruned"]["answer"] == answer().strip()
    assert content["report"]["kept"] == [handle.report.kept[0].tolist()]
    assert content["report"]["positions"] == handle.report.positions == "original"


def test_overlay_shows_what_was_kept(ran):
    content, target = ran
    kept = set(content["report"]["kept"][0])
    with Image.open(COFFEE) as image, Image.open(target) as drawn:
        assert drawn.width == 672 + 40 and drawn.height > 672 + 40
        photo = image.convert("RGB").resize((672, 672), Image.Resampling.LANCZOS)
        photo = np.asarray(photo, dtype=float)
        panel = np.asarray(drawn.crop((20, 20, 692, 692)), dtype=float)
    for token in range(256):
        row, column = divmod(token, 16)
        # Within the patch of 42 pixels, away from its outline.
        inside = (slice(row * 42 + 8, row * 42 + 34), slice(column * 42 + 8, column * 42 + 34))
        if token in kept:
            assert (panel[inside] == photo[inside]).all()
        else:
            assert panel[inside].mean() < 0.5 * photo[inside].mean() + 1


def test_settings_reach_the_method(loaded, monkeypatch):
    monkeypatch.setattr(running, "load", lambda *_: running.Loaded(*loaded))
    result = call(
        *("run", COFFEE, QUESTION, "--keep", 0.125, "--important-ratio", 0.75, "--json"),
        *("--positions", "compact", "--budget", "image", "--repeat", 1, "--max-new-tokens", 2),
        *("--device", "cpu"),
    )
    content = json.loads(result.stdout)
    expected = VisPruner(0.125, important_ratio=0.75, positions="compact", budget="image")
    assert content["report"]["method"] == repr(expected)
    assert content["report"]["positions"] == "compact"
    assert content["pruned"]["visual_tokens"] == 32
    assert content["full"]["new_tokens"] == content["pruned"]["new_tokens"] == 2


def test_table_and_several_images(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "load", lambda *_: running.Loaded(*loaded))
    grass = embedded.scenes() / "grass.jpg"
    result = call(
        *("run", COFFEE, grass, QUESTION, "--repeat", 1, "--max-new-tokens", 4),
        *("--device", "cpu", "--save-overlay", tmp_path / "out.png"),
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    for fact in ("512", "128", "-75 %", "original positions", "CLS attention", "median of 1"):
        assert fact in result.stdout
    pictures = sorted(tmp_path.iterdir())
    assert [picture.name for picture in pictures] == ["out-1.png", "out-2.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@pytest.fixture(scope="module")
def any_resolution(tmp_path_factory):
    """A folder with a tiny random LLaVA-NeXT of 28-pixel tiles, and no chat template."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        LlavaProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = LlavaProcessor.from_pretrained(embedded.path()).tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    pinpoints = [[56, 112], [112, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14, num_hidden_layers=3, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("next")
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def test_any_resolution_end_to_end(any_resolution, tmp_path):
    photo = tmp_path / "wide.png"
    with Image.open(COFFEE) as image:
        image.resize((200, 100)).save(photo)
    result = call(
        *("run", photo, QUESTION, "--model", any_resolution, "--keep", 4, "--json"),
        *("--repeat", 1, "--max-new-tokens", 3, "--save-overlay", tmp_path / "o.png"),
        *("--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    # Two tiles side by side and the base view, 16 patches each, and a newline for each of 4 rows.
    assert content["full"]["visual_tokens"] == 3 * 16 + 4
    assert content["pruned"]["visual_tokens"] == 3 * 4 + 4
    assert content["report"]["newline_tokens"] == 4
    with Image.open(tmp_path / "o.png") as drawn:
        # Two panels side by side.
        assert drawn.width == 2 * 672 + 3 * 20


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run",), "Missing argument"),
        (("run", COFFEE), "Missing argument"),
        (("run", COFFEE, COFFEE), "the question is missing"),
        (("run", "nowhere.jpg", QUESTION), "image 'nowhere.jpg' does not exist"),
        (("run", __file__, QUESTION), "cannot be opened as a picture"),
        (("run", str(embedded.scenes()), QUESTION), "cannot be opened as a picture"),
        (("run", COFFEE, QUESTION, "--keep", "0"), "keep=0 leaves no visual tokens"),
        (("run", COFFEE, QUESTION, "--keep", "1.5"), "outside (0, 1]"),
        (("run", COFFEE, QUESTION, "--keep", "many"), "--keep many is not a number"),
        (("run", COFFEE, QUESTION, "--keep", "257"), "more than the 256 visual tokens"),
        (("run", COFFEE, QUESTION, "--method", "magic"), "use one of vispruner"),
        (("run", COFFEE, QUESTION, "--important-ratio", "2"), "outside [0, 1]"),
        (("run", COFFEE, QUESTION, "--positions", "odd"), "positions='odd' is not known"),
        (("run", COFFEE, QUESTION, "--budget", "odd"), "budget='odd' is not known"),
        (("run", COFFEE, QUESTION, "--repeat", "0"), "--repeat 0 is too few"),
        (("run", COFFEE, QUESTION, "--max-new-tokens", "0"), "--max-new-tokens 0 is too few"),
        (("run", COFFEE, QUESTION, "--dtype", "int8"), "dtype 'int8' is unknown"),
        (("run", COFFEE, QUESTION, "--device", "abacus"), "device 'abacus' is not available"),
        (("run", COFFEE, QUESTION, "--model", "./none"), "model path './none' does not exist"),
        (("run", COFFEE, QUESTION, "--model", "llava-1.5-7b"), "for `vlmprune plan`"),
        (("run", COFFEE, QUESTION, "--save-overlay", "o.txt"), "no suffix of a picture"),
        (("run", COFFEE, QUESTION, "--save-overlay", f"{COFFEE}/o.png"), "cannot be written"),
        (("run", COFFEE, QUESTION, "--save-overlay", COFFEE), "is one of the images"),
        (("plan", "nothing"), "neither known nor a local path"),
        (("plan", "llava-1.5-7b", "--keep", "577"), "more than the 576 visual tokens"),
        (("plan", "llava-1.5-7b", "--budget", "odd"), "budget='odd' is unknown"),
        (("plan", "llava-1.5-7b", "--crops", "0"), "crops=0 is too few"),
        (("nothing",), "No such command 'nothing'"),
        (("--nothing",), "--nothing"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value).replace(COFFEE, "IMAGE"),
)
def test_mistakes_are_one_sentence_before_loading(no_loading, words, expected):
    assert expected in sentence(*words)


def test_model_folders_that_will_not_do(no_loading, tmp_path):
    asked = ("run", COFFEE, QUESTION, "--model", tmp_path)
    assert "has no config.json" in sentence(*asked)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in sentence(*asked)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    said = sentence(*asked)
    assert "models of type 'gpt2'" in said and "LlavaForConditionalGeneration" in said
    tower = {"model_type": "llava", "vision_config": {"model_type": "vit"}}
    (tmp_path / "config.json").write_text(json.dumps(tower))
    assert "vision tower 'vit'" in sentence(*asked)


def test_model_folders_that_lack_files(tmp_path):
    def copy(name):
        shutil.copy(embedded.path() / name, tmp_path)

    asked = ("run", COFFEE, QUESTION, "--model", tmp_path)
    copy("config.json")
    assert "processor" in sentence(*asked)
    for file in embedded.path().iterdir():
        if not file.name.startswith("model"):
            copy(file.name)
    assert f"the weights of '{tmp_path}' cannot be loaded" in sentence(*asked)


def test_a_processor_that_needs_torchvision(monkeypatch):
    from transformers import AutoProcessor

    def missing(*args, **kwargs):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    assert "pip install torchvision" in sentence("run", COFFEE, QUESTION)


def test_no_overlay_is_left_by_a_mistake(tmp_path):
    sentence("run", COFFEE, QUESTION, "--keep", 300, "--save-overlay", tmp_path / "o.png")
    assert not list(tmp_path.iterdir())


def test_interrupted_quietly(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "load", interrupted)
    result = call("run", COFFEE, QUESTION)
    assert (result.exit_code, result.output) == (130, "")


def test_warnings_and_bars_come_back(ran):
    """The command silences Transformers for itself alone."""
    from transformers.utils import logging

    logging.set_verbosity_warning()
    with running.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.WARNING
    assert logging.is_progress_bar_enabled()


def test_real_process(tmp_path):
    def process(*words):
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "vlmprune", *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    wrong = process("run", COFFEE, QUESTION, "--model", "nobody/nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("vlmprune: model 'nobody/nothing' is no local path")
    assert wrong.stderr.count("\n") == 1
    right = process("run", COFFEE, QUESTION, "--json", "--repeat", "1")
    assert (right.returncode, right.stderr) == (0, "")
    assert json.loads(right.stdout)["pruned"]["visual_tokens"] == 64


def test_version_and_help():
    assert call("--version").stdout == f"vlmprune {__version__}\n"
    for text in (call().stdout, call("--help").stdout):
        for command in ("run", "plan", "methods", "models"):
            assert command in text


@pytest.mark.parametrize(
    ("model", "keep", "tokens", "before", "after", "megabytes"),
    [
        ("llava-1.5-7b", 64, 64, "8.02", "1.21", 32),
        ("llava-1.5-7b", 192, 192, "8.02", "2.89", 96),
        ("llava-next-7b", 144, 720, "43.6", "11.5", 360),
    ],
)
def test_plan_reproduces_the_published_figures(model, keep, tokens, before, after, megabytes):
    content = json.loads(call("plan", model, "--keep", keep, "--json").stdout)
    assert content["visual_tokens_after"] == tokens
    assert f"{content['total_tflops_before']:.3g}" == before
    assert f"{content['total_tflops_after']:.3g}" == after
    assert content["kv_bytes_after"] == megabytes * 2**20
    shown = call("plan", model, "--keep", keep).stdout
    assert f"{before} → {after}" in shown and f"→ {tokens}" in shown


def test_plan_options():
    options = ("--keep", 640, "--budget", "image", "--crops", 3)
    content = json.loads(call("plan", "llava-next-7b", *options, "--json").stdout)
    assert (content["visual_tokens_before"], content["visual_tokens_after"]) == (3 * 576, 640)
    assert json.loads(call("plan", "llava-1.5-7b", "--json").stdout)["flops_saving"] == 0


def test_methods_lists_all():
    content = json.loads(call("methods", "--json").stdout)["methods"]
    assert [one["name"] for one in content] == list(METHODS)
    for one in content:
        cls = METHODS[one["name"]]
        assert list(one["settings"]) == [field.name for field in fields(cls)]
        assert (one["needs"], one["paper"]) == (cls.needs, cls.paper)
    own = content[0]["settings"]
    assert own["keep"]["required"] and own["important_ratio"]["default"] == 0.5
    assert content[0]["reusable_across_questions"] and "ties go" in content[0]["deviations"]
    shown = call("methods").stdout
    assert "arXiv 2412.01818" in shown and "important_ratio=0.5" in shown


def test_models_lists_all():
    content = json.loads(call("models", "--json").stdout)
    assert [one["model_type"] for one in content["families"]] == list(FAMILIES)
    assert {one["model_type"]: one["cls_token"] for one in content["towers"]} == dict(TOWERS)
    assert content["embedded"]["positions"] == config_of_embedded()["vlmprune"]["positions"]
    shown = call("models").stdout
    for family in FAMILIES.values():
        assert family.cls in shown
    assert "embedded model" in shown and "attention received" in shown
