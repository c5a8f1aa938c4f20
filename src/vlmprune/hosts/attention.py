"""Attention in Transformers: which module calls it, by which function, and with which arguments.

A modeling file looks its attention function up in a registry and calls it with queries, keys,
values, a mask and further arguments by name. `AttentionCall` is such a call taken apart; nobody
else reads those names. What they mean is not believed for long: `hosts.contract` compares a row of
the host's own result with what is read here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import masks, parallel
from vlmprune.hosts.release import version
from vlmprune.select.softmax import scores

# A modeling file's registry of attention functions.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# What an attention module has that calls them, beside a config.
_CAUSAL = "is_causal"

# Arguments of an attention call, the tensors in their order.
_TENSORS = ("query", "key", "value", "attention_mask")
_SCALE, _SOFTCAP, _DROPOUT, _POSITIONS = "scaling", "softcap", "dropout", "position_ids"
_WINDOW = "sliding_window"
# Ends of the sequences that flash attention gets packed into one.
_ENDS = "cu_seq_lens_q"
# What changes scores in a way that no method here follows.
_FOREIGN = ("s_aux", "position_bias")
# What a module keeps them in.
_SINKS = ("sinks", "sink")
_UNEVEN = (*_FOREIGN, _SOFTCAP, _WINDOW)
_SDPA = "sdpa"


# Not frozen: one is made of each call of each layer at each step, and freezing triples what that
# costs. Nobody changes one.
@dataclass(slots=True)
class AttentionCall:
    """One call of the attention function.

    Attributes:
        module: the attention module that makes it.
        query: [B, H, Q, D], after rotary embedding and norms.
        key: [B, H', C, D], H' a divisor of H; the last Q keys are those of the queries.
        value: [B, H', C, Dv].
        mask: as `hosts.masks` reads it; other kinds (flex attention's) are not read.
        others: the host's further arguments, which are handed on and read here alone.
        placed: how many of queries, keys, values and mask the host gives by place; it may give the
            others by name.
        masked: whether the host gives a mask at all, None included.
        function: the host's plain attention function; None of a call that is only looked at.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    others: dict[str, Any] = field(default_factory=dict)
    placed: int = len(_TENSORS)
    masked: bool = True
    function: Callable[..., Any] | None = None

    @property
    def scale(self) -> float:
        """Factor of the dot products; the attention functions' own default where none is given."""
        given = self.others.get(_SCALE)
        return float(self.query.shape[-1] ** -0.5 if given is None else given)

    @property
    def softcap(self) -> float | None:
        """Cap of the scores, where the model has one."""
        return self.others.get(_SOFTCAP)

    @property
    def sharing(self) -> parallel.Sharing:
        """The processes that have some of the heads each."""
        return parallel.sharing(self.module, self.query.shape[1])

    @property
    def ends(self) -> Tensor | None:
        """[n + 1] where the sequences begin that are packed into this one; None where none are."""
        return self.others.get(_ENDS)

    @property
    def drops(self) -> bool:
        """Whether weights are dropped at random, so that no call is like another."""
        return bool(self.others.get(_DROPOUT))

    @property
    def foreign(self) -> str | None:
        """The argument that changes scores in a way that no method here follows; None if none."""
        return next((name for name in _FOREIGN if self.others.get(name) is not None), None)

    @property
    def shaped(self) -> bool:
        """Whether queries, keys and values are [batch, heads, tokens, width] that fit together."""
        query, key, value = self.query, self.key, self.value
        if not query.ndim == key.ndim == value.ndim == 4:
            return False
        same = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
        return same and key.shape[:3] == value.shape[:3] and query.shape[1] % key.shape[1] == 0

    @property
    def uneven(self) -> str | None:
        """The argument that attention to heads of unequal length does not follow; None if none."""
        # Asked of each layer at each step.
        for name in _UNEVEN:
            if self.others.get(name) is not None:
                return name
        return None

    @property
    def names(self) -> frozenset[str]:
        """The further arguments that are there."""
        return frozenset(name for name, one in self.others.items() if one is not None)

    @property
    def function_name(self) -> str:
        """The name of the attention function."""
        return implementation(self.module)

    @property
    def flash(self) -> bool:
        """Whether the function takes masks of padding alone, being causal by itself."""
        return "flash" in self.function_name

    def takes(self, mask: Tensor) -> bool:
        """Whether the host's function takes a mask of the kind where it got none, or its own."""
        given = self.mask
        if given is None:
            # SDPA alone is known to select by bools.
            return self.masked and self.function_name == _SDPA
        return not self.flash and given.ndim == mask.ndim and given.dtype == mask.dtype

    @property
    def ahead(self) -> int:
        """Keys before the first query's own."""
        return self.key.shape[2] - self.query.shape[2]

    def lines(self, rows: Tensor, causal: bool) -> Tensor:
        """What some queries see of all keys.

        Args:
            rows: [B or 1, n] int64 their numbers.
            causal: whether none sees later keys where no mask of four dimensions comes.

        Returns:
            [B or 1, 1 or H, n, C], bool or, where the mask is, additive.
        """
        columns = self.key.shape[2]
        found = masks.lines(self.mask, rows, columns, self.ahead if causal else None)
        if self.ends is None or (self.mask is not None and self.mask.ndim == 4):
            return found
        ends = self.ends.to(rows.device)
        own = (ends[1:] <= rows[..., None]).sum(dim=-1)[:, None, :, None]
        at = torch.arange(columns, device=rows.device)
        return found & (at >= ends[own]) & (at < ends[own + 1])

    def weights(self, query: Tensor, lines: Tensor | None) -> Tensor:
        """Post-softmax attention that queries pay to the keys, in float32.

        Args:
            query: [B, H, n, D] some queries.
            lines: what they see, as `lines` has it; None for everything.

        Returns:
            [B, H, n, C]; 0 in rows that see nothing.
        """
        return masks.weights(scores(query, self.key, self.scale, self.softcap), lines)

    def of_one_head(self) -> AttentionCall:
        """The call of a single head, whose vectors are those of all heads put end to end.

        The scale falls as the width grows: D^-0.5 of each head becomes (H · D)^-0.5. Heads that
        other processes have are fetched; KV heads stand as often as query heads share them.
        """
        sharing, heads = self.sharing, self.query.shape[1]
        times = heads // self.key.shape[1]
        query, key = (
            sharing.joined(states).transpose(1, 2).flatten(2)[:, None]
            for states in (self.query, self.key.repeat_interleave(times, dim=1))
        )
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[:, :1]
        scale = self.scale * (heads * sharing.ranks) ** -0.5
        others = self.others | {_SCALE: scale}
        return replace(self, query=query, key=key, value=key, mask=mask, others=others)

    def sample(self, number: int) -> AttentionCall:
        """The call on one sample of the batch."""
        one, mask = slice(number, number + 1), self.mask
        if isinstance(mask, Tensor) and len(mask) > 1:
            mask = mask[one]
        query, key, value = (states[one] for states in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask)

    def alone(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The call on a sequence that was packed with others, without a mask."""
        others = {name: one for name, one in self.others.items() if name != _ENDS}
        return replace(self, query=query, key=key, value=value, mask=None, others=others)

    def with_mask(self, mask: Tensor | None) -> AttentionCall:
        """The call under another mask; written out, as it is made of each layer at each step."""
        given = self.module, self.query, self.key, self.value, mask
        return AttentionCall(*given, self.others, self.placed, self.masked, self.function)

    def without_positions(self) -> AttentionCall:
        """The call for other rows, whose positions would look like packed sequences."""
        return replace(self, others={k: v for k, v in self.others.items() if k != _POSITIONS})

    def run(self) -> Any:
        """The result of the host's attention function, ([B, Q, H, Dv], weights or None)."""
        assert self.function is not None
        if self.mask is not None and not self.masked:
            raise VlmpruneError(
                f"{type(self.module).__name__} of transformers {version()} gives its attention no "
                "mask under a name that is known, so none can be put in its place; prune before "
                "the language model."
            )
        if self.placed == len(_TENSORS):
            return self.function(
                self.module, self.query, self.key, self.value, self.mask, **self.others
            )
        tensors = [self.query, self.key, self.value]
        if self.masked or self.mask is not None:
            tensors.append(self.mask)
        named = dict(zip(_TENSORS[self.placed :], tensors[self.placed :], strict=False))
        return self.function(self.module, *tensors[: self.placed], **named, **self.others)


def unmasked(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values of a call as all modeling files make it, which brings no mask.

    Args:
        args: what comes by place behind the module.

    Returns:
        None of a call of another form, and of one with a mask.
    """
    if len(args) != len(_TENSORS) or args[3] is not None:
        return None
    return args[:3]


def called(
    function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
) -> AttentionCall:
    """Take a call of a function apart, as a modeling file makes it.

    Raises:
        TypeError: it is no call on queries, keys and values.
    """
    if len(args) == len(_TENSORS) and isinstance(args[2], Tensor):
        # As all modeling files of the tested releases make it.
        query, key, value, mask = args
        return AttentionCall(module, query, key, value, mask, kwargs, function=function)
    if len(args) > len(_TENSORS):
        raise TypeError(f"{len(args)} arguments come by place")
    tensors = dict(zip(_TENSORS, args, strict=False))
    tensors |= {name: kwargs.pop(name) for name in _TENSORS[len(args) :] if name in kwargs}
    missing = [name for name in _TENSORS[:3] if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise TypeError(f"no {missing[0]} comes")
    query, key, value = (tensors[name] for name in _TENSORS[:3])
    mask, masked = tensors.get(_TENSORS[3]), len(tensors) == len(_TENSORS)
    return AttentionCall(module, query, key, value, mask, kwargs, len(args), masked, function)


def read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    scale: float,
    ends: Tensor | None = None,
    mask: Tensor | None = None,
) -> AttentionCall:
    """What is looked at of the attention of another library, which has no call of this kind."""
    return AttentionCall(module, query, key, key, mask, {_SCALE: scale, _ENDS: ends})


def implementation(module: Any) -> str:
    """The name of the attention function that a module's config asks for."""
    return module.config._attn_implementation or ""


def attention_of(layer: nn.Module) -> Any:
    """The one module of a layer whose code calls Transformers' attention registry.

    Raises:
        LookupError: there is none.
    """
    for module in layer.modules():
        cls = parallel.class_of(module)
        source = sys.modules.get(cls.__module__)
        if not hasattr(source, REGISTRY) or not hasattr(module, "config"):
            continue
        # Llama 4's vision attention does not say whether it is causal, but names the registry.
        if hasattr(module, _CAUSAL) or REGISTRY in names_in(cls):
            return module
    raise LookupError(f"{type(layer).__name__} has no attention that can be tapped")


def sinks_of(module: nn.Module) -> bool:
    """Whether an attention module has sinks, which take a share of each row's attention."""
    return any(getattr(module, name, None) is not None for name in _SINKS)


def attentions_in(layer: nn.Module) -> int:
    """How many modules of a layer call Transformers' attention registry."""
    found = 0
    for module in layer.modules():
        source = sys.modules.get(parallel.class_of(module).__module__)
        found += (
            hasattr(source, REGISTRY) and hasattr(module, "config") and hasattr(module, _CAUSAL)
        )
    return found


def names_in(cls: type) -> tuple[str, ...]:
    """Names that the code of a class's own forward uses."""
    forward = vars(cls).get("forward")
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return getattr(code, "co_names", ())
