"""The hosts of the table, untouched, and what comes of a pruned call to a changed one.

Scales are powers of two, other than head_dim^-0.5, so that a change may move them without rounding
in any type.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    GptOssConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from stock import CACHE
from vlmprune import PLPHP, FastV, Recall, VisPruner, VlmpruneError
from zoo import ZOO, Entry
from zoo.base import IMAGE, TEXT
from zoo.crops import CLIP

METHODS = ("VisPruner", "PLPHP", "FastV", "Recall", "chain")
ATTENTIONS = ("sdpa", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Nearness of logits, which lie within some units of 0.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
STEPS = 3
# Names of arguments and outputs, as a row may change them.
Names = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A fact about the host that no longer holds.

    Attributes:
        name: the fact, in words.
        change: makes it so, of a model built anew; what it patches is undone afterwards.
        host: which one.
        call: "generate", or "turns" for a plain forward that is continued.
        names: arguments (and the output's cache) under the names that callers now use.
        alone: whether the changed host answers by itself as the untouched one does; where it
            does not, for want of what the row hides, a pruner must refuse.
        pruners: methods with other settings than the table's, by name.
        attentions: with which it is run.
        types: in which it is run; a change that rounds otherwise may turn choices in half
            precision.
        batch: "padded", a row of two images and one of one, or "one" row alone, for facts that
            hold without padding.
    """

    name: str
    change: Callable[[Any, MonkeyPatch], None]
    host: str = "llava"
    call: str = "generate"
    names: Names = field(default_factory=dict)
    alone: bool = True
    pruners: Mapping[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ATTENTIONS
    types: tuple[str, ...] = ("float32", "bfloat16")
    batch: str = "padded"


def _llava_on(text: Any) -> Callable[[], Any]:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return lambda: LlavaForConditionalGeneration(copy.deepcopy(config))


def _windows_to_the_end() -> Any:
    """Qwen2.5-VL whose last block sees windows alone."""
    model = ZOO["qwen2_5_vl"].make()
    for place in (model.config.vision_config, model.model.visual):
        place.fullatt_block_indexes = [1]
    return model


_CAPPED = Gemma2Config(
    **TEXT,
    head_dim=8,
    query_pre_attn_scalar=8,
    layer_types=["full_attention"] * 3,
    attn_logit_softcapping=1.0,
)
_SINKS = GptOssConfig(
    **TEXT,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=1,
    layer_types=["full_attention"] * 3,
)
_WINDOWED = MistralConfig(**TEXT, sliding_window=16)
_MEDIA = ZOO["llava"].media
HOSTS: dict[str, Entry] = {
    **{name: ZOO[name] for name in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3")},
    "windows": replace(ZOO["qwen2_5_vl"], make=_windows_to_the_end),
    # A soft cap, sinks and a sliding window in the decoder, which only eager attention knows all.
    "capped": Entry("capped", _llava_on(_CAPPED), _MEDIA, decoder_attention="eager"),
    "sinks": Entry("sinks", _llava_on(_SINKS), _MEDIA, decoder_attention="eager"),
    "windowed": Entry("windowed", _llava_on(_WINDOWED), _MEDIA),
}


def attentions_of(model: Any) -> list[Any]:
    """All attention modules."""
    return [one for one in model.modules() if type(one).__name__.endswith("Attention")]


@dataclass(frozen=True)
class Host:
    """A host as it is, and a request.

    Attributes:
        model: untouched.
        inputs: of the request, by its batch ("padded" or "one").
        settings: PLPHP's thresholds, which tell the request's layers apart.
    """

    model: Any
    inputs: Mapping[str, dict[str, Tensor]]
    settings: Mapping[str, Any]


@cache
def host(name: str, attention: str, dtype: str) -> Host:
    """Built once; rows change copies."""
    model = HOSTS[name].build(attention, seed=3).to(DTYPES[dtype])
    # Far from head_dim^-0.5, in one layer above and in the next below.
    for number, module in enumerate(attentions_of(model)):
        for factor in ("scaling", "scale"):
            if isinstance(getattr(module, factor, None), float):
                setattr(module, factor, (1.0, 0.125)[number % 2])
    batches: dict[str, list[list[Any]]] = {
        "one": [["image"] * 2],
        "padded": [["image"] * 2, ["image"]],
    }
    inputs = {}
    for batch, rows in batches.items():
        made = HOSTS[name].request(model, rows).inputs
        inputs[batch] = {
            k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in made.items()
        }
    # So that the host's own hooks, which it puts on at its first call, are there.
    model.generate(**inputs["one"], max_new_tokens=1)
    settings: dict[str, Any] = {"r": 0.4, "dr": 0.3, "alpha": 0.5, "beta": 0.5}
    try:
        with PLPHP()(model) as handle:
            model.generate(**inputs["padded"], max_new_tokens=1)
    except VlmpruneError:
        return Host(model, inputs, settings)
    report: Any = handle.report
    gammas = sorted(g for layer in report.layers for g in layer.gamma if g is not None)
    settings |= {"alpha": gammas[-1] - 1e-3, "beta": gammas[len(gammas) // 2] - 1e-3}
    return Host(model, inputs, settings)


@cache
def plain(name: str, attention: str, dtype: str, call: str, batch: str) -> Tensor:
    """What the untouched host answers alone."""
    found = host(name, attention, dtype)
    return run(copy.deepcopy(found.model), found.inputs[batch], call, {})


def pruner(method: str, row: Row, found: Host) -> Any:
    """A method as the table runs it."""
    if method in row.pruners:
        return row.pruners[method]
    rope = found.model.config.model_type.startswith("qwen")
    vispruner = VisPruner(keep=0.4, positions="auto" if rope else "original")
    if method == "VisPruner":
        return vispruner
    if method == "FastV":
        return FastV(keep=0.4, layer=1)
    if method == "Recall":
        # Exact, so that a choice hangs on no rounding of a sketch.
        return Recall(read=0.3, floor=0, sketch="exact", always=True)
    plphp = PLPHP(**found.settings)
    return plphp if method == "PLPHP" else vispruner | plphp


@torch.no_grad()
def run(model: Any, inputs: dict[str, Tensor], call: str, names: Names) -> Tensor:
    """[steps, B, vocabulary] logits of a call and those after it.

    Args:
        model: the host.
        inputs: by the names of the untouched host.
        call: "generate" or "turns".
        names: how arguments are called.
    """
    given = {names.get(name, name): value for name, value in inputs.items()}
    if call == "generate":
        out = model.generate(
            **given,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits).float()
    kept = names.get("cache", CACHE)
    ids, logits = names.get("input_ids", "input_ids"), []
    out = model(**given, **{names.get("use_cache", "use_cache"): True})
    logits.append(out.logits[:, -1])
    mask = names.get("attention_mask", "attention_mask")
    for _ in range(STEPS - 1):
        token = logits[-1].argmax(dim=-1, keepdim=True)
        given[mask] = torch.cat((given[mask], torch.ones_like(given[mask][:, :1])), dim=1)
        out = model(**{ids: token, mask: given[mask], kept: getattr(out, kept)})
        logits.append(out.logits[:, -1])
    return torch.stack(logits).float()


def far(left: Tensor, right: Tensor, dtype: str) -> bool:
    """Whether answers differ."""
    return left.shape != right.shape or not float((left - right).abs().max()) < TOLERANCE[dtype]


@cache
def _expected(
    name: str, attention: str, dtype: str, call: str, batch: str, one: Any
) -> Tensor | None:
    found = host(name, attention, dtype)
    model = copy.deepcopy(found.model)
    try:
        with one(model):
            return run(model, found.inputs[batch], call, {})
    except VlmpruneError:
        return None


def traces(model: Any) -> dict[str, Any]:
    """What a pruner might leave: attributes, hooks, registered functions."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found: dict[str, Any] = {
        name: (sorted(vars(one)), [len(getattr(one, kind)) for kind in hooks], type(one))
        for name, one in model.named_modules()
    }
    for one in attentions_of(model):
        registry = getattr(sys.modules.get(type(one).__module__), "ALL_ATTENTION_FUNCTIONS", None)
        if registry is not None:
            found[f"registry {type(one).__name__}"] = dict(registry._local_mapping)
    return found


def _outcome(
    model: Any, row: Row, one: Any, wanted: Tensor | None, inputs: dict[str, Tensor], dtype: str
) -> tuple[str, str]:
    before = traces(model)
    try:
        with one(model):
            answer = run(model, inputs, row.call, row.names)
    except VlmpruneError as error:
        said = str(error)
        if "\n" in said or not said.endswith("."):
            return "traceback", f"no sentence: {said}"
        if traces(model) != before:
            return "traceback", "refused, but the host is not as before"
        return "refused", said
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}".splitlines()[0]
    if traces(model) != before:
        return "traceback", "answered, but the host is not as before"
    if wanted is None:
        return "wrong", "an answer where the untouched host is refused"
    if far(answer, wanted, dtype):
        return "wrong", f"logits differ by {float((answer - wanted).abs().max()):.1g}"
    return "right", ""


def outcomes(row: Row, attention: str, dtype: str) -> dict[str, tuple[str, str]]:
    """What comes of calls to a changed host, by the method, and more about each in words.

    Under "alone" is what the changed host answers by itself: "as before" or "otherwise" than the
    untouched one, or not ("fails").

    Returns:
        "right": the same answer as from the untouched host with the same pruner. "refused": one
        sentence, and a host without a trace. "wrong": another answer, or one where the untouched
        host is refused. "traceback": any other error, a sentence that is none, or traces.
    """
    found = host(row.host, attention, dtype)
    inputs = found.inputs[row.batch]
    pruners = {method: pruner(method, row, found) for method in METHODS}
    # What the untouched host answers, before anything is patched.
    wanted = {
        method: _expected(row.host, attention, dtype, row.call, row.batch, one)
        for method, one in pruners.items()
    }
    expected = plain(row.host, attention, dtype, row.call, row.batch)
    said: dict[str, tuple[str, str]] = {}
    with MonkeyPatch.context() as patch:
        # A copy serves all methods as long as each leaves it as it was.
        model = copy.deepcopy(found.model)
        row.change(model, patch)
        try:
            answer = run(model, inputs, row.call, row.names)
        except Exception as error:
            said["alone"] = "fails", f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            said["alone"] = ("otherwise" if far(answer, expected, dtype) else "as before"), ""
        for method, one in pruners.items():
            said[method] = _outcome(model, row, one, wanted[method], inputs, dtype)
            if said[method][0] == "traceback":
                patch.undo()
                model = copy.deepcopy(found.model)
                row.change(model, patch)
    return said
