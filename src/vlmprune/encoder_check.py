"""Whether the cells that are scored are what the host makes visual tokens of: proved by the host.

The host encodes once more, and half of the patches are changed on the way: as queries of the layer
whose attention scores, and, where that is another, behind the layer whose output becomes features.
If the layers, the order of patches and the packing of tokens are read rightly, what is made of the
other half stays as it was, and the rest changes. Nothing of a projector needs to be known for that
but that it makes each token of its own cell alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.dispatch import changing
from vlmprune.families.media import Encoder, Inputs, Medium, Scored
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.hosts.decoder import states_of, with_states
from vlmprune.layout import NO_PATCH, Layout
from vlmprune.taps import passing

# How much of the others' usual change is none yet: where only queries were turned, of which little
# reaches a layer's states, and where the states themselves were, whose least trace in others tells
# a layer too many.
_ATTENDED, _TURNED = 0.25, 0.02
# What float32 rounds, in units.
_ROUNDED = 16


@dataclass(frozen=True)
class Encoding:
    """One call of the host's own method, and what was seen of it.

    Attributes:
        model: the host.
        medium: the modality.
        encoder: its tower.
        scored: where its attention is read; None where that is no layer of the tower.
        inputs: the request's inputs.
        layouts: one an item.
        attention: what was seen of the scored layer, call by call [B, L].
        features: what the projector was given, call by call.
        states: what left the scored layer, call by call.
        output: what the method returned.
        again: calls it once more.
    """

    model: Any
    medium: Medium
    encoder: Encoder
    scored: Scored | None
    inputs: Inputs
    layouts: Sequence[Layout]
    attention: Sequence[Tensor]
    features: Sequence[Tensor]
    states: Sequence[Tensor]
    output: Any
    again: Callable[[], Any]


def due(
    model: Any,
    medium: Medium,
    encoder: Encoder,
    scored: Scored | None,
    layouts: Sequence[Layout],
) -> bool:
    """Whether the cells are still to be proved, of one item or of several."""
    ledger = contract.ledger.get()
    if ledger is None or medium.unlocal or _is_random(model):
        return False
    return ledger.due(*_key(model, medium, encoder, scored, layouts))


def _key(
    model: Any,
    medium: Medium,
    encoder: Encoder,
    scored: Scored | None,
    layouts: Sequence[Layout],
) -> tuple[Any, ...]:
    layer = None if scored is None else scored.layer
    return "cells", medium.method, encoder.feature, layer, model.dtype, len(layouts) > 1


def _is_random(model: Any) -> bool:
    """Whether a run of the model is not like another."""
    return model.training and any(
        isinstance(one, nn.Dropout) and one.p > 0 for one in model.modules()
    )


@torch.no_grad()
def check(one: Encoding) -> None:
    """Refuse a host whose visual tokens are not made of the cells that are scored.

    Raises:
        ContractError: they are not.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = [
        (torch.rand(len(layout.labels), generator=generator) < 0.5)
        & (layout.labels.cpu() != NO_PATCH)
        for layout in one.layouts
    ]
    if not any(bool(tokens.any()) for tokens in chosen):
        return
    rows = _rows_of(one, chosen)
    if one.scored is not None:
        layer = one.scored.layer
        with changing(attention_of(layer), _Turned(rows)), passing(layer) as states:
            one.again()
        _check_scored(one, states, rows)
    with _Turned(rows).behind(one.encoder.layers[one.encoder.feature]):
        output = one.medium.completed(one.model, one.again())
    _check_tokens(one, output, chosen)
    ledger = contract.ledger.get()
    if ledger is not None:
        ledger.prove(*_key(one.model, one.medium, one.encoder, one.scored, one.layouts))


def _check_scored(one: Encoding, states: Sequence[Tensor], rows: Tensor) -> None:
    """What left the scored layer changed where its queries did."""
    before, after = (
        torch.cat([part.flatten(0, -2).cpu() for part in calls]) for calls in (one.states, states)
    )
    assert one.scored is not None
    where = f"the tokens of {type(one.scored.layer).__name__}"
    if len(before) != len(rows) or len(after) != len(rows):
        raise contract.broken(one.model, f"{where} are not those that it attends with")
    stayed, moved = _changes(before, after, rows, _ATTENDED)
    if not stayed or not moved:
        raise contract.broken(one.model, f"{where} attend in another order than they leave it")


def _check_tokens(one: Encoding, output: Any, chosen: Sequence[Tensor]) -> None:
    """Visual tokens changed where their cells did."""
    own = [layout.labels.cpu() != NO_PATCH for layout in one.layouts]
    before, after = (
        torch.cat([t[of.to(t.device)].cpu() for t, of in zip(made, own, strict=True)])
        for made in (
            one.medium.projected(one.model, kept, one.layouts) for kept in (one.output, output)
        )
    )
    kept = torch.cat([tokens[of] for tokens, of in zip(chosen, own, strict=True)])
    where = f"the patches behind encoder layer {one.encoder.feature}"
    stayed, moved = _changes(before, after, kept, _TURNED)
    if not stayed:
        raise contract.broken(
            one.model,
            f"a visual token of its {one.medium.kind}s is not made of {where} that are scored for "
            "it",
        )
    if not moved:
        raise contract.broken(
            one.model, f"the visual tokens of its {one.medium.kind}s are not made of {where}"
        )


def _changes(before: Tensor, after: Tensor, kept: Tensor, share: float) -> tuple[bool, bool]:
    """Whether the rows [n, D] that were to stay did, and whether the others changed.

    Args:
        before: as they were.
        after: as they are.
        kept: [n] bool; those that were to stay.
        share: of the others' change, that is none yet; what a second run of the same sum, or a
            quantised one beside other rows, may be off by.
    """
    before, after = before.float(), after.float()
    change = (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)
    rounding = _ROUNDED * torch.finfo(torch.float32).eps
    others = change[~kept]
    if not len(others):
        return bool((change <= rounding).all()), True
    usual = float(others.median())
    return bool((change[kept] <= max(rounding, share * usual)).all()), usual > rounding


def _rows_of(one: Encoding, chosen: Sequence[Tensor]) -> Tensor:
    """[n] bool; which of the tower's tokens, call after call, scores of some cells are made of.

    Args:
        one: the call.
        chosen: for each item [n] bool, its visual tokens whose cells are meant.
    """
    with torch.inference_mode(False), torch.enable_grad():
        marks = [torch.ones(*call.shape[:2], 1, requires_grad=True) for call in one.attention]
        few = [torch.zeros(*part.shape[:-1], 1) for part in one.features]
        layouts = [replace(layout, labels=layout.labels.clone().cpu()) for layout in one.layouts]
        # Tensors of an inference mode cannot take part in a graph.
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in one.inputs.items()}
        cells, _ = one.medium.cells(one.model, inputs, layouts, list(marks), few)
        total, start = torch.zeros(()), 0
        for layout, tokens in zip(layouts, chosen, strict=True):
            flat = torch.cat(list(cells[start : start + layout.crops]))
            total = total + flat[layout.labels[tokens]].sum()
            start += layout.crops
        parts = torch.autograd.grad(total, marks, allow_unused=True)
    found = [
        torch.zeros(mark.shape[:2]) if part is None else part[..., 0]
        for mark, part in zip(marks, parts, strict=True)
    ]
    return torch.cat([part.flatten() != 0 for part in found])


class _Turned:
    """Turns tokens of a tower round, call after call, but for some.

    Args:
        rows: [n] bool; those that stay.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.start = rows, 0
        self.thread = threading.get_ident()

    def __call__(self, call: AttentionCall) -> AttentionCall:
        """An attention call with other queries."""
        if threading.get_ident() != self.thread:
            return call
        stay = self._next(call.query[:, 0, :, 0])
        return replace(call, query=torch.where(stay[:, None, :, None], call.query, -call.query))

    def behind(self, layer: nn.Module) -> ExitStack:
        """Inside the block a layer hands on other states."""
        stack = ExitStack()

        def change(_: nn.Module, __: Any, output: Any) -> Any:
            if threading.get_ident() != self.thread:
                return None
            states = states_of(output)
            stay = self._next(states[..., 0])[..., None]
            return with_states(output, torch.where(stay, states, -states))

        # Before the host's own hooks, which record states.
        stack.callback(layer.register_forward_hook(change, prepend=True).remove)
        return stack

    def _next(self, like: Tensor) -> Tensor:
        """Which tokens of the next call stay; those that were not seen before do not."""
        stay = self.rows[self.start : self.start + like.numel()].to(like.device)
        self.start += like.numel()
        return nn.functional.pad(stay, (0, like.numel() - len(stay))).view(like.shape)
