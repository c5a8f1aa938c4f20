"""`benchmarks/peers.py`: others' ways do what they are said to do, or are skipped by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import peer_ways
import peers
import program
from tiny import model, request
from vlmprune import VisPruner, select

app = program.command(peers.main)
SMALLEST = ["--layers", "1", "--tower-layers", "2", "--text", "8", "--new-tokens", "1"]


def job(images: int = 1) -> peer_ways.Job:
    built = model("llava")
    # Half of 12 are important, of the 10 others 4 go in one round: no list is odd or too short.
    return peer_ways.Job(built, request(built, [images]).inputs, 12, 0.5, 2, 2)


def by_hand(attention: list[float], features: Tensor, keep: int) -> list[int]:
    """VisPruner's choice of one crop in plain Python, for a single round."""
    order = sorted(range(len(attention)), key=lambda at: -attention[at])
    important, rest = order[: keep // 2], order[keep // 2 :]
    unit = [[x / sum(y * y for y in row) ** 0.5 for x in row] for row in features.tolist()]
    even, odd = rest[0::2], rest[1::2]

    def closest(at: int) -> float:
        return max(sum(a * b for a, b in zip(unit[at], unit[to], strict=True)) for to in odd)

    gone = sorted(even, key=closest, reverse=True)[: len(rest) - (keep - keep // 2)]
    return sorted({*important, *rest} - {*gone})


def test_the_authors_procedure_chooses_what_ours_chooses() -> None:
    one = job(images=2)
    with torch.no_grad(), peer_ways.eager_tower(one.model):
        attention, features = peer_ways.encoded(one.model, one.inputs["pixel_values"])
        kept, embeds = peer_ways.authors_prompt(one.model, one.inputs, one.keep)
    expected = [by_hand(a.tolist(), f, 12) for a, f in zip(attention, features, strict=True)]
    assert kept.tolist() == expected
    assert embeds.shape[1] == one.inputs["input_ids"].shape[1] - 2 * (16 - 12)
    assert torch.equal(kept, select.vispruner(attention, features, 12, 0.5))
    # Control: another rule, attention alone, keeps others.
    assert kept.tolist() != select.vispruner(attention, features, 12, 1.0).tolist()


def test_the_same_tokens_give_the_same_logits() -> None:
    one = job(images=2)

    def logits(choose: Any = peer_ways.authors_choice) -> Tensor:
        with torch.no_grad(), peer_ways.eager_tower(one.model):
            _, embeds = peer_ways.authors_prompt(one.model, one.inputs, one.keep, choose)
        with torch.no_grad():
            return one.model(inputs_embeds=embeds).logits[:, -1]

    with torch.no_grad(), VisPruner(12, positions="compact")(one.model):
        ours = one.model(**one.inputs).logits[:, -1]
    assert (logits() - ours).abs().max() < 1e-5
    other = logits(lambda attention, features, keep, share: torch.arange(keep).repeat(2, 1))
    assert (other - ours).abs().max() > 1e-3


def test_what_is_told_of_the_authors_procedure() -> None:
    one = job()
    with torch.inference_mode():
        found = peers.run(one, ["authors"])["authors"]
    assert found["same_choice_on_clear_inputs"] and found["same_answer_given_the_same_tokens"]
    assert found["kept"] == found["kept_by_both"] == found["kept_by_theirs_in_float64_too"] == 12
    for figure in ("first_token", "whole_call"):
        assert {*found[figure]} == {"theirs / ours", "all / ours", "all / theirs"}
        times = found["seconds"][figure]
        assert {name: len(each) for name, each in times.items()} == dict.fromkeys(times, 2)
    for first, whole in zip(*(found["seconds"][f]["ours"] for f in found["seconds"]), strict=True):
        assert 0 < first < whole
    # The tower is as it was.
    assert one.model.model.vision_tower.config._attn_implementation == "sdpa"


def test_a_different_answer_would_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job()
    monkeypatch.setattr(peer_ways, "authors_choice", lambda a, f, keep, share: first(a, keep))

    def first(attention: Tensor, keep: int) -> Tensor:
        return torch.arange(keep).repeat(len(attention), 1)

    with torch.inference_mode():
        found = peers.run(one, ["authors"])["authors"]
    assert not found["same_choice_on_clear_inputs"]
    assert found["kept_by_both"] < 12


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *at: None if name in packages else find(name, *at)
    )
    monkeypatch.setattr(peer_ways, "_patch", [])


def test_the_command_and_peers_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "kvpress")
    file = tmp_path / "out.json"
    done = CliRunner().invoke(app, [*SMALLEST, "--repeat", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "kvpress: skipped. kvpress is not installed" in done.output
    told = json.loads(file.read_text())
    assert {name: "skipped" in one for name, one in told["peers"].items()} == {
        "authors": False,
        "kvpress": True,
    }
    assert told["setting"]["visual_tokens"] == 576 and told["setting"]["layers"] == [1, 2]
    assert "kvpress" not in told["setting"]["versions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "nobody"], "--peer nobody is unknown"),
        (["--shape", "small-next"], "is no LLaVA-1.5"),
        (["--keep", "66"], "even number of 576"),
        (["--keep", "12"], "half of it must be 8"),
        (["--repeat", "0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


# Not imported here: its import changes attention functions, which the benchmark keeps apart.
@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="needs kvpress")
def test_kvpress_masks_and_holds_everything() -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    one = job()
    with torch.inference_mode():
        found = peers.run(one, ["kvpress"])["kvpress"]
    held, attended = found["bytes_held_after_prefill"], found["pairs_attended"]
    assert held["theirs"] == held["all"] == 1
    assert held["ours"] < 0.8
    assert attended["theirs"] == pytest.approx(attended["ours"], abs=0.04)
    # Nothing of it is left.
    assert all(ALL_ATTENTION_FUNCTIONS[name] is each for name, each in before.items())
    for layer in one.model.get_decoder().layers:
        assert not hasattr(layer.self_attn, "masked_key_indices")
        assert not hasattr(layer.self_attn, "rotary_emb")
