"""The vLLM plugin without vLLM: which methods serve, budgets, counts, and what is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repository import ROOT
from vlmprune import EVS, AveragePooling, DivPrune, VisPruner, spec
from vlmprune.errors import VlmpruneError
from vlmprune.integrations import vllm as plugin
from vlmprune.integrations.vllm import fields, policy
from vlmprune.methods import METHODS
from vlmprune.views import EncoderView
from vlmprune.views.layout import NO_PATCH, Layout, plain

SERVING = {
    "vispruner",
    "fastervlm",
    "visionzip",
    "divprune",
    "fopru",
    "vtc_cls",
    "evs",
    "random",
    "uniform",
    "average_pooling",
}
# The others that choose before the language model, each with the reason that a server gives. A new
# method goes into one of the two; that it "is not adapted" is no reason.
_LATE = "keeps a number of tokens that is known only once the image is encoded"
_ASKS = "looks at the question, and vLLM keeps encoded images for any question"
NOT_SERVING = {
    "prumerge": _LATE,
    "cdpruner": _ASKS,
    "quecc": _ASKS,
    "tome": "acts inside the vision encoder",
    "evit": "acts inside the vision encoder",
    "vistog": _LATE,
    "downsample": "acts inside the vision encoder",
}


def of(text: str) -> policy.Policy:
    return policy.Policy(None if text == "none" else spec.parse(text))


def test_importing_the_package_and_the_plugin_imports_no_vllm() -> None:
    code = (
        "import sys, os; os.environ.pop('VLMPRUNE', None);"
        "import vlmprune.integrations.vllm as plugin; plugin.register();"
        "print('vllm' in sys.modules, 'vlmprune.integrations.vllm.policy' in sys.modules);"
        "import vlmprune; from vlmprune import VisPruner; print('vllm' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "False"]


def test_the_entry_point_names_the_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    group = text.split('[project.entry-points."vllm.general_plugins"]')[1].split("[")[0]
    (name,) = re.findall(r'^vlmprune = "(.+)"$', group, re.MULTILINE)
    assert EntryPoint("vlmprune", name, "vllm.general_plugins").load() is plugin.register


@pytest.mark.parametrize("name", sorted(set(METHODS) - SERVING))
def test_other_methods_are_refused_by_name(name: str) -> None:
    # What a method is does not hang on its settings, some of which would be files.
    pruner = object.__new__(METHODS[name])
    if not hasattr(METHODS[name], "keep"):
        object.__setattr__(pruner, "keep", 4)
    with pytest.raises(VlmpruneError) as error:
        policy.check(pruner)
    why = NOT_SERVING.get(name, "acts inside the language model")
    assert f"method {name!r} cannot serve in vLLM, as it {why}; " in str(error.value)
    assert all(one in str(error.value) for one in SERVING)
    assert str(error.value).count(". ") == 0


def test_every_method_that_chooses_before_the_language_model_serves_or_says_why() -> None:
    choosing = {name for name, cls in METHODS.items() if object.__new__(cls).shortens}
    assert set(policy._SERVING) == SERVING
    assert choosing == SERVING | set(NOT_SERVING) and not SERVING & set(NOT_SERVING)
    assert not [name for name, why in NOT_SERVING.items() if "not adapted" in why]


@pytest.mark.parametrize("name", sorted(SERVING))
def test_these_serve(name: str) -> None:
    policy.check(spec.parse(f"{name}:keep=4"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vispruner:keep=4,score=pooling", "pooling head"),
        ("fopru:keep=4,choose=row", "whole rows"),
        ("vispruner:keep=9|average_pooling:keep=4", "counts its tokens by what other methods"),
        ("vispruner:keep=9|divprune:keep=4", "counts something else"),
        ("vispruner:keep=9|cdpruner:keep=4", "looks at the question"),
    ],
)
def test_settings_that_cannot_serve_say_why(text: str, words: str) -> None:
    with pytest.raises(VlmpruneError, match=words):
        policy.check(spec.parse(text))


@pytest.mark.parametrize("text", ["vispruner:kep=4", "nothing", "cdpruner:keep=8", "vispruner"])
def test_a_wrong_spec_ends_the_process_with_one_sentence(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMPRUNE", text)
    with pytest.raises(SystemExit) as end:
        plugin.register()
    assert str(end.value).startswith("VLMPRUNE: ")
    assert "\n" not in str(end.value)
    assert "vllm" not in sys.modules


def test_what_a_request_asks_for() -> None:
    server = of("vispruner:keep=64,important_ratio=0.75")
    assert server.method(None) == VisPruner(64, 0.75)
    assert server.method(32) == VisPruner(32, 0.75)
    assert server.method(0.5) == VisPruner(0.5, 0.75)
    # 1 keeps one token and 1.0 keeps all.
    assert server.name(1) != server.name(1.0)
    assert server.method("all") is None
    assert of("none").method(None) is None
    assert of("none").method("all") is None


@pytest.mark.parametrize("keep", [0, -3, 1.5, 0.0, True, "many", [4], {"a": 1}])
def test_bad_budgets_are_refused(keep: Any) -> None:
    with pytest.raises(VlmpruneError, match="vlmprune_keep"):
        of("vispruner:keep=64").method(keep)


def test_a_budget_without_a_method_or_for_a_chain_is_refused() -> None:
    with pytest.raises(VlmpruneError, match="no method to give it to"):
        of("none").method(4)
    chain = of("vispruner:keep=9|divprune:keep=4,budget=crop")
    with pytest.raises(VlmpruneError, match="does not say which method"):
        chain.method(3)
    assert chain.method("all") is None


def test_names_tell_methods_apart() -> None:
    server = of("vispruner:keep=64")
    names = [server.name(keep) for keep in (None, 32, 1, 1.0, 0.5, "all")]
    assert len(set(names)) == len(names)
    assert server.name(64) == server.name(None)
    # So that no cache takes what one made for the other's, with a request's own budget, too.
    without = of("vispruner:keep=64,newlines=drop")
    assert without.method(32) == VisPruner(32, newlines="drop")
    assert not {server.name(keep) for keep in (None, 32)} & {
        without.name(keep) for keep in (None, 32)
    }
    assert of("divprune:keep=64").name(None) != server.name(None)


# Crop 0 whole, four patches; of crop 1 the patch 3 is cut away, and two newlines come in.
CUT = Layout(torch.tensor([0, 1, 2, 3, 4, 5, NO_PATCH, 6, NO_PATCH]), 2, (2, 2))


@pytest.mark.parametrize(
    ("text", "layout", "left"),
    [
        ("vispruner:keep=64", plain(1, (24, 24)), 64),
        ("vispruner:keep=0.25", plain(1, (24, 24)), 144),
        ("vispruner:keep=600", plain(1, (24, 24)), 576),
        ("fopru:keep=0.3", plain(1, (3, 3)), 2),
        ("divprune:keep=0.3", plain(1, (3, 3)), 3),
        ("average_pooling:keep=128", plain(1, (24, 24)), 121),
        ("average_pooling:keep=64", plain(1, (24, 24)), 64),
        ("vispruner:keep=2", CUT, 2 + 2 + 2),
        ("vispruner:keep=4", CUT, 4 + 3 + 2),
        ("vispruner:keep=5,budget=image", CUT, 5 + 2),
        ("vispruner:keep=3|divprune:keep=2,budget=crop", CUT, 2 + 2 + 2),
        ("divprune:keep=4", CUT, 4 + 2),
        ("vispruner:keep=2,newlines=drop", CUT, 2 + 2),
        ("vispruner:keep=4,newlines=drop", CUT, 4 + 3),
        ("vispruner:keep=5,budget=image,newlines=drop", CUT, 5),
        ("average_pooling:keep=4,newlines=drop", CUT, 4 + 3),
        ("vispruner:keep=3,newlines=drop|divprune:keep=2,budget=crop", CUT, 2 + 2),
        ("vispruner:keep=3|divprune:keep=2,budget=crop,newlines=drop", CUT, 2 + 2),
        ("none", CUT, 9),
        ("evs:keep=0.5", plain(4, (2, 2)), 16),
    ],
)
def test_counts(text: str, layout: Layout, left: int) -> None:
    assert policy.count(of(text).method(None), layout) == left


def test_counts_of_videos() -> None:
    video = Layout(torch.arange(16), 4, (2, 2), kind="video")
    assert policy.count(EVS(0.5), video) == 8
    # Never less than the first frame.
    assert policy.count(EVS(1), video) == 4
    assert policy.count(VisPruner(3, budget="frame"), video) == 12
    assert policy.count(VisPruner(3, budget="clip"), video) == 3
    # The newline behind a video of LLaVA-OneVision, and the CLS tokens of Video-LLaVA's frames.
    behind = Layout(torch.tensor([*range(16), NO_PATCH]), 4, (2, 2), kind="video")
    first = [label for n in range(4) for label in (NO_PATCH, *range(4 * n, 4 * n + 4))]
    frames = Layout(torch.tensor(first), 4, (2, 2), kind="video", cls=True)
    for newlines, ends in (("keep", 1), ("drop", 0)):
        for method, left in (
            (VisPruner(3, newlines=newlines), 12),
            (EVS(0.5, newlines=newlines), 8),
        ):
            assert policy.count(method, behind) == left + ends
            assert policy.count(method, frames) == left + 4
    with pytest.raises(VlmpruneError, match="for videos"):
        policy.count(VisPruner(3, budget="frame"), plain(1, (4, 4)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Crops with a border cut away, as hosts do, and newlines."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    crops = draw(st.integers(1, 3))
    labels: list[int] = list(range(rows * columns))
    for crop in range(1, crops):
        top = draw(st.integers(0, rows - 1))
        for row in range(top, rows):
            labels += [crop * rows * columns + row * columns + one for one in range(columns)]
            labels.append(NO_PATCH)
    return Layout(torch.tensor(labels), crops, (rows, columns))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    layouts(),
    st.sampled_from(sorted(SERVING - {"evs"})),
    st.one_of(st.integers(1, 30), st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.9, 1.0])),
    st.sampled_from(["crop", "image"]),
    st.sampled_from(["keep", "drop"]),
    st.integers(0, 9),
)
def test_what_is_counted_is_what_is_chosen(
    layout: Layout, name: str, keep: int | float, budget: str, newlines: Any, seed: int
) -> None:
    """A wrong count fails a request in vLLM; the method itself says what is right."""
    method: Any = METHODS[name](keep=keep, budget=budget, newlines=newlines)
    make = torch.Generator().manual_seed(seed)
    candidates = layout.candidates()
    shape = candidates.shape

    def scores() -> torch.Tensor:
        return torch.rand(*shape, generator=make)

    view = EncoderView(
        scores(),
        torch.randn(*shape, 6, generator=make),
        candidates,
        (0,) * layout.crops,
        (layout.grid,) * layout.crops,
        (False,),
        layers={number: scores() for number in range(8)},
        received=scores(),
        given=scores(),
        keys=torch.randn(*shape, 6, generator=make),
        projected=torch.randn(*shape, 6, generator=make),
    )
    kept = layout.to_tokens(method.select(view).kept, newlines)
    assert policy.count(method, layout) == int(kept.sum())


@pytest.mark.parametrize("keep", [None, 1, 600, 0.1, 1.0, 1 / 3, "all"])
def test_budgets_reach_the_model_exactly(keep: Any) -> None:
    again = fields.unpack(fields.pack(keep, 576, 64))
    assert again == (keep, 576, 64)
    assert type(again[0]) is type(keep)


def config(**text: Any) -> Any:
    inner = SimpleNamespace(max_position_embeddings=100, rope_parameters={}, **text)
    return SimpleNamespace(text_config=inner, get_text_config=lambda: inner)


def test_positions() -> None:
    plain_config = config()
    assert policy.positions(of("divprune:keep=4"), plain_config) == "compact"
    plain_config.vlmprune = {"positions": "original"}
    assert policy.positions(of("divprune:keep=4"), plain_config) == "original"
    assert policy.positions(of("none"), plain_config) == "original"
    assert policy.positions(of("divprune:keep=4,positions=compact"), plain_config) == "compact"
    three = config()
    three.text_config.rope_parameters = {"mrope_section": [2, 1, 1]}
    assert policy.positions(of("divprune:keep=4"), three) == "original"
    with pytest.raises(VlmpruneError, match="three positions"):
        policy.positions(of("divprune:keep=4,positions=compact"), three)


def test_prompts_that_outgrow_the_models_positions_are_refused() -> None:
    policy.check_length(config(), 40, 60, 50)
    with pytest.raises(VlmpruneError, match="101 tokens before pruning"):
        policy.check_length(config(), 40, 61, 50)
    # Angles of other kinds of RoPE are not made anew, so the answer must find room as well.
    scaled = config()
    scaled.text_config.rope_parameters = {"rope_type": "yarn"}
    policy.check_length(scaled, 40, 50, 50)
    with pytest.raises(VlmpruneError, match="100 positions"):
        policy.check_length(scaled, 40, 51, 50)


def test_methods_of_a_server_are_its_own() -> None:
    assert policy.Policy(AveragePooling(9)).method(4) == AveragePooling(4)
    assert policy.Policy(DivPrune(9)).method(None) == DivPrune(9)
