"""The reference for what never enters the language model: a prompt without it, one row at a time.

Written apart from the library. The host encodes its images by itself; what it made of them is put
among the embedded text, columns are left out, and its language model reads what is left in one
forward, the answer included, without padding and without a cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoo.base import IMAGE


def embedded(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, L, D] the whole prompt, images in their places."""
    encode = model.base_model.get_image_features
    takes = inspect.signature(encode).parameters
    given = {name: one for name, one in inputs.items() if name in takes}
    made = encode(**given, return_dict=True).pooler_output
    features = made if isinstance(made, Tensor) else torch.cat(list(made))
    prompt = model.get_input_embeddings()(inputs["input_ids"]).clone()
    prompt[inputs["input_ids"] == IMAGE] = features.flatten(0, -2).to(prompt.dtype)
    return prompt


@torch.no_grad()
def shortened(
    model: Any,
    inputs: Mapping[str, Tensor],
    kept: Tensor,
    sequences: Tensor,
    positions: Tensor | None = None,
) -> list[Tensor]:
    """[B, V] logits of each step of an answer.

    Args:
        model: the host.
        inputs: of the whole request.
        kept: [B, L] bool; columns that enter its language model.
        sequences: [B, L + steps] the request and the answer.
        positions: [A, B, L] of the whole request; None to number what is kept.
    """
    prompt, length = embedded(model, inputs), kept.shape[1]
    rows = []
    for row, stays in enumerate(kept & (inputs["attention_mask"] != 0)):
        answer = sequences[row, length:-1]
        states = torch.cat((prompt[row, stays], model.get_input_embeddings()(answer)))
        placed = torch.arange(len(states))[None]
        if positions is not None:
            own = positions[:, row]
            ahead = own[:, -1:] + 1 + torch.arange(len(answer))
            placed = torch.cat((own[:, stays], ahead), dim=1)
            placed = placed if len(placed) == 1 else placed[:, None]
        decoder = model.base_model.language_model
        # Without a mask, gaps in the positions would be read as packed samples.
        seen = torch.ones(1, len(states), dtype=torch.long)
        given = {"attention_mask": seen, "position_ids": placed, "use_cache": False}
        out = decoder(inputs_embeds=states[None], **given)
        rows.append(model.lm_head(out.last_hidden_state)[0, int(stays.sum()) - 1 :])
    return list(torch.stack(rows).unbind(1))


class _InDouble(TorchFunctionMode):
    """Takes float64 wherever float32 is asked for by name."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def wider(one: Any) -> Any:
            return torch.float64 if one is torch.float32 else one

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: wider(one) for name, one in (kwargs or {}).items()}
        return function(*map(wider, args), **named)


@contextmanager
def in_double(model: Any) -> Iterator[None]:
    """Let a language model work in float64 where it turns to float32 for norms, angles, states."""
    decoder = model.base_model.language_model
    plain = decoder.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _InDouble():
                return plain(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def padding_apart(
    model: Any, inputs: Mapping[str, Tensor], answer: Any, positions: Tensor | None = None
) -> float:
    """By how much padding changes the logits of an answer of the model that is not pruned."""
    whole = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    return apart(answer.logits, shortened(model, inputs, whole, answer.sequences, positions))


def kept_columns(report: Any, ids: Tensor) -> Tensor:
    """[B, L] bool; all columns but the visual tokens that a report does not keep."""
    kept = ids != IMAGE
    left = (ids == IMAGE).nonzero()
    for own, stays in zip(
        left.split([len(one.labels) for one in report.layouts]), report.kept, strict=True
    ):
        rows, columns = own[stays].unbind(1)
        kept[rows, columns] = True
    return kept


def exchanged(kept: Tensor, ids: Tensor) -> Tensor:
    """[B, L] bool; as many visual tokens, but others."""
    out = kept.clone()
    for row, own in enumerate(kept):
        places = (ids[row] == IMAGE).nonzero()[:, 0]
        out[row, places] = own[places].roll(1)
    return out
