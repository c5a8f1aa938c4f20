"""The reference for decoders that carry a state: the full model, given a prompt without columns.

What a recurrence has seen cannot be masked. So an ordinary text as long as what is left goes into
the model, and its decoder is given the very embeddings and positions that the other columns of the
whole request have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from answers import TOLERANCE, generate
from zoo.base import WORDS


def is_recurrent(built: Any) -> bool:
    """Whether layers of its language model carry a state from column to column."""
    return "linear_attention" in (
        getattr(built.config.get_text_config(), "layer_types", None) or ()
    )


def tolerance(built: Any) -> float:
    """How far equal answers of a model may lie apart.

    A recurrence is summed in chunks, and a shorter prompt has its columns in other ones.
    """
    return TOLERANCE * (10 if is_recurrent(built) else 1)


def shorter(inputs: Mapping[str, Tensor], dropped: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes the dropped columns out of [B, L, ...], and pads on the left.

    Args:
        inputs: the whole request.
        dropped: [B, L] bool.
    """
    keep = (inputs["attention_mask"] != 0) & ~dropped
    places = [row.nonzero()[:, 0] for row in keep]
    longest = max(map(len, places))

    def short(whole: Tensor) -> Tensor:
        rows = [row[at] for row, at in zip(whole, places, strict=True)]
        return torch.stack(
            [torch.cat((row.new_zeros(longest - len(row), *row.shape[1:]), row)) for row in rows]
        )

    return short


@contextmanager
def exchanging(
    built: Any, inputs: Mapping[str, Tensor], dropped: Tensor, three: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Inside the block an ordinary text stands for what is left of a request.

    Args:
        built: a model with three positions a column.
        inputs: the whole request.
        dropped: [B, L] bool.
        three: [3, B, L] its positions.

    Yields:
        The text's ids and mask, [B, S].
    """
    short, behind = shorter(inputs, dropped), 0
    mask, embedded = short(inputs["attention_mask"]), short(_embedded(built, inputs))
    text = (mask.cumsum(1) - 1).clamp(min=0)
    positions = torch.stack([text, *map(short, three)])
    last = torch.stack([text[:, -1], *three[..., -1]])[..., None]

    def exchange(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal behind
        times, columns = len(kwargs["inputs_embeds"]) // len(mask), kwargs["inputs_embeds"].shape[1]
        if behind:
            changed = {"position_ids": last + torch.arange(columns) + behind}
        else:
            changed = {"position_ids": positions, "inputs_embeds": embedded}
        behind = behind + columns if behind else 1
        return args, kwargs | {
            name: values.repeat_interleave(times, 1 if name == "position_ids" else 0)
            for name, values in changed.items()
        }

    hook = built.get_decoder().register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield {"input_ids": torch.full_like(mask, WORDS), "attention_mask": mask}
    finally:
        hook.remove()


def shortened(
    built: Any, inputs: Mapping[str, Tensor], dropped: Tensor, three: Tensor, **more: Any
) -> Any:
    """The full model's answer to what is left of a request; `more` are settings of `generate`."""
    with exchanging(built, inputs, dropped, three) as text:
        answer = generate(built, text, **more)
    times = len(answer.sequences) // len(dropped)
    whole = inputs["input_ids"].repeat_interleave(times, 0)
    new = answer.sequences[:, text["input_ids"].shape[1] :]
    answer.sequences = torch.cat((whole, new), dim=1)
    return answer


def _embedded(built: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, L, D] what the language model is given."""
    seen: list[Tensor] = []
    hook = built.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            built(**inputs)
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def in_float64(built: Any) -> Iterator[Any]:
    """Inside the block a model computes in float64, which grouped products of experts cannot."""
    kind = built.dtype
    built.double()
    if hasattr(built, "set_experts_implementation"):
        built.set_experts_implementation("eager")
    try:
        yield built
    finally:
        built.to(kind)
