"""`vlmprune run`: its figures against independent facts, its table, its options."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from commandline import COFFEE, QUESTION, call, config_of_embedded, sentence
from vlmprune import PLPHP, VisPruner, VlmpruneError, costs, embedded, spec
from vlmprune.cli import run
from vlmprune.io import models
from vlmprune.io.outputs import maker
from vlmprune.study import one_question
from zoo import ZOO


@pytest.fixture(scope="module")
def loaded():
    return embedded.load()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run as JSON: its content and the overlay that it drew."""
    target = tmp_path_factory.mktemp("run") / "overlay.png"
    result = call(
        *("run", COFFEE, QUESTION, "--keep", 64, "--repeat", 1, "--json"),
        *("--device", "cpu", "--save-overlay", target),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout), target


def test_run_tells_tokens_and_bytes(ran):
    content, target = ran
    text = config_of_embedded()["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    # Keys and values of all layers, four bytes each.
    token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * 4
    for side, tokens in (("full", 256), ("pruned", 64)):
        assert content[side]["visual_tokens"] == tokens
        assert content[side]["kv_bytes"] == token * tokens
        assert min(content[side]["first_token_ms"], content[side]["total_ms"]) > 0
        assert 0 < content[side]["new_tokens"] <= 64
    assert content["report"]["kv_bytes_after"] == token * 64
    assert len(content["report"]["kept"][0]) == 64
    assert (content["device"], content["dtype"], content["repeat"]) == ("cpu", "float32", 1)
    assert content["overlays"] == [str(target)] and maker(target) == "vlmprune run"
    assert content["question"] == QUESTION and content["images"] == [COFFEE]
    speedup = content["full"]["first_token_ms"] / content["pruned"]["first_token_ms"]
    assert content["first_token_speedup"] == pytest.approx(speedup)
    rates = [content[side]["decode_tokens_per_second"] for side in ("full", "pruned")]
    assert min(rates) > 0 and content["decode_speedup"] == pytest.approx(rates[1] / rates[0])
    assert content["decode_tokens"] == 32
    assert content["method"] == "vispruner:keep=64"
    assert content["first_token_same"] is True


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
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    result = call(
        *("run", COFFEE, QUESTION, "--keep", 0.125, "--important-ratio", 0.75, "--json"),
        *("--positions", "compact", "--budget", "image", "--repeat", 1, "--max-new-tokens", 2),
        *("--device", "cpu", "--decode-tokens", 0),
    )
    content = json.loads(result.stdout)
    expected = VisPruner(0.125, important_ratio=0.75, positions="compact", budget="image")
    assert content["report"]["method"] == repr(expected)
    assert content["report"]["positions"] == "compact"
    assert content["pruned"]["visual_tokens"] == 32
    assert content["full"]["new_tokens"] == content["pruned"]["new_tokens"] == 2


@pytest.fixture
def short(loaded, monkeypatch):
    """`run` on the loaded model with short answers, as JSON unless told otherwise."""
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))

    def ask(*words, form="--json", question=QUESTION):
        options = ("--repeat", 1, "--max-new-tokens", 2, "--device", "cpu")
        result = call("run", COFFEE, question, *options, *words, *[form] * bool(form))
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if form else result.stdout

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), VisPruner(keep=64)),
        (("--method", "vispruner:keep=32"), VisPruner(keep=32)),
        (("--keep", "25%"), VisPruner(0.25)),
        (("--method", "vispruner:keep=25%"), VisPruner(0.25)),
        (
            ("--method", "vispruner:keep=0.5", "--positions", "compact"),
            VisPruner(0.5, 0.5, "compact"),
        ),
        (("--method", "plphp"), PLPHP()),
        (("--method", "vispruner+plphp:r=0.5"), VisPruner(64) | PLPHP(r=0.5)),
        (
            ("--method", "vispruner|vispruner:keep=8", "--keep", 16, "--important-ratio", 1),
            VisPruner(16, 1.0) | VisPruner(8, 1.0),
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) or "default" if isinstance(value, tuple) else None,
)
def test_a_spec_and_its_shorthands(short, words, expected):
    content = short("--decode-tokens", 0, *words)
    assert content["report"]["method"] == repr(expected)
    assert spec.parse(content["method"]) == expected
    assert content["method"] == spec.dump(expected)


def test_a_long_question(short):
    question = QUESTION + " " + "x" * 260
    assert short("--decode-tokens", 0, question=question)["question"] == question


def test_a_model_whose_tokens_cannot_be_placed_answers(loaded, monkeypatch, tmp_path):
    """It is said before the answer, and nothing is drawn."""
    why = "where visual tokens lie is not known for Such yet"

    def unknown(family):
        raise VlmpruneError(f"{why}.")

    events = []
    answer = one_question.answer_twice

    def answered(*args):
        events.append("answer")
        return answer(*args)

    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    monkeypatch.setattr(one_question, "answer_twice", answered)
    asked = ("run", COFFEE, QUESTION, "--repeat", 1, "--max-new-tokens", 2, "--device", "cpu")
    asked += ("--decode-tokens", 0)
    drawn = ("--method", "recall", "--save-overlay", tmp_path / "o.png")
    drawn += ("--save-recall", tmp_path / "o.gif")
    echo = run.typer.echo
    monkeypatch.setattr(run.typer, "echo", lambda *a, **k: (events.append("said"), echo(*a, **k)))
    for place, order in (("check_family", ["said", "answer"]), ("places_of", ["answer", "said"])):
        with monkeypatch.context() as changed:
            changed.setattr(one_question, place, lambda *_: unknown(""))
            result = call(*asked, *drawn, "--json")
        assert result.exit_code == 0
        assert result.stderr == f"vlmprune: nothing is drawn ({why}); the answer comes without.\n"
        content = json.loads(result.stdout)
        assert content["pruned"]["answer"] and content["not_drawn"] == why
        assert content["overlays"] == content["films"] == []
        assert events[:2] == order
        events.clear()
    assert not list(tmp_path.iterdir())
    result = call(*asked, *drawn, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["not_drawn"] is None and len(list(tmp_path.iterdir())) == 2


def test_which_models_cannot_be_drawn_on(loaded):
    assert one_question.undrawn(models.Loaded(*loaded)) == ""
    built = ZOO["idefics3"].build()
    assert "Idefics3" in one_question.undrawn(models.Loaded(built, None))


def test_a_cut_cache_and_its_table(short):
    content = short("--method", "plphp:r=0.5,dr=0", "--decode-tokens", 2)
    # Nothing is chosen before prefill, so the first token cannot change.
    assert content["first_token_same"] is True
    assert content["pruned"]["visual_tokens"] == content["full"]["visual_tokens"] == 256
    assert 2 * content["pruned"]["kv_bytes"] == content["full"]["kv_bytes"]
    assert (
        len(content["report"]["layers"]) == config_of_embedded()["text_config"]["num_hidden_layers"]
    )
    shown = short("--method", "vispruner+plphp:r=0.5,dr=0", "--decode-tokens", 0, form=None)
    assert "vispruner + plphp" in shown and "cut, to 50 % to 50 % of" in shown


def test_decode_speed_can_be_left_out(short):
    content = short("--decode-tokens", 0)
    assert content["decode_tokens"] == 0 and content["decode_speedup"] is None
    assert content["full"]["decode_tokens_per_second"] is None
    shown = short("--decode-tokens", 0, form=None)
    assert "tok/s" not in shown and "decode: over" not in shown
    # A dash in both columns.
    row = next(line for line in shown.splitlines() if line.startswith("decode"))
    assert row.split() == ["decode", "–", "–"]  # noqa: RUF001


def test_a_first_token_that_changes_is_told(short):
    # The sign is lost among eight tokens.
    asked = {"question": "can you see a sign?"}
    content = short("--keep", 8, "--decode-tokens", 0, **asked)
    assert content["first_token_same"] is False
    assert (content["full"]["answer"][:3], content["pruned"]["answer"][:2]) == ("yes", "no")
    for keep, told in ((8, "not"), (256, "the same as")):
        shown = short("--keep", keep, "--decode-tokens", 0, form=None, **asked)
        assert f"first token: {told} the unpruned model's" in shown


def test_table_and_several_images(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    grass = embedded.scenes() / "grass.jpg"
    result = call(
        *("run", COFFEE, grass, QUESTION, "--repeat", 1, "--max-new-tokens", 4),
        *("--device", "cpu", "--save-overlay", tmp_path / "out.png"),
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    for fact in ("512", "128", "-75 %", "original positions", "CLS attention", "median of 1"):
        assert fact in result.stdout
    assert "tok/s" in result.stdout and "over 32 tokens" in result.stdout
    assert "first token: the same as the unpruned model's" in result.stdout
    pictures = sorted(tmp_path.iterdir())
    assert [picture.name for picture in pictures] == ["out-1.png", "out-2.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_warnings_and_bars_come_back(ran):
    """The command silences Transformers for itself alone."""
    from transformers.utils import logging

    logging.set_verbosity_warning()
    with models.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.WARNING
    assert logging.is_progress_bar_enabled()


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = sentence("run", COFFEE, QUESTION, "--model", "nobody/nothing")
    assert said.startswith("vlmprune: model 'nobody/nothing' is no local path")


def test_real_process():
    """What goes wrong in one is `test_an_interpreter_without_it`'s."""
    words = ("run", COFFEE, QUESTION, "--json", "--repeat", "1", "--decode-tokens", "0")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vlmprune", *words]
    right = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert (right.returncode, right.stderr) == (0, "")
    assert json.loads(right.stdout)["pruned"]["visual_tokens"] == 64
