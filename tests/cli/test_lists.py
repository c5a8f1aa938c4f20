"""The commands that need no model: their figures against independent facts."""

import json
from dataclasses import fields

import pytest

from commandline import call, config_of_embedded, sentence
from vlmprune import METHODS, __version__, catalog
from vlmprune.hosts.families import FAMILIES, TOWERS


def test_version_and_help():
    assert call("--version").stdout == f"vlmprune {__version__}\n"
    for text in (call().stdout, call("--help").stdout):
        for command in ("run", "bench", "plan", "methods", "models"):
            assert command in text


@pytest.mark.parametrize("command", ["methods", "models"])
def test_what_takes_a_while_to_start_says_so_on_a_terminal(command, monkeypatch):
    """Where nobody looks, in a pipe or a file, it says nothing."""
    usual = call(command)
    assert usual.exit_code == 0 and usual.stderr == ""
    # What Rich takes for a terminal.
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    assert "Starting…" in call(command).stderr


@pytest.mark.parametrize(
    ("model", "keep", "tokens", "before", "after", "megabytes"),
    [
        ("llava-1.5-7b", 64, 64, "8.02", "1.21", 32),
        ("llava-1.5-7b", 192, 192, "8.02", "2.89", 96),
        # Published against 2880 tokens, which a model that keeps its newlines does not have.
        ("llava-next-7b", 144, 720, "44.3", "11.5", 360),
    ],
)
def test_plan_reproduces_the_published_figures(model, keep, tokens, before, after, megabytes):
    options = ("--keep", keep, "--newlines", "drop")
    content = json.loads(call("plan", model, *options, "--json").stdout)
    assert content["visual_tokens_after"] == tokens
    assert f"{content['total_tflops_before']:.3g}" == before
    assert f"{content['total_tflops_after']:.3g}" == after
    assert content["kv_bytes_after"] == megabytes * 2**20
    shown = call("plan", model, *options).stdout
    assert f"{before} → {after}" in shown and f"→ {tokens}" in shown


def test_plan_tells_its_convention():
    """Both kinds of published tables: 3.82 for the language model in one, 7.63 in the other."""
    for options, figure, each in (([], "7.63", 2), (["--flops-per-multiply-add", 1], "3.82", 1)):
        shown = " ".join(call("plan", "llava-1.5-7b", *options).stdout.split())
        assert figure in shown and f"{each} per multiply-add" in shown
        content = json.loads(call("plan", "llava-1.5-7b", *options, "--json").stdout)
        assert content["flops_per_multiply_add"] == each
        assert f"{content['llm_tflops_before']:.2f}" == figure
        budget = ["--compute-budget", "vicuna-7b@576", *options]
        pairs = json.loads(call("plan", *budget, "--json").stdout)
        assert pairs["flops_per_multiply_add"] == each
        tokens = {one["model"]: one["visual_tokens"] for one in pairs["pairs"]}
        assert tokens["vicuna-7b"] == 576
        assert f"{each} per multiply-add" in " ".join(call("plan", *budget).stdout.split())


def test_plan_options():
    options = ("--keep", 640, "--budget", "image", "--crops", 3)
    content = json.loads(call("plan", "llava-next-7b", *options, "--json").stdout)
    assert (content["visual_tokens_before"], content["visual_tokens_after"]) == (
        3 * 576 + 24,
        640 + 24,
    )
    assert json.loads(call("plan", "llava-1.5-7b", "--json").stdout)["flops_saving"] == 0
    options = ("--keep", 29, "--size", "480x640", "--newlines")
    for newlines, left in (("keep", 181), ("drop", 145)):
        content = json.loads(call("plan", "llava-next-7b", *options, newlines, "--json").stdout)
        assert (content["visual_tokens_before"], content["visual_tokens_after"]) == (2340, left)
        assert content["newline_tokens_after"] == left - 145
    shown = call("plan", "llava-next-7b", "--keep", 29).stdout
    assert "48 of the tokens are newlines, which --newlines drop leaves out." in shown
    without = call("plan", "llava-next-7b", "--keep", 29, "--newlines", "drop").stdout
    assert "newlines" not in without + call("plan", "llava-1.5-7b", "--keep", 29).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "480"), "--size 480 is not a height and a width"),
        (("--size", "480xwide"), "--size 480xwide"),
        (("--size", "0x5"), "size=(0, 5)"),
        (("--size", "48x64", "--crops", 3), "give one of them"),
        (("--newlines", "none"), "newlines='none'"),
        (("--compute-budget", 4, "--newlines", "drop"), "--newlines out"),
    ],
)
def test_plan_refuses(options, words):
    told = call("plan", "llava-next-7b", *options)
    assert told.exit_code == 2 and told.stdout == ""
    assert words in " ".join(told.stderr.split())


def test_methods_lists_all():
    content = json.loads(call("methods", "--json").stdout)["methods"]
    assert [one["name"] for one in content] == list(METHODS)
    for one in content:
        cls = METHODS[one["name"]]
        own = [field for field in fields(cls) if field.init]
        # Those that go by name only come last.
        assert list(one["settings"]) == [
            *(field.name for field in own if not field.kw_only),
            *(field.name for field in own if field.kw_only),
        ]
        assert (one["needs"], one["paper"]) == (cls.needs, cls.paper)
        # What a user has to know of each; a control is nobody's method, and another may be new.
        assert one["stage"] and one["needs"], one["name"]
        published = one["paper"].startswith("arXiv ") and one["deviations"]
        assert published or one["paper"] in ("control", "unpublished"), one["name"]
    own = content[0]["settings"]
    assert own["keep"]["required"] and own["important_ratio"]["default"] == 0.5
    assert content[0]["reusable_across_questions"] and "ties go" in content[0]["deviations"]
    files = [one["name"] for one in content if one["reads_files"]]
    assert files == ["plphp", "gsearch"]
    shown = call("methods").stdout
    assert "arXiv 2412.01818" in shown and "important_ratio=0.5" in shown
    brief = call("methods", "--brief").stdout
    assert all(name in brief for name in METHODS) and "important_ratio=0.5" not in brief
    one = call("methods", "plphp").stdout
    assert "PLPHP" in one and "VisPruner" not in one
    assert "from=FILE" in shown and "chain methods by +" in " ".join(shown.split())


def test_an_unknown_method_is_told():
    assert "method 'fast' is unknown" in sentence("methods", "fast")


def test_models_lists_all():
    content = json.loads(call("models", "--json").stdout)
    assert [one["model_type"] for one in content["families"]] == list(FAMILIES)
    assert {one["model_type"]: one["cls_token"] for one in content["towers"]} == dict(TOWERS)
    assert content["embedded"]["positions"] == config_of_embedded()["vlmprune"]["positions"]
    shown = call("models").stdout
    for family in FAMILIES.values():
        assert family.cls in shown
    assert "embedded model" in shown and "attention received" in shown


def test_the_help_of_train_names_the_methods_that_learn():
    told = " ".join(call("train", "--help").stdout.split())
    learning = [one["name"] for one in catalog.methods()["methods"] if one["training"] != "none"]
    assert f"{', '.join(learning[:-1])} or {learning[-1]}." in told
