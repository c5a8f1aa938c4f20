"""All families but LLaVA-1.5 in vLLM, held to Transformers, case by case."""

from __future__ import annotations

import pytest
import torch
from families import BLOCK, TOKENS_A_STEP, Both

# Between them: attention and features, features alone, merged tokens, also beside deepstack
# features, and positions in three dimensions and in one, original and compact.
METHODS = {
    "llava_next": "visionzip:keep=9,positions=original",
    "llava_onevision": "vispruner:keep=9",
    "qwen2_vl": "divprune:keep=5,budget=crop",
    "qwen2_5_vl": "vispruner:keep=5",
    "qwen3_vl": "visionzip:keep=5",
    "internvl": "vispruner:keep=5,positions=original",
}


@pytest.fixture(scope="module", params=sorted(METHODS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(request.param, METHODS[request.param], tmp_path_factory.mktemp(request.param))


def test_prompts_are_as_long_as_transformers_makes_them(both: Both) -> None:
    for name in both.cases:
        assert both.served(name).length == both.expected(name).length, name


def test_visual_tokens_are_really_gone(both: Both) -> None:
    served = {name: both.served(name).visual for name in both.cases}
    if both.axes == 3:
        # 24 and 40 tokens; two frames of 30.
        assert served == {
            "two images": 10,
            "a video": 10,
            "text": 0,
            "another budget": 6,
            "a share, cut": 19 + 32,
            "unpruned": 64,
            "image first": 10,
            "image last": 5,
        }
    elif both.family == "internvl":
        # One tile of 16 tokens and three; four frames of one.
        assert served == {
            "two images": 20,
            "a video": 20,
            "text": 0,
            "another budget": 12,
            "a share, cut": 4 * 13,
            "unpruned": 64,
            "image first": 20,
            "image last": 5,
        }
    else:
        # Newlines stay, whatever the budget.
        assert served["text"] == 0
        assert served["another budget"] < served["two images"] == served["image first"]
        assert served["image last"] < served["two images"] < served["a share, cut"]
        assert served["a share, cut"] < served["unpruned"]


def test_the_same_tokens_are_kept(both: Both) -> None:
    found = [one["kept"] for one in both.records]
    compared = 0
    for name in both.cases:
        kept = both.expected(name).kept
        if both.family == "internvl" and both.cases[name].video is not None:
            # There a frame is an image.
            kept = [[16 * frame + i for frame, own in enumerate(kept) for i in own]]
        for one in kept:
            assert one in found, name
            compared += 1
    assert compared == 9 + ("a video" in both.cases)


def test_positions_are_those_of_transformers(both: Both) -> None:
    for name in both.cases:
        served, expected = both.served(name).positions, both.expected(name).positions
        assert torch.equal(served, expected), f"{name}: {served} {expected}"


def test_answers_are_those_of_transformers(both: Both) -> None:
    for name in both.cases:
        assert both.served(name).new == both.expected(name).new, name


def test_answers_do_not_depend_on_what_else_is_asked(both: Both) -> None:
    for name in both.cases:
        assert both.batch[name] == both.served(name).new, name


def test_cached_prefixes_change_nothing(both: Both) -> None:
    hits = 0
    for name in both.cases:
        first, again = both.alone[name], both.again[name]
        assert first["cached"] == 0
        assert again["new"] == first["new"], name
        rest = first["positions"][:, again["cached"] :]
        assert torch.equal(again["positions"], rest), name
        hits += again["cached"] > 0
    # All prompts that fill a block, some with its end in an image.
    assert hits == sum(len(one["ids"]) > BLOCK for one in both.alone.values()) >= 4


def test_an_image_was_cut(both: Both) -> None:
    # Else the case of this name shows nothing: its second image would come in one step.
    cut = both.served("a share, cut")
    ids = both.alone["a share, cut"]["ids"]
    assert cut.length > TOKENS_A_STEP
    assert ids[TOKENS_A_STEP - 1] == ids[TOKENS_A_STEP] == both.model.config.image_token_id
    # What is over goes into one more step; three of the new tokens take one each.
    assert cut.steps == -(-cut.length // TOKENS_A_STEP) + 3
