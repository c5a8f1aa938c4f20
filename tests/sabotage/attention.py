"""Rows about the attention call: its arguments' names, what they mean, and who makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor, nn

from sabotage.hosts import Row, attentions_of
from sabotage.tools import (
    Arguments,
    Translate,
    attending,
    attention_file,
    hide,
    recast,
    renaming,
    unhooked,
)

Change = Callable[[Any, MonkeyPatch], None]


def decoder(model: Any) -> Any:
    """The language model."""
    return model.get_decoder()


def tower(model: Any) -> Any:
    """The vision encoder."""
    base = model.model
    return base.visual if hasattr(base, "visual") else base.vision_tower


def renamed(part: Callable[[Any], Any], **names: str) -> Change:
    """Arguments of a part's attention calls under other names."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        attending(patch, attention_file(part(model)), *renaming(names), names=names)

    return change


def retold(
    part: Callable[[Any], Any], forth: Translate, back: Translate, **names: str | None
) -> Change:
    """Arguments of a part's attention calls that mean something else."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        attending(patch, attention_file(part(model)), forth, back, names or None)

    return change


def _as_they_are(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, kwargs


def _without_scale(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, {name: value for name, value in kwargs.items() if name != "scaling"}


def _scaled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    module, query, *others = args
    return (module, query * kwargs["scaling"], *others), kwargs | {"scaling": 1.0}


def _scaled_in_silence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return _without_scale(*_scaled(args, kwargs))


def _unscaled_means_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, {"scaling": 1.0} | kwargs


def _scale_of_module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    module = args[0]
    return args, kwargs | {"scaling": getattr(module, "scaling", getattr(module, "scale", None))}


def _quarter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, kwargs | {"scaling": kwargs["scaling"] / 4}


def _times_four(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, kwargs | {"scaling": kwargs["scaling"] * 4}


def _inverse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, kwargs | {"scaling": 1 / kwargs["scaling"]}


def _mask_by_name(name: str) -> tuple[Translate, Translate]:
    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if len(args) < 5:
            return args, {name if k == "attention_mask" else k: v for k, v in kwargs.items()}
        return args[:4], kwargs | {name: args[4]}

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        others = {k: v for k, v in kwargs.items() if k not in (name, "attention_mask")}
        given = args[4] if len(args) > 4 and name == "attention_mask" else kwargs.get(name)
        return (*args[:4], given), others

    return forth, back


def _states_by_name(*names: str) -> tuple[Translate, Translate]:
    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        module, query, key, value, *mask = args
        states = dict(zip(names, (query, key, value), strict=True))
        given = {"attention_mask": mask[0]} if mask else {}
        return (module,), kwargs | states | given

    def back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        others = {k: v for k, v in kwargs.items() if k not in (*names, "attention_mask")}
        return (args[0], *(kwargs[n] for n in names), kwargs.get("attention_mask")), others

    return forth, back


def _of_states(change: Callable[[Tensor, int], Tensor]) -> Translate:
    """Another form of queries, keys and values, which are numbered 0 to 2."""

    def translate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        module, *states = args[:4]
        return (module, *(change(s, n) for n, s in enumerate(states)), *args[4:]), kwargs

    return translate


_rows_first = _of_states(lambda states, _: states.transpose(1, 2))


def _repeated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    module, query, key, value, *others = args
    times = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(times, dim=1) for states in (key, value))
    return (module, query, key, value, *others), kwargs


def _one_of_group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    module, query, key, value, *others = args
    times = module.num_key_value_groups
    return (module, query, key[:, ::times], value[:, ::times], *others), kwargs


def _interleaved(states: Tensor, number: int) -> Tensor:
    """Query heads so that those of a group lie apart (of 4 heads in 2 groups)."""
    return states[:, [0, 2, 1, 3]] if number == 0 else states


def _interleave(model: Any, patch: MonkeyPatch) -> None:
    order = _of_states(_interleaved)
    file = attention_file(decoder(model))
    attending(patch, file, order, order)


def _past_the_registry(part: Callable[[Any], Any]) -> Change:
    """Attention that is called without asking what is registered."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        file = attention_file(part(model))
        name = attentions_of(part(model))[0].config._attn_implementation
        held = file.ALL_ATTENTION_FUNCTIONS.get(name, file.eager_attention_forward)
        attending(patch, file, _as_they_are, _as_they_are)
        patch.setattr(file.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: held)

    return change


def _by_halves(part: Callable[[Any], Any]) -> Change:
    """Attention that is called for half of the heads at a time."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        file = attention_file(part(model))
        attending(patch, file, _as_they_are, _as_they_are)
        registry = file.ALL_ATTENTION_FUNCTIONS
        whole = type(registry).get_interface

        def get(name: str, default: Any) -> Any:
            held = whole(registry, name, default)

            def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
                states = [one.chunk(2, dim=1) for one in args[:3]]
                parts = [
                    held(module, *few, *args[3:], **kwargs) for few in zip(*states, strict=True)
                ]
                return torch.cat([one[0] for one in parts], dim=2), None

            return attend

        patch.setattr(registry, "get_interface", get)

    return change


@torch.no_grad()
def _scaled_result(model: Any, patch: MonkeyPatch) -> None:
    """An attention function that doubles its result, before weights that halve it."""
    for one in attentions_of(decoder(model)):
        one.o_proj.weight /= 2
    attending(
        patch,
        attention_file(decoder(model)),
        _as_they_are,
        _as_they_are,
        after=lambda result: (result[0] * 2, *result[1:]),
    )


def _attention_without_hooks(part: Callable[[Any], Any]) -> Change:
    def change(model: Any, patch: MonkeyPatch) -> None:
        for one in attentions_of(part(model)):
            unhooked(one)

    return change


def _packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    cu_seq_lens_q: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for flash attention over images that are packed into one sequence."""
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attend = nn.functional.scaled_dot_product_attention
    outs = [attend(q, k, v, scale=scaling) for q, k, v in parts]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _ends(**names: str) -> Change:
    """A tower that packs its images, for a function that is told where they end."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        file = attention_file(tower(model))
        attending(patch, file, _as_they_are, _as_they_are)
        file.ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = _packed
        attending(patch, file, *renaming(names), names=names)
        tower(model).config._attn_implementation = "flash_attention_2"

    return change


def _own_file(part: Callable[[Any], Any]) -> Change:
    """Attention classes of a file that has no registry, as a user's subclasses are."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        for one in attentions_of(part(model)):
            recast(one)
            type(one).__module__ = __name__

    return change


def _causal_unsaid(model: Any, patch: MonkeyPatch) -> None:
    attending(
        patch,
        attention_file(decoder(model)),
        lambda args, kwargs: (args, kwargs | {"is_causal": True}),
        _as_they_are,
    )
    for one in attentions_of(decoder(model)):
        one.causal = vars(one).pop("is_causal")


def _capped(model: Any, patch: MonkeyPatch) -> None:
    names = {"softcap": "cap"}
    attending(patch, attention_file(decoder(model)), *renaming(names), names=names)
    hide(model.config.text_config, "attn_logit_softcapping")


def _cap_of_module(model: Any, patch: MonkeyPatch) -> None:
    attending(
        patch,
        attention_file(decoder(model)),
        lambda args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "softcap"}),
        lambda args, kwargs: (args, kwargs | {"softcap": args[0].attn_logit_softcapping}),
    )
    hide(model.config.text_config, "attn_logit_softcapping")


def _sinks_of_module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, kwargs | {"s_aux": args[0].sinks}


def _without_sinks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, {name: value for name, value in kwargs.items() if name != "s_aux"}


def _both(name: str, forth: Translate, back: Translate, **names: str | None) -> list[Row]:
    return [
        Row(f"{name}, decoder", retold(decoder, forth, back, **names)),
        Row(f"{name}, tower", retold(tower, forth, back, **names)),
    ]


ROWS: list[Row] = [
    *_both("scaling is called scale", *renaming({"scaling": "scale"}), scaling="scale"),
    *_both("queries come scaled, and scaling says 1", _scaled, _as_they_are),
    *_both("queries come scaled, and no scaling means 1", _scaled_in_silence, _unscaled_means_one),
    *_both("the function reads the scale off the module", _without_scale, _scale_of_module),
    *_both("the function scales once more", _quarter, _times_four),
    *_both("scaling divides", _inverse, _inverse),
    *(
        Row(f"{name}, tower of windows", retold(tower, forth, back), host="qwen2_5_vl")
        for name, forth, back in (
            ("scaling is called scale", *renaming({"scaling": "scale"})),
            ("the function reads the scale off the module", _without_scale, _scale_of_module),
            ("the function scales once more", _quarter, _times_four),
        )
    ),
    *(
        Row(f"{name}, decoder with sliding windows", retold(decoder, forth, back), host="gemma3")
        for name, forth, back in (
            ("scaling is called scale", *renaming({"scaling": "scale"})),
            ("the function scales once more", _quarter, _times_four),
        )
    ),
    *_both("the mask comes by name", *_mask_by_name("attention_mask")),
    *_both("attention_mask is called mask", *_mask_by_name("mask"), attention_mask="mask"),
    Row(
        "query, key, value come by name",
        retold(decoder, *_states_by_name("query", "key", "value")),
    ),
    *_both("query, key, value are called q, k, v", *_states_by_name("q", "k", "v")),
    *_both("rows come before heads", _rows_first, _rows_first),
    *(
        Row(f"{name}, SigLIP", retold(tower, forth, back), host="gemma3")
        for name, forth, back in (
            ("scaling is called scale", *renaming({"scaling": "scale"})),
            ("the function scales once more", _quarter, _times_four),
        )
    ),
    *(
        Row(f"{name}, positions in 3-D", retold(decoder, forth, back), host="qwen3_vl")
        for name, forth, back in (
            ("scaling is called scale", *renaming({"scaling": "scale"})),
            ("the function reads the scale off the module", _without_scale, _scale_of_module),
            ("the function scales once more", _quarter, _times_four),
        )
    ),
    Row("query heads lie apart, positions in 3-D", _interleave, host="qwen3_vl"),
    Row("the function doubles its result, sliding windows", _scaled_result, host="gemma3"),
    Row("query heads lie apart, decoder with sliding windows", _interleave, host="gemma3"),
    Row("keys come repeated for all query heads", retold(decoder, _repeated, _one_of_group)),
    Row("query heads of a group lie apart", _interleave),
    Row("attention passes the registry by, decoder", _past_the_registry(decoder)),
    Row("attention passes the registry by, tower", _past_the_registry(tower)),
    Row("attention is called by halves of heads, decoder", _by_halves(decoder)),
    Row("attention is called by halves of heads, tower", _by_halves(tower)),
    Row("the function doubles its result", _scaled_result),
    Row("attention runs without hooks, decoder", _attention_without_hooks(decoder)),
    Row("attention runs without hooks, tower", _attention_without_hooks(tower)),
    Row("attention is a class of another file, decoder", _own_file(decoder)),
    Row("attention is a class of another file, tower", _own_file(tower)),
    Row("is_causal is said in the call, not by the module", _causal_unsaid),
    Row("images come packed", _ends(), host="qwen2_5_vl", attentions=("sdpa",), types=("float32",)),
    Row(
        "cu_seq_lens_q is called ends",
        _ends(cu_seq_lens_q="ends"),
        host="qwen2_5_vl",
        attentions=("sdpa",),
        types=("float32",),
    ),
    Row("softcap is called cap", _capped, host="capped", attentions=("eager",)),
    Row(
        "the function reads the soft cap off the module",
        _cap_of_module,
        host="capped",
        attentions=("eager",),
    ),
    Row(
        "s_aux is called sinks",
        renamed(decoder, s_aux="sinks"),
        host="sinks",
        attentions=("eager",),
    ),
    Row(
        "the function reads the sinks off the module",
        retold(decoder, _without_sinks, _sinks_of_module),
        host="sinks",
        attentions=("eager",),
    ),
    Row(
        "sliding_window is called window",
        renamed(decoder, sliding_window="window"),
        host="windowed",
    ),
]
