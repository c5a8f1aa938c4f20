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
        assert list(one["settings"]) == [field.name for field in fields(cls) if field.init]
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
