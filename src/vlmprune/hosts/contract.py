"""The contract with Transformers: what must hold for a pruned call to be right, and is checked.

At attach signatures alone are looked at (`requests.check_model`, `decoder.check_layers`,
`caches.check_layers` and a family's own record). What they cannot tell is told by the host's own
numbers at an attachment's first calls, once a configuration: a row of each attention that is read
(`run`), a cell of the encoder (`vlmprune.runtime.encoder.proof`), the position that is due. After
each call it is asked what costs next to nothing: whether all that was due was reached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import masks, release
from vlmprune.hosts.attention import AttentionCall
from vlmprune.select.softmax import scores

# Of float32, what a sum over many keys may be off by, as a share of the largest value: 21 classes
# were at most 5e-7 off, and 0.38 with the scale hidden.
_EXACT = 1e-5
# Rows of a sample that are compared.
_ROWS = 8
# A scale that is wrong by these factors or more is told in any type.
_FACTORS = (1.3, 1 / 1.3)

_checks: ContextVar[bool] = ContextVar("vlmprune_checks", default=True)


class ContractError(VlmpruneError):
    """Transformers does not do what this release was believed to do."""


def broken(who: Any, fact: str) -> ContractError:
    """The error of a contract that does not hold.

    Args:
        who: the object of Transformers, or its class.
        fact: what does not hold, as it goes on after "in transformers …".
    """
    cls = who if isinstance(who, type) else type(who)
    return ContractError(
        f"{cls.__name__} cannot be pruned rightly in transformers {release.version()}: {fact}; the "
        f"model is as it was before, install transformers{release.TESTED} or tell vlmprune's "
        "developers."
    )


@contextmanager
def switched_off() -> Iterator[None]:
    """Check nothing inside the block; for tests and benchmarks of the contract itself."""
    token = _checks.set(False)
    try:
        yield
    finally:
        _checks.reset(token)


def checks() -> bool:
    """Whether the contract is checked here."""
    return _checks.get()


class Ledger:
    """What the first calls of one attachment proved, so that it is proved once."""

    def __init__(self) -> None:
        self._proved: set[Hashable] = set()
        self._lock = threading.Lock()

    def due(self, *key: Hashable) -> bool:
        """Whether something is still to be proved."""
        return checks() and key not in self._proved

    def prove(self, *key: Hashable) -> None:
        """Note that it holds."""
        with self._lock:
            self._proved.add(key)


# The ledger of the attachment whose call is under way; None outside of one.
ledger: ContextVar[Ledger | None] = ContextVar("vlmprune_ledger", default=None)


@contextmanager
def proving(own: Ledger) -> Iterator[None]:
    """Prove for an attachment inside the block what it has not proved yet."""
    token = ledger.set(own)
    try:
        yield
    finally:
        ledger.reset(token)


def due(call: AttentionCall, causal: bool) -> tuple[Hashable, ...] | None:
    """What is to be proved of an attention call; None where it was, or cannot be, proved.

    Args:
        call: the call.
        causal: whether it is read as causal where it brings no mask of four dimensions.
    """
    own = ledger.get()
    if own is None or not checks() or call.drops:
        return None
    if call.mask is not None and not isinstance(call.mask, Tensor):
        return None
    dimensions = None if call.mask is None else call.mask.ndim
    # The function itself, for its name is read of a config, at each layer.
    kind = (call.function, call.query.dtype, call.names, dimensions, causal)
    key = (call.module, *kind, len(call.query) > 1)
    return key if own.due(*key) else None


def run(proceed: Callable[[AttentionCall], Any], call: AttentionCall, causal: bool) -> Any:
    """What a call gives; the first time, rows of it are held against ours.

    Args:
        proceed: makes the call.
        call: it.
        causal: as in `due`.

    Raises:
        ContractError: the host attends otherwise than it is read here.
    """
    result = proceed(call)
    key = due(call, causal)
    own = ledger.get()
    if key is not None and own is not None:
        out = result[0] if isinstance(result, tuple) else result
        if check_rows(call, out, causal):
            own.prove(*key)
    return result


@torch.no_grad()
def check_rows(call: AttentionCall, out: Any, causal: bool) -> bool:
    """Hold rows of the host's result against softmax(q·kᵀ)·v as its parts are read here.

    In half precision the host's function is asked for the same rows in float32 as well, as far as
    it can be, for its rounding would hide a scale that is not far off.

    Args:
        call: the call.
        out: [B, Q, H, Dv] what it returned.
        causal: as in `due`.

    Returns:
        Whether there was something to compare.

    Raises:
        ContractError: they differ by more than rounding, or less from those of another scale.
    """
    queries, heads = call.query.shape[2], call.query.shape[1]
    whole = (call.query.shape[0], queries, heads, call.value.shape[3])
    if not call.shaped or not isinstance(out, Tensor) or tuple(out.shape) != whole:
        raise broken(
            call.module,
            "its queries, keys and values, or what attention makes of them, are not [batch, heads, "
            "tokens, width]",
        )
    told = False
    # Under autocast the checks would be rounded as the host is.
    with torch.autocast(call.query.device.type, enabled=False):
        for sample in _samples(call, causal):
            one = call.sample(sample)
            numbers = _numbers(one, causal)
            host = out[sample, numbers].float()
            told |= _check_sample(one, host, numbers, causal, _unit(call, out))
    return told


def _check_sample(
    call: AttentionCall, host: Tensor, numbers: Tensor, causal: bool, unit: float
) -> bool:
    """`check_rows` of some rows of one sample, [n, H, Dv]."""
    lines = call.lines(numbers[None], causal)
    ours, highest = _rows(call, numbers, lines, call.scale)
    largest = float(call.value.detach().abs().max())
    if not bool(ours.isfinite().all()) and not bool(host.isfinite().all()):
        # The model overflows, which is not the contract's to tell.
        return False
    _compare(call, host, ours, unit * (8 + 4 * highest) * largest, largest)
    if unit <= torch.finfo(torch.float32).eps:
        return True
    exact = None if call.flash else _asked_again(call, numbers, lines)
    if exact is not None:
        fine = torch.finfo(torch.float32).eps * (8 + 4 * highest) * largest
        _compare(call, exact, ours, fine, largest)
        return True
    for factor in _FACTORS:
        other = _rows(call, numbers, lines, call.scale * factor)[0]
        told = float((other - ours).norm()) > unit * (4 + 2 * highest) * float(ours.norm())
        if told and float((other - host).norm()) < float((ours - host).norm()):
            raise _differs(call, host, ours)
    return True


def _unit(call: AttentionCall, out: Tensor) -> float:
    """What the host rounds by: the coarsest of the types that take part."""
    tensors = (call.query, call.key, call.value, out)
    types = {one.dtype for one in tensors if one.dtype.is_floating_point}
    device = call.query.device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    unit = max(torch.finfo(one).eps for one in types)
    # On a GPU multiplications of float32 may be rounded to ten bits.
    return max(unit, 2.0**-11) if call.query.is_cuda else unit


def _compare(
    call: AttentionCall, host: Tensor, ours: Tensor, rounding: float, largest: float
) -> None:
    """Refuse rows that differ by more than rounding, and than sums over many keys do."""
    if not float((host - ours).abs().max()) <= max(_EXACT * largest, rounding):
        raise _differs(call, host, ours)


def _differs(call: AttentionCall, host: Tensor, ours: Tensor) -> ContractError:
    off = float((host - ours).abs().max() / ours.abs().max().clamp(min=1e-30))
    return broken(
        call.module,
        f"a row of its attention is off by {off:.2g} of its largest value from the softmax of its "
        "queries and keys, so scores would choose wrong tokens",
    )


def _asked_again(call: AttentionCall, numbers: Tensor, lines: Tensor) -> Tensor | None:
    """[n, H, Dv] the host's own rows of a sample, computed in float32; None where it cannot."""
    seen = masks.visible(lines)
    exact = masks.added(seen, torch.float32)
    if lines.dtype != torch.bool:
        exact = masks.hidden(lines.float(), seen)
    few = replace(
        call.without_positions(),
        query=call.query[:, :, numbers].float(),
        key=call.key.float(),
        value=call.value.float(),
        mask=exact,
    )
    try:
        out: Tensor = few.run()[0][0]
    # What is no function of tensors alone fails in its own way; the looser check was passed.
    except Exception:
        return None
    return out.float()


def _samples(call: AttentionCall, causal: bool) -> list[int]:
    """The samples whose last query sees the most keys and the fewest, of those that see any."""
    last = torch.tensor([[call.query.shape[2] - 1]], device=call.query.device)
    counts = masks.visible(call.lines(last, causal)).sum(dim=(1, 2, 3)).expand(len(call.query))
    seen: list[int] = counts.tolist()
    some = sorted((i for i, count in enumerate(seen) if count), key=seen.__getitem__)
    return [*dict.fromkeys((*some[-1:], *some[:1]))]


def _numbers(call: AttentionCall, causal: bool) -> Tensor:
    """[n] some of a sample's queries that see a key, from the first to the last."""
    queries, device = call.query.shape[2], call.query.device
    seeing = masks.seeing(call.mask, queries, call.key.shape[2], causal)
    some = torch.arange(queries, device=device)
    if seeing is not None:
        some = some[seeing[0].to(device).expand(queries)]
    steps = min(len(some), _ROWS)
    return some[[round(i * (len(some) - 1) / max(1, steps - 1)) for i in range(steps)]]


def _rows(
    call: AttentionCall, numbers: Tensor, lines: Tensor, scale: float
) -> tuple[Tensor, float]:
    """[n, H, Dv] rows of a sample's attention in float32, and the largest of their scores."""
    found = scores(call.query[:, :, numbers], call.key, scale, call.softcap)
    largest = float(found.masked_fill(~masks.visible(lines), 0.0).abs().max())
    groups = masks.weights(found, lines).view(1, call.key.shape[1], -1, found.shape[3])
    rows = (groups @ call.value.float()).view(*found.shape[1:3], -1)
    return rows.transpose(0, 1), largest


class Reached:
    """The decoder layers that a forward was followed to."""

    def __init__(self) -> None:
        self.found = set[int]()
        self._last = -1

    def note(self, index: int, layer: Any) -> None:
        """A layer was there.

        Args:
            index: its number.
            layer: itself, or what else tells it to people.

        Raises:
            ContractError: a later one was there before it.
        """
        if index <= self._last and checks():
            raise broken(layer, f"decoder layer {index} runs after layer {self._last}")
        self._last = index
        self.found.add(index)

    def check(self, who: nn.Module, due: Iterable[int], what: str) -> None:
        """Refuse a forward that left a layer out.

        Args:
            who: the host.
            due: the layers that it was to reach.
            what: what happened instead, as it goes on after "decoder layers …".

        Raises:
            ContractError: one was left out.
        """
        if checks() and not self.found.issuperset(due):
            left = ", ".join(map(str, sorted({*due} - self.found)))
            raise broken(who, f"decoder layers {left} {what}")
