"""A pruner that keeps everything: each call returns what the bare model returns, or fails as it.

One table of calls for all families. What is refused by name, though the bare model answers, stands
in `REFUSED`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from shortened import is_recurrent, shortened
from stock import CACHE, cache_of
from vlmprune import VisPruner, VlmpruneError
from zoo import Request
from zoo.mended import forwards
from zoo_oracle import KNOWN, dropped_columns

pytestmark = pytest.mark.oracle

Inputs = dict[str, Any]
TYPES = ("mm_token_type_ids", "token_type_ids")
SHORT = {"max_new_tokens": 2, "do_sample": False}
FULL = {**SHORT, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def labels(inputs: Inputs) -> Tensor:
    """The second half of the columns is the answer."""
    ids: Tensor = inputs["input_ids"]
    answer = torch.arange(ids.shape[1]) >= ids.shape[1] // 2
    return ids.masked_fill(~answer, -100)


def shifted(inputs: Inputs) -> Tensor:
    return torch.nn.functional.pad(labels(inputs)[:, 1:], (0, 1), value=-100)


def columns(inputs: Inputs, *lead: int) -> Tensor:
    """Positions that number the columns, for each row and, in front, whatever else."""
    batch, length = inputs["input_ids"].shape
    return torch.arange(length).expand(*lead, batch, -1)


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


def embedded(built: Any, inputs: Inputs) -> Inputs:
    return {**inputs, "inputs_embeds": built.get_input_embeddings()(inputs["input_ids"])}


def listed(inputs: Inputs) -> Inputs:
    """With the sizes of images as a list of pairs."""
    sizes = inputs.get("image_sizes")
    return inputs if sizes is None else {**inputs, "image_sizes": list(map(tuple, sizes.tolist()))}


def by_place(function: Callable[..., Any], inputs: Inputs, count: int) -> Any:
    """A call with the first arguments by place."""
    names = list(inspect.signature(function).parameters)[:count]
    return function(*(inputs.get(name) for name in names), **without(inputs, *names))


def former(inputs: Inputs) -> Inputs:
    """With Video-LLaVA's pixels under the name that its processor gives them."""
    return {**without(inputs, "pixel_values"), "pixel_values_images": inputs["pixel_values"]}


def turn(built: Any, inputs: Inputs) -> Any:
    """A later turn of a batch, of text alone, and one more forward."""
    first = built.generate(**inputs, **FULL)
    ids = torch.cat((first.sequences, first.sequences[:, -3:]), dim=1)
    new = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat((inputs["attention_mask"], new), dim=1)
    given = {"input_ids": ids, "attention_mask": mask, CACHE: cache_of(first)}
    return built.generate(**given, **FULL)


def image_turn(built: Any, inputs: Inputs) -> Any:
    """The same images again, in a batch whose second turn is padded."""
    first = built.generate(**inputs, **FULL)
    kept = cache_of(first).get_seq_length()
    more = {name: value for name, value in inputs.items() if "pixel" in name or "sizes" in name}
    for name in ("input_ids", "attention_mask", *TYPES):
        if name in inputs:
            padding = kept + 1 - inputs[name].shape[1]
            answer = torch.full((len(inputs[name]), padding), int(name == "attention_mask"))
            before = torch.cat((inputs[name], answer.to(inputs[name])), dim=1)
            more[name] = torch.cat((before, inputs[name]), dim=1)
    more["input_ids"][:, : kept + 1] = first.sequences[:, : kept + 1]
    return built.generate(**more, **{CACHE: cache_of(first)}, **FULL)


CALLS: Mapping[str, Callable[[Any, Inputs], Any]] = {
    "every field": lambda m, i: m(
        **i,
        labels=labels(i),
        num_items_in_batch=7,
        output_hidden_states=True,
        output_attentions=True,
    ),
    "a tuple": lambda m, i: m(**i, return_dict=False, output_hidden_states=True, use_cache=False),
    "shift_labels": lambda m, i: m(**i, labels=labels(i), shift_labels=shifted(i)),
    "logits_to_keep": lambda m, i: m(**without(i, "attention_mask"), logits_to_keep=3),
    "positions": lambda m, i: m(**i, position_ids=columns(i)),
    "three positions": lambda m, i: m(**i, position_ids=columns(i, 3)),
    "a cache": lambda m, i: m(**i, **{CACHE: DynamicCache(config=m.config)}),
    "no types": lambda m, i: m(**without(i, *TYPES)),
    "listed sizes": lambda m, i: m(**listed(i)),
    "by place": lambda m, i: by_place(m.forward, i, 5),
    "short labels": lambda m, i: m(**i, labels=labels(i)[:, 3:]),
    "embeds beside ids": lambda m, i: m(**embedded(m, i)),
    "generate": lambda m, i: m.generate(**i, **FULL, output_hidden_states=True),
    "generate by place": lambda m, i: m.generate(
        i["input_ids"], **without(i, "input_ids"), **SHORT
    ),
    "inputs": lambda m, i: m.generate(inputs=i["input_ids"], **without(i, "input_ids"), **SHORT),
    "inputs twice": lambda m, i: m.generate(inputs=i["input_ids"], **i, **SHORT),
    "generate without mask or cache": lambda m, i: m.generate(
        **without(i, "attention_mask"), **FULL, use_cache=False
    ),
    "generate without types": lambda m, i: m.generate(**without(i, *TYPES), **FULL),
    "beams": lambda m, i: m.generate(**i, **FULL, num_beams=3, num_return_sequences=2),
    "samples": lambda m, i: m.generate(**i, **(FULL | {"do_sample": True}), num_return_sequences=2),
    "static": lambda m, i: m.generate(**i, **SHORT, cache_implementation="static"),
    "generate from embeds beside ids": lambda m, i: m.generate(**embedded(m, i), **SHORT),
    "a later turn": turn,
    "images again": image_turn,
}
REPEATS = ("beams", "samples")
# The bare model may answer.
REFUSED = ("embeds beside ids", "generate from embeds beside ids")
# Without the images of earlier turns the bare model of these finds no positions.
MORE_THAN_BARE = [
    *((name, "images again") for name in KNOWN if name.startswith("qwen")),
    # It repeats rows without their images.
    *(("llama4", what) for what in REPEATS),
]


def tree(value: Any) -> Any:
    """What can be compared, whatever class holds it."""
    if isinstance(value, Cache):
        layers = [
            [getattr(one, "keys", None), getattr(one, "values", None)] for one in value.layers
        ]
        return [type(value).__name__, value.get_seq_length(), layers]
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return [type(value), {name: tree(one) for name, one in value.items()}]
    if isinstance(value, list | tuple):
        return [type(value), *map(tree, value)]
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def outcome(built: Any, call: Callable[[Any, Inputs], Any], inputs: Inputs) -> Any:
    """What a call returns, or how it fails; with nothing left of earlier calls."""
    if hasattr(built.base_model, "rope_deltas"):
        built.base_model.rope_deltas = None
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return tree(call(built, {name: value.clone() for name, value in inputs.items()}))
    except Exception as error:
        return error


def padded(name: str, built: Any) -> Request:
    """Two rows of unequal length, with all that the family takes."""
    first: list[Any] = list(KNOWN[name].modalities)
    return KNOWN[name].request(built, [[*first, "image"], ["image"]])


# Of a former name some releases warn.
@pytest.mark.filterwarnings("ignore:.*pixel_values_images:FutureWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_every_call_is_the_bare_models(name: str) -> None:
    built = KNOWN[name].build("eager")
    inputs = padded(name, built).inputs
    calls = dict(CALLS)
    takes = inspect.signature(type(built).forward).parameters
    if {"pixel_values_images", "pixel_values"} <= takes.keys():
        calls["former name"] = lambda m, i: m.generate(**former(i), **FULL)
        calls["former name, forward"] = lambda m, i: m(**former(i))
    if Version(transformers.__version__) < Version("5.20") or KNOWN[name].one_placeholder:
        # Several of these mix up the images of repeated rows, as GLM-V's class does by itself.
        calls = {what: call for what, call in calls.items() if what not in REPEATS}
    expected = {what: outcome(built, call, inputs) for what, call in calls.items()}
    with VisPruner(keep=1.0)(built):
        found = {what: outcome(built, call, inputs) for what, call in calls.items()}
    # Several releases let go of what Gemma 4's forward needs, and where a pruner is it has it.
    wrong, loses = [], not forwards(inputs)
    for what, bare in expected.items():
        ours = found[what]
        if isinstance(bare, Exception):
            more = loses or (name, what) in MORE_THAN_BARE
            fine = more or isinstance(ours, (type(bare), VlmpruneError))
        elif what in REFUSED:
            fine = isinstance(ours, VlmpruneError)
        else:
            fine = same(bare, ours)
        if not fine:
            wrong.append(what)
    assert not wrong
    with VisPruner(keep=0.5)(built):
        assert not same(outcome(built, CALLS["generate"], inputs), expected["generate"])


# Families whose forward shows the visual tokens; those that the installed release runs are tested.
SHOWING = ("internvl", "aya_vision", "gemma3", "paligemma", "idefics3", "smolvlm", "video_llava")


def pooled(out: Any) -> Any:
    """The visual tokens of images among the fields of a forward."""
    own = getattr(out, "image_outputs", None)
    own = out.image_hidden_states if own is None else own
    # Some releases of SmolVLM give all that its encoder returned.
    return getattr(own, "pooler_output", own)


@pytest.mark.parametrize("keep", [4, 0.4])
@pytest.mark.parametrize("name", [one for one in SHOWING if one in KNOWN])
def test_the_tokens_that_are_left_are_found_where_all_were(name: str, keep: float) -> None:
    built = KNOWN[name].build()
    req = KNOWN[name].request(
        built, [["image", "image"], ["image"], ["image"] * (name == "paligemma")]
    )
    with torch.no_grad():
        full = pooled(built(**req.inputs))
        with VisPruner(keep=keep, budget="image")(built) as handle:
            out = built(**req.inputs)
            listed = pooled(out)
            in_tuple = built(**req.inputs, return_dict=False)[-1]
    assert handle.report is not None
    lengths = [len(layout.labels) for layout in handle.report.layouts]
    before = [sum(lengths[:i]) for i in range(len(lengths))]
    kept = torch.cat([k + n for k, n in zip(handle.report.kept, before, strict=True)]).tolist()
    if isinstance(full, Tensor) and full.ndim == 2:
        # In earlier releases all tokens in a row, of whatever image.
        assert torch.equal(listed, full[kept])
        return
    start = 0
    assert len(listed) == len(full)
    for one, left in zip(full, listed, strict=True):
        rows = one.flatten(0, -2)
        own = [i - start for i in kept if start <= i < start + len(rows)]
        assert torch.equal(left.flatten(0, -2), rows[own])
        assert len(own) < len(rows) or not len(rows)
        start += len(rows)
    tokens = in_tuple if not isinstance(in_tuple, tuple) else in_tuple[-1]
    tokens = getattr(tokens, "pooler_output", tokens)
    assert same(tree(tokens), tree(listed)) or any(same(tree(x), tree(listed)) for x in in_tuple)


@pytest.mark.parametrize("name", [one for one in KNOWN if one.startswith("qwen")])
def test_without_token_types_positions_are_those_of_text(name: str) -> None:
    """Pruned, too: equal to the bare model that overlooks what was dropped."""
    built = KNOWN[name].build()
    req = padded(name, built)
    inputs = without(req.inputs, "mm_token_type_ids")
    with VisPruner(keep=0.4)(built) as handle:
        pruned = built.generate(**inputs, **FULL)
        typed = built.generate(**req.inputs, **FULL)
        try:
            logits = built(**inputs).logits
        except VlmpruneError as error:
            assert "makes no positions without mm_token_type_ids" in str(error)
            logits = None
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report)
    mask = inputs["attention_mask"] * ~dropped
    text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    seen = {"attention_mask": mask, "position_ids": text.expand(4, -1, -1)}
    if is_recurrent(built):
        expected = shortened(built, req.inputs, dropped, text.expand(3, -1, -1))
    else:
        expected = built.generate(**(inputs | seen), **FULL)
    assert float((pruned.logits[0] - expected.logits[0]).abs().max()) < 1e-5
    assert float((typed.logits[0] - expected.logits[0]).abs().max()) > 1e-2
    try:
        with torch.no_grad():
            built(**inputs)
    except ValueError:
        assert logits is None
        return
    assert logits is not None
    if is_recurrent(built):
        return
    with torch.no_grad():
        counted = {"attention_mask": mask, "position_ids": columns(inputs, 4)}
        full = built(**(inputs | counted)).logits
        assert float((logits[:, -1] - full[:, -1]).abs().max()) < 1e-5
