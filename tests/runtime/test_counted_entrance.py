"""Controls on models of which nothing is known but their placeholders: what enters their language
model is what the whole request hands it, but for the tokens that were left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from answers import DIFFERENT, TOLERANCE, distance, generate
from counted_cases import CASES, built, request
from rows_alone import apart, exchanged, kept_columns, padding_apart, shortened
from shortened import tolerance
from vlmprune import PLPHP, RandomTokens, UniformGrid, VlmpruneError
from vlmprune.hosts.contract import ContractError
from zoo.base import IMAGE, TEXT

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("without_records")]

TYPES = "mm_token_type_ids"
every = pytest.mark.parametrize("name", CASES)
batches = pytest.mark.parametrize("rows", [[1], [2, 1]])


def positions_of(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """[3, B, L] of the whole request, where the host has three."""
    rule = getattr(model.base_model, "get_rope_index", None)
    if rule is None:
        return None
    names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
    return rule(**{name: inputs[name] for name in names})[0]


@every
@batches
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_random_tokens_equal_a_prompt_without_the_others(
    name: str, rows: list[int], attention: str
) -> None:
    model = built(name, attention)
    inputs = request(name, model, rows)
    with RandomTokens(keep=0.4)(model) as handle:
        found = generate(model, inputs)
    assert handle.attachment.family.counted
    ids, placed = inputs["input_ids"], positions_of(model, inputs)
    assert handle.report.positions == ("compact" if placed is None else "original")
    kept = kept_columns(handle.report, ids)
    assert torch.equal(found.sequences[:, : ids.shape[1]], ids)
    expected = shortened(model, inputs, kept, found.sequences, placed)
    near = TOLERANCE
    if name == "qwen3_5":
        # Padding moves what a recurrence sums up.
        near += 3 * padding_apart(model, inputs, generate(model, inputs), placed)
    assert apart(found.logits, expected) < near < 1e-4
    others = shortened(model, inputs, exchanged(kept, ids), found.sequences, placed)
    assert apart(found.logits, others) > DIFFERENT


@every
def test_a_plain_forward_is_the_prompt_of_generate(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [2, 1])
    with RandomTokens(keep=0.4)(model), torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        found = generate(model, inputs, max_new_tokens=1).logits[0]
    assert float((plain - found).abs().max()) < tolerance(model)


@every
def test_keeping_all_changes_no_bit(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [2, 1])
    bare = generate(model, inputs)
    with RandomTokens(keep=1.0)(model):
        found = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, bare.logits, strict=True))
    after = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, bare.logits, strict=True))


@every
def test_beams_and_answers_without_a_cache_are_the_same(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [2, 1])
    with RandomTokens(keep=0.4)(model):
        found = generate(model, inputs)
        anew = generate(model, inputs, use_cache=False)
        beams = generate(model, inputs, num_beams=2, max_new_tokens=1)
    assert distance(found, anew) < tolerance(model)
    first = beams.logits[0].unflatten(0, (2, 2))[:, 0]
    assert float((first - found.logits[0]).abs().max()) < tolerance(model)


@every
def test_a_later_turn_goes_on(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [1])
    more = torch.full((1, 3), 70)
    with RandomTokens(keep=0.4)(model) as handle:
        first = generate(model, inputs, max_new_tokens=3)
        ids = torch.cat((first.sequences, more), dim=1)
        kept = kept_columns(handle.report, inputs["input_ids"])
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = {k: v for k, v in first.items() if "cache" in k or "past" in k}
        found = generate(model, {**turn, **cache}, max_new_tokens=3)
    placed = positions_of(model, inputs)
    expected = shortened(model, inputs, kept, found.sequences, placed)
    assert apart(found.logits, expected[-3:]) < tolerance(model)


@pytest.mark.parametrize("name", ["got_ocr2"])
def test_labels_are_shortened_as_the_prompt(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [1])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with RandomTokens(keep=0.4)(model):
        result = model(**inputs, labels=labels)
    result.loss.backward()
    assert result.logits.shape[1] < labels.shape[1] and float(result.loss.detach()) > 0


def chameleon() -> Any:
    vocabulary = {"<image>": IMAGE} | {f"IMGIMG{c}Z": 100 + i for i, c in enumerate("ABCD")}
    config = ChameleonConfig(
        **TEXT,
        vocabulary_map=vocabulary,
        vq_config={"num_embeddings": 4, "embed_dim": 8, "resolution": 32, "base_channels": 32},
    )
    return ChameleonForConditionalGeneration(config)


def test_what_cannot_be_is_told_at_attach() -> None:
    model = built("qwen3_5")
    with pytest.raises(VlmpruneError, match="three positions, which renumbering would destroy"):
        RandomTokens(keep=4, positions="compact").attach(model)
    with pytest.raises(VlmpruneError, match="its visual tokens have three positions each"):
        UniformGrid(keep=4).attach(model)
    with pytest.raises(VlmpruneError, match="its visual tokens have three positions each"):
        (RandomTokens(keep=4) | PLPHP()).attach(model)
    with pytest.raises(VlmpruneError, match="is in no record, and whether it goes on behind gaps"):
        RandomTokens(keep=4, positions="original").attach(built("got_ocr2"))
    with pytest.raises(VlmpruneError, match="embeds images and runs its decoder layers in one"):
        RandomTokens(keep=4).attach(chameleon())


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "position_ids": (
        lambda ids: torch.arange(ids.shape[1])[None],
        "^position_ids of Glm4v.*, which is in no record, cannot be shortened; leave them out",
    ),
    "inputs_embeds": (
        lambda ids: torch.zeros(*ids.shape, 32),
        "^inputs_embeds came beside input_ids, and nothing says that they are the same; leave",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_asked_is_refused(what: str) -> None:
    model = built("glm4v")
    inputs = request("glm4v", model, [1])
    made, said = REFUSED[what]
    more = {what: made(inputs["input_ids"])}
    with RandomTokens(keep=4)(model), pytest.raises(VlmpruneError, match=said):
        model(**inputs, **more)


@every
def test_images_of_a_later_turn_are_refused(name: str) -> None:
    model = built(name)
    inputs = request(name, model, [1])
    said = (
        f"^{type(model).__name__} is in no record, so images in a later turn cannot be told from "
        "those that the cache holds; pass the whole conversation without a cache"
    )
    with RandomTokens(keep=4)(model):
        first = generate(model, inputs, max_new_tokens=3)
        ids = torch.cat((first.sequences, inputs["input_ids"]), dim=1)
        turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn |= {k: v for k, v in first.items() if "cache" in k or "past" in k}
        if TYPES in inputs:
            before = torch.zeros_like(first.sequences)
            turn[TYPES] = torch.cat((before, inputs[TYPES]), dim=1)
        with pytest.raises(VlmpruneError, match=said):
            generate(model, turn)


def changed(model: Any, patch: pytest.MonkeyPatch, change: Callable[[Any, int], Any]) -> None:
    """Let `change` have the arguments of each call of the language model, and its number.

    It may return what the call is to go through instead.
    """
    cls, calls = type(model.get_decoder()), list[int]()
    own = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        through = change(kwargs, calls[-1]) or own
        return through(self, *args, **kwargs)

    patch.setattr(cls, "__call__", call)


@pytest.mark.parametrize("later", [0, 1])
@every
def test_a_decoder_that_is_not_given_the_embedded_prompt_is_refused(
    name: str, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its name; for the whole request, or for the one whose tokens were left out alone."""
    model = built(name)
    cls = type(model.get_decoder())
    names = list(inspect.signature(cls.forward).parameters)[1:]
    own = cls.__call__

    def by_place(self: Any, **kwargs: Any) -> Any:
        first = names[: names.index("inputs_embeds") + 1]
        return own(self, *[kwargs.pop(one, None) for one in first], **kwargs)

    changed(model, monkeypatch, lambda _, number: by_place if number >= later else None)
    said = "its language model is not given an embedded prompt; the model is as it was before"
    with RandomTokens(keep=4)(model), pytest.raises(ContractError, match=said):
        generate(model, request(name, model, [1]))


@pytest.mark.parametrize("name", ["glm4v", "qwen3_5"])
def test_a_decoder_that_is_not_given_three_positions_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(name)

    def one_of_three(kwargs: Any, _: int) -> None:
        kwargs["position_ids"] = kwargs["position_ids"][0]

    changed(model, monkeypatch, one_of_three)
    said = "its language model is not given three positions of each column; the model is as it was"
    with RandomTokens(keep=4)(model), pytest.raises(ContractError, match=said):
        generate(model, request(name, model, [1]))


def test_a_decoder_that_is_called_past_its_hooks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the call whose tokens were left out."""
    model = built("got_ocr2")
    forward = type(model.get_decoder()).forward
    changed(model, monkeypatch, lambda _, number: forward if number else None)
    said = "its language model is not called where its layers are; the model is as it was before"
    with RandomTokens(keep=4)(model), pytest.raises(ContractError, match=said):
        generate(model, request("got_ocr2", model, [1]))


def test_a_decoder_that_is_given_more_of_images_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would miss it where the tokens that enter it are made beforehand."""
    model = built("got_ocr2")
    outer, with_pixels = type(model.base_model), list[bool]()
    own = outer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with_pixels.append(kwargs.get("pixel_values") is not None)
        return own(self, *args, **kwargs)

    def more(kwargs: Any, _: int) -> None:
        if with_pixels[-1]:
            kwargs["picture_mask"] = torch.ones(1, 4)

    monkeypatch.setattr(outer, "forward", forward)
    changed(model, monkeypatch, more)
    said = "its language model is given picture_mask of images as well; the model is as it was"
    with RandomTokens(keep=4)(model), pytest.raises(ContractError, match=said):
        generate(model, request("got_ocr2", model, [1]))


def test_nothing_is_stored_of_it() -> None:
    model = built("glm4v")
    with (
        RandomTokens(keep=4)(model) as handle,
        pytest.raises(VlmpruneError, match="is in no record, so what its encoder makes cannot"),
    ):
        handle.encode(**request("glm4v", model, [1]))


def test_a_decoder_that_turns_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("glm4v")
    inputs = request("glm4v", model, [1])
    rotary = next(m for n, m in model.get_decoder().named_children() if "rotary" in n)

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        moved = {k: v + 1 if k == "position_ids" else v for k, v in kwargs.items()}
        return tuple(a + 1 if i == 1 else a for i, a in enumerate(args)), moved

    handle = rotary.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    with (
        RandomTokens(keep=4)(model),
        pytest.raises(ContractError, match="turns by other positions than it is given"),
    ):
        generate(model, inputs)
    handle.remove()
