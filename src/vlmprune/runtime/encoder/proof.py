"""Whether the cells that are scored are what the host makes visual tokens of: proved by the host.

The host encodes once more, and half of the patches are changed on the way: as queries of the layer
whose attention scores, and behind the layer whose output becomes features. Where attention of a
later layer scores, that is a run of its own. If the layers, the order of patches and the packing of
tokens are read rightly, what is made of the other half stays as it was, and the rest changes.
Nothing of a projector needs to be known for that but that it makes each token of its own cell
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of, implementation
from vlmprune.hosts.decoder import states_of, with_states
from vlmprune.hosts.families.media import Encoder, Inputs, Medium
from vlmprune.hosts.release import is_quantized
from vlmprune.runtime.attention.interception import Changing, intercepting
from vlmprune.runtime.hooks import Hooks
from vlmprune.views.layout import NO_PATCH, Layout

# How much of the others' usual change is none yet: where only queries were turned, of which little
# reaches a layer's states, and where the states themselves were, whose least trace in others tells
# a layer too many.
_ATTENDED, _TURNED = 0.25, 0.02
# The same of the latter where activations are quantised together.
_QUANTIZED = 0.25
# What float32 rounds, in units.
_ROUNDED = 16


@dataclass(frozen=True)
class Encoding:
    """One call of the host's own method, and what was seen of it.

    Attributes:
        model: the host.
        medium: the modality.
        encoder: its tower.
        looked: the layers whose attention is read, and what left each, call by call.
        inputs: the request's inputs.
        layouts: one an item.
        attention: what was seen of the layer that scores, call by call [B, L].
        features: what the projector was given, call by call.
        output: what the method returned.
        again: calls it once more.
    """

    model: Any
    medium: Medium
    encoder: Encoder
    looked: Mapping[nn.Module, Sequence[Tensor]]
    inputs: Inputs
    layouts: Sequence[Layout]
    attention: Sequence[Tensor]
    features: Sequence[Tensor]
    output: Any
    again: Callable[[], Any]


def due(
    model: Any,
    medium: Medium,
    encoder: Encoder,
    looked: Iterable[nn.Module],
    layouts: Sequence[Layout],
) -> bool:
    """Whether the cells are still to be proved, of one item or of several."""
    ledger = contract.ledger.get()
    if ledger is None or medium.unlocal:
        return False
    return ledger.due(*_key(model, medium, encoder, looked, layouts))


def _key(
    model: Any,
    medium: Medium,
    encoder: Encoder,
    looked: Iterable[nn.Module],
    layouts: Sequence[Layout],
) -> tuple[Any, ...]:
    layers = frozenset(looked)
    kinds = frozenset(implementation(attention_of(one)) for one in layers)
    which = medium.method, encoder.feature, layers, kinds
    return "cells", *which, model.dtype, len(layouts) > 1


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
    if one.model.training and not _same(one):
        # With dropout no two runs are alike; the proof waits for one without.
        return
    rows = _rows_of(one, chosen)
    share = _QUANTIZED if is_quantized(one.model) else _TURNED
    feature = one.encoder.layers[one.encoder.feature]
    early = list(one.encoder.layers)[: one.encoder.feature + 1]
    # What leaves a layer that was looked at is put right again, so that those behind it run as
    # they did.
    together = all(any(layer is own for own in early) for layer in one.looked)
    with ExitStack() as stack:
        if together:
            # Of hooks on one layer the last to be put there runs first.
            stack.enter_context(_Turned(rows).behind(feature))
        left = {}
        for layer, before in one.looked.items():
            turned = Changing(_Turned(rows).queries)
            stack.enter_context(intercepting(turned, attention_of(layer)))
            left[layer] = stack.enter_context(_restored(layer, before))
        output = one.again() if left or together else None
    for layer, found in left.items():
        _check_looked(one, layer, found, rows)
    if not together:
        with _Turned(rows).behind(feature):
            output = one.again()
    _check_tokens(one, one.medium.completed(one.model, output), chosen, share)
    ledger = contract.ledger.get()
    if ledger is not None:
        ledger.prove(*_key(one.model, one.medium, one.encoder, one.looked, one.layouts))


def _same(one: Encoding) -> bool:
    """Whether the host encodes twice alike."""
    again = one.medium.completed(one.model, one.again())
    old, new = (one.medium.projected(one.model, out, one.layouts) for out in (one.output, again))
    return all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def _check_looked(one: Encoding, layer: nn.Module, states: Sequence[Tensor], rows: Tensor) -> None:
    """What left a layer changed where its queries did."""
    where = f"the tokens of {type(layer).__name__}"
    if not one.looked[layer] or not states:
        raise contract.broken(one.model, f"{where} leave it around its hooks")
    before, after = (
        torch.cat([part.flatten(0, -2).cpu() for part in calls])
        for calls in (one.looked[layer], states)
    )
    if len(before) != len(rows) or len(after) != len(rows):
        raise contract.broken(one.model, f"{where} are not those that it attends with")
    # Where nothing changed its attention does not matter, as with a gate that is shut.
    stayed, _ = _changes(before, after, rows, _ATTENDED)
    if not stayed:
        raise contract.broken(one.model, f"{where} attend in another order than they leave it")


def _check_tokens(one: Encoding, output: Any, chosen: Sequence[Tensor], share: float) -> None:
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
    stayed, moved = _changes(before, after, kept, share)
    if not stayed:
        raise contract.broken(
            one.model,
            f"a visual token of its {one.medium.kind}s is not made of {where} that are scored for "
            "it",
        )
    # A projector that is zero makes all tokens alike, of whatever.
    if not moved and not bool((before == before[:1]).all()):
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
    # A model that overflows is not the contract's to tell.
    fine = before.isfinite().all(dim=1) & after.isfinite().all(dim=1)
    before, after, kept = before[fine], after[fine], kept[fine]
    change = (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)
    rounding = _ROUNDED * torch.finfo(torch.float32).eps
    others = change[~kept]
    if not len(others) or not bool(kept.any()):
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

    def queries(self, call: AttentionCall) -> AttentionCall:
        """An attention call with other queries."""
        stay = self._next(call.query[:, 0, :, 0])
        return replace(call, query=torch.where(stay[:, None, :, None], call.query, -call.query))

    def behind(self, layer: nn.Module) -> Hooks:
        """Inside the block a layer hands on other states."""
        hooks = Hooks()

        def change(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            states = states_of(output)
            stay = self._next(states[..., 0])[..., None]
            return with_states(output, torch.where(stay, states, -states))

        # Before the host's own hooks, which record states.
        hooks.after(layer, change, first=True)
        return hooks

    def _next(self, like: Tensor) -> Tensor:
        """Which tokens of the next call stay; those that were not seen before do not."""
        stay = self.rows[self.start : self.start + like.numel()].to(like.device)
        self.start += like.numel()
        return nn.functional.pad(stay, (0, like.numel() - len(stay))).view(like.shape)


@contextmanager
def _restored(layer: nn.Module, before: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside the block record what leaves a layer, and hand on what left it before.

    Args:
        layer: it.
        before: what left it, call by call.

    Yields:
        What leaves it, call by call.
    """
    left: list[Tensor] = []

    def hand(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
        states, number = states_of(output), len(left)
        left.append(states)
        if number >= len(before):
            return None
        return with_states(output, before[number].view(states.shape))

    with Hooks() as hooks:
        # Before the host's own hooks, which record states.
        hooks.after(layer, hand, first=True)
        yield left
