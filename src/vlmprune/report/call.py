"""What the last call kept and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmprune import costs
from vlmprune.costs import units
from vlmprune.report.layers import LayerReport, RowsReport
from vlmprune.report.per_image import by_row, joined, of_no_patch, on_host
from vlmprune.report.reading import Reading
from vlmprune.views.layout import Layout

LEFT = "left before layer "
"""The role of tokens that were dropped between decoder layers, with the layer's number behind."""


@dataclass(frozen=True)
class Report:
    """One call's figures. `print(report)` is for people, `report.json()` for programs.

    FLOPs and bytes that the model's config does not tell are `vlmprune.costs.UNKNOWN`, which is
    `math.nan`; print says "unknown" then, and JSON null.

    Attributes:
        method: the pruner, with its settings.
        positions: the position policy that "auto" came to, or that was asked for.
        score: where the attention scores came from.
        kept: for each image (or video) in prompt order, ascending indices [k] int64 among the
            visual tokens that the language model would have seen.
        visual_tokens_before: visual tokens of all images, newline tokens included.
        visual_tokens_after: those that the language model saw; where a method drops tokens inside
            it, those that reached the last layer.
        newline_tokens: how many of `visual_tokens_after` belong to no patch: newline tokens, or
            CLS tokens that the host passes on.
        flops_before: prefill FLOPs of the vision tower and of the decoder layers on the visual
            tokens, by the published formula (`vlmprune.costs`), summed over the rows.
        flops_after: the same for what was kept. Selection is timed, not counted.
        kv_bytes_before: bytes that the visual tokens' keys and values would have taken.
        kv_bytes_after: bytes that they take; of a cache that is read in part those on the device of
            the computation, sketches included.
        seconds_selecting: time that choosing took, without the encoder.
        layouts: for each image, where its visual tokens lie.
        roles: for each image, by name, a bool [n] over its visual tokens ("important", …).
        layers: what each decoder layer's cache kept, where a method cut it (`LayerReport`); or
            which visual tokens reached each layer that not all did (`RowsReport`).
        members: for each image [n] int64, the kept visual token that each of its visual tokens
            went into (a kept one: itself), -1 where it went into none; empty where nothing is
            merged.
        decoder_flops_before: of `flops_before` those of the decoder layers.
        decoder_flops_after: of `flops_after` likewise.
        reading: what a cache that is read in part holds, and what its steps read; None for others.
        newline_tokens_before: how many of `visual_tokens_before` belong to no patch.
        below_keep: by what the budget counts for ("crop", "image", "frame" or "clip"), how many had
            fewer visual tokens than an int `keep`, and so kept all.
        kv_bytes_by_layer: of `kv_bytes_after` those of each decoder layer, before any cache was
            cut; empty where their number is unknown.
    """

    method: str
    positions: str
    score: str
    kept: list[Tensor]
    visual_tokens_before: int
    visual_tokens_after: int
    newline_tokens: int
    flops_before: float
    flops_after: float
    kv_bytes_before: float
    kv_bytes_after: float
    seconds_selecting: float
    layouts: list[Layout] = field(repr=False, default_factory=list)
    roles: list[dict[str, Tensor]] = field(repr=False, default_factory=list)
    layers: Sequence[LayerReport | RowsReport] = field(repr=False, default_factory=list)
    members: list[Tensor] = field(repr=False, default_factory=list)
    decoder_flops_before: float = 0.0
    decoder_flops_after: float = 0.0
    reading: Reading | None = field(repr=False, default=None)
    newline_tokens_before: int = 0
    below_keep: Mapping[str, int] = field(repr=False, default_factory=dict)
    kv_bytes_by_layer: Sequence[float] = field(repr=False, default=())

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold; `kept` as lists, None for what is unknown."""
        names = (
            "method positions score visual_tokens_before visual_tokens_after "
            "newline_tokens_before newline_tokens flops_before flops_after decoder_flops_before "
            "decoder_flops_after kv_bytes_before kv_bytes_after seconds_selecting"
        )
        out: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        out["below_keep"] = dict(self.below_keep)
        out["kept"] = [indices.tolist() for indices in self.kept]
        out["members"] = [into.tolist() for into in self.members]
        out["layers"] = [layer.as_dict() for layer in self.layers]
        if self.reading is not None:
            out |= {"kv_bytes_read": self.kv_bytes_read, "reading": self.reading.as_dict()}
        found: dict[str, Any] = units.ready(out)
        return found

    def with_layers(
        self, layers: list[LayerReport], seconds: float, numbers: list[Tensor]
    ) -> Report:
        """The same call after its prompt's cache was cut.

        Args:
            layers: those that a method was asked about.
            seconds: time that the cuts took.
            numbers: as in `LayerReport`.
        """
        cut = {layer.index for layer in layers}
        whole = costs.UNKNOWN
        if self.kv_bytes_by_layer:
            sizes = enumerate(self.kv_bytes_by_layer)
            whole = sum(size for index, size in sizes if index not in cut)
        return replace(
            self,
            layers=[replace(layer, numbers=numbers) for layer in layers],
            flops_after=self.flops_after - sum(layer.flops_saved for layer in layers),
            decoder_flops_after=self.decoder_flops_after
            - sum(layer.flops_saved for layer in layers),
            kv_bytes_after=whole + sum(layer.kv_bytes for layer in layers),
            seconds_selecting=self.seconds_selecting + seconds,
        )

    def with_reading(self, reading: Reading, seconds: float) -> Report:
        """The same call after its prompt was put away to be read in part.

        Args:
            reading: what is held, and what the steps to come read.
            seconds: time that it took.
        """
        # Of several turns the cache holds all, and the report is of this one.
        more = round(reading.own * (reading.device_bytes - reading.dense_bytes))
        return replace(
            self,
            reading=reading,
            kv_bytes_after=self.kv_bytes_after + more,
            seconds_selecting=self.seconds_selecting + seconds,
        )

    @property
    def kv_bytes_read(self) -> float:
        """Bytes for visual tokens that a decode step reads: all that are held, if not in part.

        Of a cache that is read in part the mean over the steps so far; before any, all.
        """
        reading = self.reading
        if reading is None:
            return self.kv_bytes_after
        share = reading.share_read
        read = reading.dense_bytes * (1.0 if share is None else share)
        return self.kv_bytes_after + round(reading.own * (read - reading.device_bytes))

    @property
    def cut(self) -> list[LayerReport]:
        """The decoder layers whose cache a method cut."""
        return [layer for layer in self.layers if isinstance(layer, LayerReport)]

    def with_rows(
        self,
        config: Any,
        depth: int,
        stages: dict[int, list[Tensor]],
        rows: list[int],
        dtype: torch.dtype,
        positions: str,
        seconds: float,
        members: Sequence[Tensor] = (),
        back: bool = False,
    ) -> Report:
        """The same call after visual tokens left between decoder layers, or skipped some.

        Args:
            config: the host's config.
            depth: decoder layers.
            stages: by layer before which tokens went, for each image a [n] bool over its visual
                tokens, those that the layer worked on.
            rows: images of each row of the batch.
            dtype: of the KV cache.
            positions: the policy used.
            seconds: time that choosing took.
            members: for each image where its tokens went meanwhile; none where nothing was merged.
            back: whether tokens that went are back behind that layer.
        """
        whole = reached = self._seen()
        passed, roles = list[list[Tensor]](), [dict[str, Tensor]() for _ in whole]
        for index in range(depth):
            now = stages.get(index, reached)
            if index in stages and not back:
                for role, stays, goes in zip(roles, reached, now, strict=True):
                    role[f"{LEFT}{index}"] = stays & ~goes
            passed.append(now)
            reached = whole if back else now
        if back and stages:
            # For pictures, where no stage before has its own: what any such layer worked on.
            ever = [torch.stack(each).any(dim=0) for each in zip(*stages.values(), strict=True)]
            roles = [
                {} if old else {"important": m} for old, m in zip(self.roles, ever, strict=True)
            ]
        left = [
            {name: mask & goes for name, mask in old.items()} | new
            for old, new, goes in zip(self.roles, roles, reached, strict=True)
        ]
        made = self._decoded(config, passed, rows, dtype)
        kept = [mask.nonzero()[:, 0] for mask in reached]
        return replace(
            made,
            kept=kept,
            visual_tokens_after=sum(map(len, kept)),
            newline_tokens=of_no_patch(self.layouts, reached),
            positions=positions,
            seconds_selecting=self.seconds_selecting + seconds,
            roles=left,
            layers=made.layers if back else made.layers[min(stages) :],
            members=joined(self.members, members, reached),
        )

    def _seen(self) -> list[Tensor]:
        """For each image [n] bool over its visual tokens, those that the language model gets."""
        none = [torch.zeros(len(one.labels), dtype=torch.bool) for one in self.layouts]
        return [mask.index_fill(0, at, True) for mask, at in zip(none, self.kept, strict=True)]

    def _decoded(
        self, config: Any, reached: Sequence[list[Tensor]], rows: list[int], dtype: torch.dtype
    ) -> Report:
        """The same call, if for each layer, for each image a [n] bool, these `reached` it."""
        kept = [[mask.nonzero()[:, 0] for mask in masks] for masks in reached]
        spent = costs.layered(config, [by_row(rows, map(len, one)) for one in kept], dtype.itemsize)
        layers = [
            RowsReport(index, numbers, size)
            for index, (numbers, size) in enumerate(zip(kept, spent.kv_bytes_by_layer, strict=True))
        ]
        return replace(
            self,
            flops_after=self.flops_after - self.decoder_flops_after + spent.flops,
            decoder_flops_after=spent.flops,
            kv_bytes_after=spent.kv_bytes,
            kv_bytes_by_layer=spent.kv_bytes_by_layer,
            layers=layers,
        )

    def json(self, indent: int | None = None) -> str:
        """The report as JSON."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        if not self.kept:
            return f"{self.method}: no image in this call, nothing pruned"
        cut = ""
        if self.cut:
            gammas = [g for layer in self.cut for g in layer.gamma if g is not None]
            span = f"{min(gammas):.2f} to {max(gammas):.2f}"
            cut = f", {len(self.cut)} layers cut (vision attention {span})"
        rows = [sum(map(len, one.kept)) for one in self.layers if isinstance(one, RowsReport)]
        fewer = [n for n in rows if n < self.visual_tokens_after]
        if fewer:
            cut = f", {len(fewer)} of {len(rows)} layers on {fewer[0]} of them"
        if self.reading is not None:
            cut = f", {self.reading}"
        cut += f", {self.below_words}" if self.below_keep else ""
        score = f", {self.score}" if self.score else ""
        videos = sum(one.kind == "video" for one in self.layouts)
        counts = {"image": len(self.kept) - videos, "video": videos}
        items = " and ".join(f"{n} {kind}(s)" for kind, n in counts.items() if n)
        return (
            f"{self.method}: {self.visual_tokens_before} → {self.visual_tokens_after} visual "
            f"tokens in {items}, {self._flops_words()}, KV {units.mib(self.kv_bytes_before)} → "
            f"{units.mib(self.kv_bytes_after)} MiB{cut}, {self.positions} positions{score}, "
            f"selected in {1000 * self.seconds_selecting:.1f} ms"
        )

    @property
    def below_words(self) -> str:
        """What `below_keep` tells, in words; empty where there is nothing to tell."""
        counts = " and ".join(f"{n} {unit}(s)" for unit, n in self.below_keep.items())
        return f"{counts} with fewer than keep, which keep all" if counts else ""

    def _flops_words(self) -> str:
        """FLOPs before and after; those of the decoder where the vision tower's are unknown."""
        before, after, where = self.flops_before, self.flops_after, ""
        if math.isnan(before) and not math.isnan(self.decoder_flops_before):
            before, after = self.decoder_flops_before, self.decoder_flops_after
            where = " in the language model"
        return f"{units.flops(before).rstrip()} → {units.flops(after)}FLOPs{where}"


def make(
    config: Any,
    method: str,
    positions: str,
    score: str,
    layouts: list[Layout],
    kept: list[Tensor],
    roles: list[dict[str, Tensor]],
    rows: list[int],
    patches: list[int] | None,
    dtype: torch.dtype,
    seconds: float,
    members: list[Tensor] | None = None,
    tower: float | None = None,
    below_keep: Mapping[str, int] | None = None,
    layers: costs.Layers | None = None,
) -> Report:
    """Work out the figures of one call.

    Args:
        config: the host's config.
        method: the pruner, with its settings.
        positions: the policy used.
        score: where the scores came from.
        layouts: one an image.
        kept: for each image a [n] bool.
        roles: for each image, bools by name.
        rows: images of each row of the batch.
        patches: patches of each crop that the vision tower encoded; None where that is unknown.
        dtype: of the KV cache.
        seconds: time spent selecting.
        members: for each image where its visual tokens went; None where nothing is merged.
        tower: FLOPs of the vision tower where a method acted inside it; None for the usual ones.
        below_keep: as in `Report`; None for none.
        layers: the sizes of the decoder's layers, where they are known; None to read them of the
            config, which takes longer than all the rest.
    """
    before = by_row(rows, map(len, kept))
    kept = on_host(kept)
    numbers = [mask.nonzero()[:, 0] for mask in kept]
    after = by_row(rows, map(len, numbers))
    # Images of a request often share a layout.
    newlines = {id(one): one.newlines for one in {id(one): one for one in layouts}.values()}
    encoder = costs.UNKNOWN if layouts else 0.0
    if patches is not None:
        encoder = sum(
            costs.encoder_flops(config, patches.count(size), patches=size) for size in set(patches)
        )
    size = dtype.itemsize
    whole, left = (
        costs.spent(config, each, size) if layers is None else costs.spent_of(layers, each, size)
        for each in (before, after)
    )
    return Report(
        method=method,
        positions=positions,
        score=score,
        kept=numbers,
        visual_tokens_before=sum(before),
        visual_tokens_after=sum(after),
        newline_tokens=of_no_patch(layouts, kept) if any(newlines.values()) else 0,
        flops_before=encoder + whole.flops,
        flops_after=(encoder if tower is None else tower) + left.flops,
        kv_bytes_before=whole.kv_bytes,
        kv_bytes_after=left.kv_bytes,
        seconds_selecting=seconds,
        layouts=layouts,
        roles=roles,
        members=members or [],
        decoder_flops_before=whole.flops,
        decoder_flops_after=left.flops,
        newline_tokens_before=sum(newlines[id(one)] for one in layouts),
        below_keep=below_keep or {},
        kv_bytes_by_layer=left.kv_bytes_by_layer,
    )
