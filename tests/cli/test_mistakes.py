"""Mistakes at the command line: one sentence each, before any work, and no traceback."""

import json
import shutil
import subprocess
import sys

import pytest

from commandline import COFFEE, QUESTION, call, sentence
from vlmprune import embedded
from vlmprune.io import models
from zoo import ZOO


@pytest.fixture
def no_loading(monkeypatch):
    """For mistakes that must be found before a model is loaded."""

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run",), "Missing argument"),
        (("run", COFFEE), "the question is missing"),
        (("run", "photo.jpg"), "the question is missing"),
        (("run", QUESTION), "Missing argument 'IMAGE'"),
        (("run", COFFEE, "\udcff?"), "holds bytes that are no text"),
        (("run", COFFEE, COFFEE), "the question is missing"),
        (("run", "nowhere.jpg", QUESTION), "image 'nowhere.jpg' does not exist"),
        (
            ("run", COFFEE, "is", "there", "a cat?"),
            "'is' does not exist; if it is a word of the qu",
        ),
        (("run", COFFEE, "two.png", QUESTION), "image 'two.png' does not exist; give the path"),
        (("run", __file__, QUESTION), "cannot be opened as a picture"),
        (("run", str(embedded.scenes()), QUESTION), "cannot be opened as a picture"),
        (("run", COFFEE, QUESTION, "--keep", "0"), "keep=0 leaves no visual tokens"),
        (("run", COFFEE, QUESTION, "--keep", "1.5"), "outside (0, 1]"),
        (("run", COFFEE, QUESTION, "--keep", "0%"), "outside (0, 1]"),
        (("run", COFFEE, QUESTION, "--keep", "150%"), "keep=1.5 is a fraction outside"),
        (("run", COFFEE, QUESTION, "--keep", "5%%"), "--keep 5%% is not a number"),
        (("run", COFFEE, QUESTION, "--keep", "many"), "--keep many is not a number"),
        (("run", COFFEE, QUESTION, "--method", "magic"), "use one of vispruner"),
        (
            ("run", COFFEE, QUESTION, "--method", "vispruner:kept=4"),
            "no setting 'kept' (did you mean 'keep'?); it has keep",
        ),
        (("run", COFFEE, QUESTION, "--method", "plphp+vispruner"), "must come last in a chain"),
        (("run", COFFEE, QUESTION, "--method", "plphp", "--keep", "4"), "no setting of plphp"),
        (
            ("run", COFFEE, QUESTION, "--method", "vispruner:keep=4", "--keep", "4"),
            "keep is given twice, in --method vispruner:keep=4 and by --keep",
        ),
        (("run", COFFEE, QUESTION, "--method", "evs:keep=0.5"), "evs needs videos"),
        (("bench", "--method", "evs:keep=0.5"), "evs needs videos"),
        (("search", "evs"), "evs needs videos"),
        (("run", COFFEE, QUESTION, "--decode-tokens", "1"), "--decode-tokens 1 leaves no step"),
        (("run", COFFEE, QUESTION, "--decode-tokens", "-2"), "--decode-tokens -2 leaves no step"),
        (("run", COFFEE, QUESTION, "--important-ratio", "2"), "outside [0, 1]"),
        (("run", COFFEE, QUESTION, "--positions", "odd"), "positions='odd' is not known"),
        (("run", COFFEE, QUESTION, "--budget", "odd"), "budget='odd' is not known"),
        (("run", COFFEE, QUESTION, "--repeat", "0"), "--repeat 0 is too few"),
        (("run", COFFEE, QUESTION, "--max-new-tokens", "0"), "--max-new-tokens 0 is too few"),
        (("run", COFFEE, QUESTION, "--dtype", "int8"), "dtype 'int8' is unknown"),
        (("run", COFFEE, QUESTION, "--device", "abacus"), "device 'abacus' is not available"),
        (("run", COFFEE, QUESTION, "--device", "hpu"), "device 'hpu' is not available"),
        (("run", COFFEE, QUESTION, "--model", "./none"), "model path './none' does not exist"),
        (("run", COFFEE, QUESTION, "--model", "llava-1.5-7b"), "for `vlmprune plan`"),
        (("run", COFFEE, QUESTION, "--save-overlay", "o.txt"), "no suffix of a picture"),
        (
            ("run", COFFEE, QUESTION, "--save-overlay", f"{COFFEE}/o.png"),
            "cannot be a folder, for it is a file",
        ),
        (("run", COFFEE, QUESTION, "--save-overlay", COFFEE), "is one of the files to be read"),
        (("run", COFFEE, QUESTION, "--save-recall", "o.gif"), "use a method that reads it in part"),
        (
            ("run", COFFEE, QUESTION, "--method", "plphp", "--save-recall", "o.gif"),
            "and PLPHP reads all of it",
        ),
        (
            ("run", COFFEE, QUESTION, "--method", "recall", "--save-recall", "o.jpg"),
            "--save-recall 'o.jpg' does not end in .gif",
        ),
        (
            ("run", COFFEE, QUESTION, "--method", "recall", "--save-recall", f"{COFFEE}/o.gif"),
            "cannot be a folder, for it is a file",
        ),
        (
            (
                *("run", COFFEE, QUESTION, "--method", "recall", "--save-recall", "o.gif"),
                *("--max-new-tokens", "1"),
            ),
            "--max-new-tokens 1 leaves none; give 2 or more",
        ),
        (
            (
                *("run", COFFEE, QUESTION, "--method", "recall", "--save-recall", "o.png"),
                *("--save-overlay", "o.png"),
            ),
            "are to be written and are one file",
        ),
        (("run", COFFEE, QUESTION, "--model", "small"), "for `vlmprune plan`"),
        (("plan", "qwen2.5-vl-7b", "--crops", "2"), "takes pictures of any size"),
        (("search", "random", "--out", "/"), "--out '/' is a folder"),
        (("calibrate", "--out", "."), "--out '.' is a folder"),
        (("plan", "nothing"), "neither known nor a local path"),
        (("plan", "llava-1.5-7b", "--budget", "odd"), "budget='odd' is unknown"),
        (("plan", "llava-1.5-7b", "--crops", "0"), "crops=0 is too few"),
        (
            ("plan", "llava-1.5-7b", "--flops-per-multiply-add", "3"),
            "--flops-per-multiply-add 3 is no convention; use 1 or 2",
        ),
        (("plan", "--compute-budget", "a\nb\x1b[31m"), r"--compute-budget a\nb\x1b[31m is neither"),
        (("a\nb",), r"No such command 'a\nb'"),
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
    assert "does not support the vision tower 'vit' yet; supported towers: " in sentence(*asked)


@pytest.mark.parametrize(
    "content", ['{"model_type": ["llava"]}', '{"vision_config": 3}', '{"architectures": 3}']
)
def test_configs_of_another_form(no_loading, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    said = sentence("run", COFFEE, QUESTION, "--model", tmp_path)
    assert "config cannot be read" in said


@pytest.mark.parametrize(
    "words",
    [
        ("run", COFFEE, QUESTION, "--method", "plphp:from=deep/config.json"),
        ("run", COFFEE, QUESTION, "--method", "gsearch:from=deep/config.json"),
        ("run", COFFEE, QUESTION, "--method", "quecc:weights=deep"),
        ("run", COFFEE, QUESTION, "--model", "deep"),
        ("eval", "--task", "folder:deep"),
        ("eval", "--task", "pope:deep/config.json"),
        ("train", "quecc", "--data", "deep/config.json", "--out", "r"),
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_json_that_is_nested_too_deep(no_loading, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("config.json", "questions.json"):
        (tmp_path / "deep" / name).write_text("[" * 100_000)
    said = sentence(*words)
    # Of a file that may be of any kind it is told that it is not of the one that is due.
    no_kind = {"plphp": "is no calibration", "gsearch": "is no schedule"}
    why = no_kind.get(words[-1].partition(":")[0], "(it is nested too deep)")
    assert "deep/" in said and why in said


def test_model_folders_that_lack_files(tmp_path):
    def copy(name):
        shutil.copy(embedded.path() / name, tmp_path)

    asked = ("run", COFFEE, QUESTION, "--model", tmp_path)
    copy("config.json")
    assert f"the processor of '{tmp_path}' cannot be loaded (" in sentence(*asked)
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


@pytest.mark.parametrize(("name", "slow"), [("nowhere.jpg", False), (COFFEE, True)])
def test_a_missing_picture_is_told_before_anything_slow_is_imported(name, slow):
    code = (
        "import sys; from vlmprune.cli import app\n"
        f"try: app(['run', {name!r}, 'why?', '--keep', '0'])\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["2", str(slow)], ran.stderr


def test_no_overlay_is_left_by_a_mistake(tmp_path):
    sentence("run", COFFEE, QUESTION, "--keep", 0, "--save-overlay", tmp_path / "o.png")
    assert not list(tmp_path.iterdir())


def test_interrupted_quietly(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupted)
    result = call("run", COFFEE, QUESTION)
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize("name", list(ZOO))
def test_every_family_gets_as_far_as_its_weights(name, tmp_path):
    """Nothing before loading stands in the way of a family that is not counted in advance."""
    model = ZOO[name].make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    said = sentence("run", COFFEE, QUESTION, "--model", tmp_path, "--keep", 4)
    # A folder without files of a processor gives none, or a tokenizer in its place.
    lacking = (
        f"the processor of '{tmp_path}' ",
        f"'{tmp_path}' has no processor for images; give a folder that holds",
    )
    assert any(words in said for words in lacking)


def test_a_class_that_may_be_followed_gets_that_far_too(tmp_path):
    config = {"model_type": "cohere2_vision"}
    config["architectures"] = ["Cohere2VisionForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "processor" in sentence("run", COFFEE, QUESTION, "--model", tmp_path)
