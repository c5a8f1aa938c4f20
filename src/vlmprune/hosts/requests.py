"""Calls of a host's `forward` and `generate`: their arguments and settings, read and replaced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import caches, config, release

# The methods that are shadowed while a pruner is attached.
GENERATE, FORWARD = "generate", "forward"

IDS, MASK, TYPES = "input_ids", "attention_mask", "mm_token_type_ids"
_PROMPT, _POSITIONS, _EMBEDS = "inputs", "position_ids", "inputs_embeds"
_AHEAD, _STREAMER, _CONFIG = "mm_encoder_outputs", "streamer", "generation_config"
_CACHING, _LOGITS, _STATES = "use_cache", "logits_to_keep", "output_hidden_states"
_ATTENTIONS = "output_attentions"
# The argument that is ours: images and videos that were encoded before.
_VISION = "vision"

# Inputs that have one entry a column, and what a column of padding holds in them.
LABELS = "labels"
# Labels that were moved to the column that predicts them.
SHIFTED = "shift_labels"
ALIGNED: Mapping[str, int] = {"token_type_ids": 0, TYPES: 0, LABELS: -100, SHIFTED: -100}
# What a collator that packs samples adds for kernels: where samples end in the flattened batch, the
# longest one's columns, and the number of each column's sample in its row.
_ENDS, _LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
_SAMPLES = "seq_idx"


@dataclass(frozen=True)
class ModelCall:
    """One call of a model, its arguments by name.

    Attributes:
        model: the host.
        given: all arguments by the host's names; also what media read their own inputs from.
    """

    model: Any
    given: Mapping[str, Any]

    @property
    def prompt(self) -> Tensor | None:
        """[B, L] ids of a `generate`, under either name."""
        found = self.given.get(_PROMPT)
        return self.ids if found is None else found

    @property
    def ids(self) -> Tensor | None:
        """[B, L] token ids."""
        return self.given.get(IDS)

    @property
    def mask(self) -> Tensor | None:
        """[B, L], 0 where a column is padding; None where none was given."""
        return self.given.get(MASK)

    @property
    def masks_columns(self) -> bool:
        """Whether the mask is a plain [B, L] one; `generate` makes others for a static cache."""
        return isinstance(self.mask, Tensor) and self.mask.ndim == 2

    @property
    def positions(self) -> Tensor | None:
        """Positions of the columns; None where none were given."""
        return self.given.get(_POSITIONS)

    @property
    def embeds(self) -> Tensor | None:
        """[B, L, D] embedded columns, which say nothing of placeholders."""
        return self.given.get(_EMBEDS)

    @property
    def labels(self) -> Tensor | None:
        """[B, L] of a training step."""
        return self.given.get(LABELS)

    @property
    def cache(self) -> Any:
        """The KV cache to continue; None without one."""
        return release.cache_given(type(self.model), self.given)

    @property
    def encoded(self) -> Mapping[str, Any]:
        """Encoder outputs that come along, by kind of medium."""
        return self.given.get(_AHEAD) or {}

    @property
    def streamer(self) -> Any:
        """What is shown tokens as they come, or None."""
        return self.given.get(_STREAMER)

    @property
    def picks(self) -> int | Tensor | None:
        """The columns whose logits are wanted: the last ones by number, or [n]; None for all."""
        found: int | Tensor | None = self.given.get(_LOGITS)
        return found if isinstance(found, Tensor) else found or None

    @property
    def caches(self) -> bool:
        """Whether a plain forward is to fill a cache, by its argument or the model's config."""
        wanted = self.given.get(_CACHING)
        return config.caches(self.model.config) if wanted is None else bool(wanted)

    @property
    def states_wanted(self) -> bool:
        """Whether the states behind every layer are asked for."""
        wanted = self.given.get(_STATES)
        return config.returns_states(self.model.config) if wanted is None else bool(wanted)

    def brings(self, name: str) -> bool:
        """Whether an input of a medium comes along, by the name that its record gives."""
        return self.given.get(name) is not None

    @property
    def packing(self) -> list[str]:
        """Names of the inputs that come along and say where packed samples lie."""
        names = (*_ENDS, *_LONGEST, _SAMPLES)
        return [name for name in names if self.given.get(name) is not None]

    def check_packing(self, lengths: Sequence[int], samples: Tensor) -> None:
        """Refuse inputs that say of packed samples something else than their positions.

        Args:
            lengths: columns of each sample, row by row.
            samples: [B, L] number of each column's sample in its row.

        Raises:
            VlmpruneError: one does.
        """
        right = self.with_packing(lengths, samples).given
        for name in self.packing:
            given = self.given[name]
            longest = name in _LONGEST
            found, due = torch.as_tensor(given), torch.as_tensor(right[name])
            # A kernel may be told of more columns than any sample has.
            if bool((found < due).any()) if longest else not torch.equal(found.long(), due.long()):
                raise VlmpruneError(
                    f"{name} says of packed samples something else than position_ids; pass both "
                    "as one collator made them."
                )

    def with_packing(self, lengths: Sequence[int], samples: Tensor) -> ModelCall:
        """The call with those of these inputs that it has, made anew; like `check_packing`."""
        made: dict[str, Any] = {}
        for name in self.packing:
            given = self.given[name]
            if name in _ENDS:
                made[name] = torch.tensor([0, *lengths]).cumsum(dim=0).to(given)
            elif name == _SAMPLES:
                made[name] = samples.to(given)
            else:
                most = max(lengths)
                made[name] = torch.full_like(given, most) if isinstance(given, Tensor) else most
        return self.also(made)

    def with_(self, **changed: Any) -> ModelCall:
        """The call with other arguments, by what they are: ids, mask, positions and so on."""
        names = {"ids": IDS, "mask": MASK, "positions": _POSITIONS, "streamer": _STREAMER}
        names["picks"] = _LOGITS
        return self.also({names[what]: one for what, one in changed.items()})

    def with_cache(self, cache: Any) -> ModelCall:
        """The call with another KV cache."""
        return ModelCall(self.model, release.with_cache(type(self.model), self.given, cache))

    def with_encoded(self, outputs: Mapping[str, Any]) -> ModelCall:
        """The call with other encoder outputs of some kinds of medium."""
        return self.also({_AHEAD: {**self.encoded, **outputs}})

    def with_prompt(self, ids: Tensor) -> ModelCall:
        """The call of a `generate` with other ids, under each name under which they came."""
        twice = self.given.get(_PROMPT) is not None and self.ids is not None
        return self.without((IDS,)).also({_PROMPT: ids} | ({IDS: ids} if twice else {}))

    def renamed(self, former: Mapping[str, str]) -> ModelCall:
        """The call with arguments under the names that the host has for former ones.

        Args:
            former: the host's name by the former one. Where both came, the host's own counts.
        """
        moved = {
            new: self.given[name]
            for name, new in former.items()
            if self.brings(name) and not self.brings(new)
        }
        return self.without(former).also(moved)

    def without(self, names: Iterable[str]) -> ModelCall:
        """The call without some arguments, by the host's names."""
        gone = set(names)
        return ModelCall(self.model, {k: v for k, v in self.given.items() if k not in gone})

    def also(self, more: Mapping[str, Any]) -> ModelCall:
        """The call with further arguments, by the host's names."""
        return ModelCall(self.model, {**self.given, **more})

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a method of the host makes of it."""
        return function(*args, **self.given)


def model_call(
    model: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ModelCall, Any]:
    """Take a call of a method of the host apart; returns it without the argument that is ours.

    Returns:
        The call, and what came as `vision`; None for nothing.

    Raises:
        TypeError: the method does not take them.
    """
    ours = kwargs.get(_VISION)
    rest = {name: one for name, one in kwargs.items() if name != _VISION}
    return ModelCall(model, release.by_name(function, *args, **rest)), ours


def aligned_of(call: ModelCall, columns: int, whole: int) -> dict[str, Tensor]:
    """Inputs that have one entry a column, those of the new columns, by the host's names.

    Args:
        call: the call.
        columns: new ones.
        whole: all columns, those of a cache included.

    Raises:
        VlmpruneError: one has another number of columns.
    """
    found = {name: call.given.get(name) for name in ALIGNED}
    out = {}
    for name, values in found.items():
        if not isinstance(values, Tensor):
            continue
        if values.shape[-1] not in (columns, whole):
            due = f"{columns}" if columns == whole else f"{columns} or {whole}"
            raise VlmpruneError(f"{name} has {values.shape[-1]} columns where {due} are due.")
        out[name] = values[:, -columns:]
    return out


class Settings:
    """Settings of a call of `generate`, looked up as it does.

    An argument goes before the given generation config, and that before the model's.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call = call

    def __getitem__(self, name: str) -> Any:
        given = self.call.given
        for source in (given.get(name), getattr(given.get(_CONFIG), name, None)):
            if source is not None:
                return source
        return getattr(self.call.model.generation_config, name, None)

    @property
    def assisted(self) -> bool:
        """Whether another model, or another way, proposes tokens."""
        return any(self[name] for name in ASSISTING) or self.call.given.get(ASSISTANT) is not None

    @property
    def chunked(self) -> bool:
        """Whether the prompt is read in parts."""
        return bool(self["prefill_chunk_size"])

    @property
    def caches(self) -> bool:
        """Whether a KV cache is used."""
        return self[_CACHING] is not False

    @property
    def cache_kind(self) -> str | None:
        """The kind of cache that is asked for by name, if it is no dynamic one."""
        kind = self["cache_implementation"]
        return None if kind in (None, "dynamic", "dynamic_full", "offloaded") else str(kind)

    @property
    def compiles(self) -> bool:
        """Whether `generate` is to compile its steps: of a cache that allows it, but on a GPU."""
        where = self.call.model.device.type != "cpu" or self["compile_config"] is not None
        cache = self.call.cache
        kind = cache is not None and caches.compileable(cache)
        return where and (kind or self.cache_kind is not None)

    @property
    def attentions(self) -> bool:
        """Whether attention weights are to be returned."""
        return bool(self[_ATTENTIONS]) or config.returns_attentions(self.call.model.config)

    @property
    def beams(self) -> int:
        """Beams of a beam search; 1 for none."""
        return self["num_beams"] or 1

    @property
    def pad(self) -> int | None:
        """Id of padding."""
        found = self["pad_token_id"]
        return found[0] if isinstance(found, list | tuple) else found

    @property
    def ends(self) -> list[Any]:
        """Ids of end tokens."""
        found = self["eos_token_id"]
        return list(found) if isinstance(found, list | tuple) else [found]

    def shorter(self, removed: int) -> dict[str, Any]:
        """Length limits that count the prompt, less the columns that went; by the host's names."""
        changed: dict[str, Any] = {}
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self[name]
            if not value or self[instead] is not None or removed == 0:
                continue
            own = changed.get(_CONFIG, self.call.given.get(_CONFIG))
            if self.call.given.get(name) is None and own is not None:
                changed[_CONFIG] = own = copy.deepcopy(own)
                setattr(own, name, max(0, value - removed))
            else:
                changed[name] = max(0, value - removed)
        return changed


ASSISTANT = "assistant_model"
# Settings by which a call proposes tokens in another way than one by one.
ASSISTING = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class PlainSettings(Settings):
    """Settings of a plain forward, which has them as arguments alone."""

    def __getitem__(self, name: str) -> Any:
        return self.call.caches if name == _CACHING else self.call.given.get(name)


def unknown_of(call: ModelCall) -> list[str]:
    """Names of tensors, alone or in lists, that nothing here knows: what images may come as."""
    own = {IDS, _PROMPT, MASK, _POSITIONS, _EMBEDS, *ALIGNED}
    lists = {name: one for name, one in call.given.items() if isinstance(one, list) and one}
    first = {**call.given, **{name: one[0] for name, one in lists.items()}}
    return [n for n, one in first.items() if n not in own and isinstance(one, Tensor)]


def base_of(model: Any) -> Any:
    """The model below the language-model head, which encodes images."""
    return model.base_model


def encodes_ahead(model: Any) -> bool:
    """Whether the host's forward takes encoder outputs, which `generate` makes before it."""
    return _AHEAD in inspect.signature(type(model).forward).parameters


def check_model(model: Any, pixels: Iterable[str], positions: bool = True) -> None:
    """Refuse a class whose calls do not take what they are given, from its signature alone.

    Args:
        model: the host.
        pixels: what it calls the pixels of each medium.
        positions: whether it is handed positions.

    Raises:
        VlmpruneError: one sentence says what is missing.
    """
    cls = type(model)
    release.cache_name(cls)
    takes = inspect.signature(cls.forward).parameters
    handed = (IDS, MASK, *((_POSITIONS,) if positions else ()), *pixels)
    missing = [name for name in handed if name not in takes]
    missing += [name for name in (GENERATE, "base_model", "get_decoder") if not hasattr(cls, name)]
    if missing:
        raise VlmpruneError(
            f"{cls.__name__} of transformers {release.version()} has no {missing[0]}, which "
            f"vlmprune hands it; install transformers{release.TESTED}, or tell vlmprune's "
            "developers."
        )
