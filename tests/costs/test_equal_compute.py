"""Pairs of equal FLOPs: against hand arithmetic, their edges, and the command."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from commandline import call, sentence
from vlmprune import costs, embedded
from vlmprune.cli.plan import pairs_table
from vlmprune.costs.architectures import DECODERS
from vlmprune.costs.equal_compute import budget_of, pairs
from vlmprune.errors import VlmpruneError


def flops(n, d, m, layers, heads, kv):
    """Written out apart from the library: four projections, attention, three matrices."""
    width = d // heads
    attention = 2 * n * d * heads * width + 2 * n * d * kv * width + 2 * n * n * d
    return layers * 2 * (attention + 3 * n * d * m)


SIZES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4),
    "vicuna-13b": (5120, 13824, 40, 40, 40),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8),
}


@pytest.mark.parametrize("text", [0, 50])
@pytest.mark.parametrize("budget", [0.7, 8.0, 40.0])
def test_each_model_gets_the_most_tokens_that_fit(budget, text):
    found = {pair.model: pair for pair in pairs(budget, text)}
    assert set(found) == set(DECODERS)
    for name, sizes in SIZES.items():
        tokens = found[name].visual_tokens
        if tokens is None:
            assert flops(text, *sizes) > budget * 1e12
        else:
            assert flops(tokens + text, *sizes) <= budget * 1e12 < flops(tokens + 1 + text, *sizes)
            assert found[name].tflops == pytest.approx(flops(tokens + text, *sizes) / 1e12)


def test_larger_models_get_fewer_tokens():
    found = pairs(8.0)
    assert [pair.parameters for pair in found] == sorted(pair.parameters for pair in found)
    tokens = [pair.visual_tokens for pair in found]
    assert tokens[0] > 2000 and tokens[-1] < 10
    # The 7B models of the two families differ in width alone, by a token.
    assert all(a >= b - 1 for a, b in pairwise(tokens))


def test_text_tokens_cost_a_large_model_its_visual_ones():
    cached = {pair.model: pair.visual_tokens for pair in pairs(0.662, 0)}
    asked = {pair.model: pair.visual_tokens for pair in pairs(0.662, 50)}
    assert cached["vicuna-7b"] == asked["vicuna-7b"] + 50
    assert cached["qwen2.5-72b"] is not None and asked["qwen2.5-72b"] is None


@given(
    tokens=st.integers(0, 3000),
    text=st.integers(0, 200),
    name=st.sampled_from([*DECODERS, "llava-next-7b"]),
)
@example(tokens=0, text=50, name="vicuna-7b")
@example(tokens=1, text=0, name="vicuna-7b")
def test_what_a_model_spends_buys_the_same_tokens(tokens, text, name):
    if tokens + text == 0:
        return
    (pair,) = pairs(budget_of(f"{name}@{tokens}", text), text, [name])
    assert pair.visual_tokens == tokens
    config = DECODERS.get(name) or SimpleNamespace(**vars(DECODERS["vicuna-7b"]))
    assert pair.kv_bytes == costs.kv_bytes(config, tokens + text)


def test_parameters_are_those_of_the_layers():
    made = {pair.model: pair.parameters for pair in pairs(8.0)}
    assert made["vicuna-7b"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert made["qwen2.5-0.5b"] == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)


NO_BUDGET = "is neither a positive number of TFLOPs nor MODEL@TOKENS; write for example 8"
NO_TOKENS = "has no number of visual tokens behind the @; write for example llava-1.5-7b@576"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, NO_BUDGET) for text in ("", "none", "-1", "0", "inf", "nan")),
        *((text, NO_TOKENS) for text in ("vicuna-7b@", "a@-1")),
    ],
)
def test_budgets_that_are_none(text, said):
    with pytest.raises(VlmpruneError, match=f"^--compute-budget {text} {said}"):
        budget_of(text, 50)


def test_models_that_nobody_knows():
    """Both kinds of names are told: those of whole models, and of language models alone."""
    for text in ("@5", "nobody@5"):
        said = (
            f"^model '{text[:-2]}' .*llava-1.5-7b.*; of language models alone .*vicuna-7b.* are kn"
        )
        with pytest.raises(VlmpruneError, match=said):
            budget_of(text, 50)


def test_bad_numbers_are_refused():
    with pytest.raises(VlmpruneError, match=r"^text_tokens=-1 is negative; use 0 or more"):
        pairs(8.0, -1)
    with pytest.raises(
        VlmpruneError, match=r"^a budget of 0 TFLOPs is not positive; use more than 0"
    ):
        pairs(0)
    with pytest.raises(VlmpruneError, match="'nobody'"):
        pairs(8.0, models=["nobody"])


def test_the_command():
    told = json.loads(call("plan", "--compute-budget", "llava-1.5-7b@576", "--json").stdout)
    assert told["text_tokens"] == 50
    assert {p["model"]: p["visual_tokens"] for p in told["pairs"]}["vicuna-7b"] == 576
    shown = call("plan", "--compute-budget", "0.662", "--text-tokens", "0").stdout
    assert "vicuna-7b" in shown and "51" in shown
    own = call("plan", str(embedded.path()), "--compute-budget", "0.001", "--json")
    smallest = json.loads(own.stdout)["pairs"][0]
    assert smallest["parameters"] == 5 * (2 * 192 * 192 + 2 * 192 * 96 + 3 * 192 * 512)
    assert smallest["visual_tokens"] > 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "plan needs an architecture"),
        (("--compute-budget", "much"), "neither a positive number"),
        (("--compute-budget", "8", "--keep", "4"), "leave --keep"),
        (("--compute-budget", "8", "--text-tokens", "-2"), "--text-tokens -2"),
        (("llava-1.5-7b", "--text-tokens", "2"), "goes with --compute-budget"),
    ],
)
def test_mistakes_at_the_command_line(arguments, says):
    assert says in sentence("plan", *arguments)


def test_caption_says_what_is_counted():
    text = pairs_table(pairs(8.0), 8.0, 50, 2).caption
    assert "50 text tokens" in str(text) and "8 TFLOPs" in str(text)
