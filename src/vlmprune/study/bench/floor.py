"""The floor of a measurement: the same model, given a natively short prompt.

What pruning could reach at best if choosing cost nothing. `bench` times it beside the methods.

It is defined so:

- *The encoder's work is the same*: the host's own method encodes the same pixels, whole.
- *The prompt is short from the start*: of each picture's placeholders the first n are in it, and
  the host is handed the first n rows of the features that its own method returned. Which ones they
  are changes no time. Positions, mask and cache are what the host makes of a prompt of that length;
  a model with three positions a column is told that the picture is n cells wide and one high.
- *Nothing is chosen and nothing is attached*: no tap, no hook, no shortening at call time. The one
  thing that is shadowed is the encoding method, to slice its output.
- *n* is, for prefill, the number of the picture's visual tokens that the language model sees: what
  a method keeps that prunes before it, the mean over the layers of one that drops tokens on the way
  through them, all of them for one that cuts the cache alone. For decoding it is the number whose
  keys and values take as many bytes as a step reads under the method: what it leaves where it cuts
  the cache, and where it reads one in part what its steps read, sketches included. Both are rounded
  to whole tokens, at least one a picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, families, outputs, processed
from vlmprune.hosts.families.media import Medium
from vlmprune.hosts.release import by_name
from vlmprune.hosts.requests import base_of
from vlmprune.report import Report
from vlmprune.runtime.call.shorten import ALIGNED, Prompt, dropped_columns, shorten
from vlmprune.runtime.encoder.pruned import Pruned
from vlmprune.runtime.family import family_of
from vlmprune.runtime.geometry import spans
from vlmprune.views.layout import Layout

_ABSENT = object()


@dataclass(frozen=True)
class Floor:
    """A short request, and what makes the host's encoder fit it.

    Attributes:
        inputs: of the short prompt, with the pixels of the full one.
        counts: visual tokens of each picture, in prompt order.
        rows: pictures of each row of the batch.
        medium: the family's pictures.
        layouts: where each picture's visual tokens lie, all of them.
        encoded: inputs that the encoder gets in place of the short prompt's.
    """

    inputs: dict[str, Any]
    counts: tuple[int, ...]
    rows: tuple[int, ...]
    medium: Medium = field(repr=False)
    layouts: list[Layout] = field(repr=False)
    encoded: dict[str, Any] = field(repr=False)

    @property
    def visual_tokens(self) -> int:
        """Of all rows together."""
        return sum(self.counts)

    @property
    def row_tokens(self) -> list[int]:
        """Visual tokens of each row."""
        left = iter(self.counts)
        return [sum(next(left) for _ in range(pictures)) for pictures in self.rows]

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Let the model's encoder return the first features of each picture."""
        place, name = base_of(model), self.medium.method
        before, original = vars(place).get(name, _ABSENT), getattr(place, name)

        # `wraps` keeps the signature, which Transformers inspects.
        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            given = by_name(original, *args, **kwargs)
            given |= {key: value for key, value in self.encoded.items() if key in given}
            return self._cut(original(**given | {"return_dict": True}))

        vars(place)[name] = features
        try:
            yield
        finally:
            if before is _ABSENT:
                vars(place).pop(name, None)
            else:
                vars(place)[name] = before

    def _cut(self, output: Any) -> Any:
        deep = outputs.deep_of(output) or [None]
        return Pruned(
            self.medium,
            output,
            self._first(self.medium.split(output, self.layouts)),
            [self._first(layer) for layer in self.medium.extra(output, self.layouts)],
            list(self.rows),
            flat=isinstance(deep[0], Tensor),
        ).formed(1)

    def _first(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [one[:n] for one, n in zip(features, self.counts, strict=True)]


def counts_of(report: Report) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many visual tokens of each picture the floors of a pruned call have.

    Returns:
        For prefill and for decoding one number a picture, in prompt order, as the module says.
    """
    kept = [len(one) for one in report.kept]
    # The report's bytes are of whichever type the cache has; shares of them are the same in each.
    each = report.kv_bytes_before / max(1, report.visual_tokens_before)
    read = report.kv_bytes_read / each if each else float(sum(kept))
    if not (report.layers or report.reading) or math.isnan(read):
        # All that was kept is held by all layers, or nobody can tell.
        read = float(sum(kept))

    def shared(parts: list[int]) -> tuple[int, ...]:
        share = read / max(1, sum(parts))
        return tuple(min(n, max(1, round(share * n))) for n in parts)

    if report.reading is None and read > sum(kept) + 1e-6:
        # Fewer reached the last layer than the layers before it hold.
        mean = shared([len(one.labels) for one in report.layouts])
        return mean, mean
    return tuple(max(1, n) for n in kept), shared([max(1, n) for n in kept])


def floor_of(model: Any, inputs: Mapping[str, Any], counts: Sequence[int]) -> Floor:
    """The short request that has so many visual tokens a picture.

    Args:
        model: the host, in eval mode.
        inputs: the full request, with `input_ids` [B, L].
        counts: visual tokens of each picture in prompt order, each 1 or more.

    Raises:
        VlmpruneError: the request holds videos, the family's positions cannot be made for a
            prompt of another length, or the counts do not fit.
    """
    model = families.unwrapped(model)
    family = family_of(model)
    medium = next(one for one in family.media if one.kind == "image")
    others = [one for one in family.media if one is not medium]
    if any(inputs.get(one.inputs[0]) is not None for one in others):
        raise VlmpruneError("the floor is defined for images alone, and this request holds videos.")
    if family.rope is not None and not medium.resizable:
        raise VlmpruneError(f"{family.name} has no floor: its positions follow from the pixels.")
    ids, mask = processed.ids_of(inputs), processed.mask_of(inputs)
    visual = (ids == config.placeholder(model.config, medium.token)) & (mask != 0)
    given = processed.present(inputs, medium.inputs)
    layouts = medium.layouts(model, given, visual)
    lengths = [len(one.labels) for one in layouts]
    if len(counts) != len(lengths) or any(
        not 1 <= n <= whole for n, whole in zip(counts, lengths, strict=False)
    ):
        raise VlmpruneError(
            f"counts={tuple(counts)} do not fit pictures of {lengths} visual tokens; give one "
            "number for each, from 1 to what it has."
        )
    places = spans(visual, lengths, medium.kind)
    kept = [torch.arange(whole) < n for n, whole in zip(counts, lengths, strict=True)]
    dropped = dropped_columns(ids, places, kept)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    aligned = processed.present(inputs, ALIGNED)
    pad = config.pad_id(model.config)
    short, _ = shorten(Prompt(ids, mask, positions, aligned), dropped, "compact", pad)
    placed = medium.resized(model, inputs, counts)
    made = {**processed.with_prompt(inputs, short.ids, short.mask), **short.aligned, **placed}
    encoded = processed.present(inputs, placed)
    rows = [0] * len(ids)
    for place in places:
        rows[place.row] += 1
    return Floor(made, tuple(counts), tuple(rows), medium, layouts, encoded)
