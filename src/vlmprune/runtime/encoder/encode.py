"""Encode a request's images and videos once, and record on the way what a method needs.

The host's own methods do the work, with their own fast attention; a tap reads the attention, a
hook on the projector reads the features that the model selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.hosts.encoders import encoder_call, first_of
from vlmprune.hosts.families.media import Encoder, Medium
from vlmprune.runtime.attention.taps import (
    JoinedTap,
    KeyTap,
    PatchTap,
    Tap,
    passing,
    pooling,
    tapped,
)
from vlmprune.runtime.encoder import proof, semantic_tokens
from vlmprune.runtime.encoder.acting import acting
from vlmprune.runtime.encoder.merging import per_cell
from vlmprune.runtime.encoder.proof import Encoding
from vlmprune.runtime.encoder.reads import also, blank, check_calls
from vlmprune.runtime.geometry import Geometry, wide
from vlmprune.runtime.hooks import Hooks
from vlmprune.runtime.scope import outside
from vlmprune.views import EncoderView, Inside, Reads
from vlmprune.views.layout import Layout
from vlmprune.views.settings import Score


@dataclass(frozen=True)
class Encoded:
    """Encoder output of a request, with the view that methods choose from.

    Attributes:
        outputs: by modality, what the host's own method returned.
        view: of every crop; attention, features and projected features detached.
        score: where the attention came from, in words.
        cells: [crops, N, C] features before the projector, with gradients.
        acts: for each modality what the method did while its tower ran; None for nothing.
        entered: what enters the language model of the whole request, where placeholders alone are
            known (`entered.Entered`); None elsewhere.
    """

    outputs: dict[int, Any]
    view: EncoderView
    score: str
    cells: Tensor
    acts: Sequence[Inside | None] = ()
    entered: Any = None


@dataclass
class TowerReads:
    """What was seen of one call of the host's own method, call by call of the tower.

    Attributes:
        output: what it returned.
        words: where the attention came from.
        attention: each [B, L].
        features: what the projector was given.
        layers: by encoder layer, as `attention`.
        patches: each [B, L, 2], received and given.
        keys: each [B, L, D].
        states: by encoder layer, each [B, L, C].
        shared: crop by crop, as in `EncoderView`.
        semantic: each [B, M, C].
        joined: each [B, L, 1 + H · D], as `JoinedTap` records it.
    """

    output: Any
    words: str
    attention: list[Tensor]
    features: list[Tensor]
    layers: dict[int, list[Tensor]] = field(default_factory=dict)
    patches: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    shared: list[Tensor] = field(default_factory=list)
    semantic: list[Tensor] = field(default_factory=list)
    joined: list[Tensor] = field(default_factory=list)


def encode(
    model: nn.Module,
    media: Sequence[Medium],
    originals: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Mapping[str, Any]],
    geometry: Geometry,
    score: Score = "auto",
    reads: Reads | None = None,
    who: str = "the method",
    acts: Sequence[Inside | None] = (),
    attends: bool = True,
    run: Callable[..., TowerReads] | None = None,
) -> Encoded:
    """Run the vision encoder once for each modality that the request brings.

    Args:
        model: the host.
        media: the family's modalities.
        originals: the host's own methods by name.
        inputs: for each modality the request's inputs.
        geometry: that of the items.
        score: which attention scores tokens: "auto", as the family says, or "pooling", that of
            the tower's pooling head.
        reads: what else the method looks at (`reads.wanted`); None for nothing.
        who: the method, for error sentences.
        acts: for each modality what happens while its tower runs; empty for nothing.
        attends: whether the method looks at the family's own score, which is told then.
        run: encodes one modality and says what was seen, for hosts other than Transformers'
            models; takes what `_run` takes.

    Raises:
        VlmpruneError: a tower has no pooling head that was asked for, makes another number of
            tokens than its patches account for, or cannot be read as asked.
    """
    outputs: dict[int, Any] = {}
    scores: dict[int, list[Tensor]] = {}
    features: dict[int, list[Tensor]] = {}
    shared: dict[int, list[Tensor]] = {}
    more: dict[str | int, dict[int, list[Tensor]]] = {}
    words: list[str] = []
    present = [bool(geometry.of(number)) for number in range(len(media))]
    reads = reads or Reads()
    beside: dict[int, list[Tensor]] = {}
    for number, medium in enumerate(media):
        if reads.semantic is not None and present[number]:
            layouts = [geometry.items[i].layout for i in geometry.of(number)]
            width = reads.semantic.shape[1]
            semantic_tokens.check(model, medium, inputs[number], layouts, width, who)
    for number, medium in enumerate(media):
        own = geometry.of(number)
        if not own:
            continue
        given = inputs[number]
        act = acts[number] if acts else None
        layouts = [geometry.items[i].layout for i in own]
        method = originals[medium.method]
        seen = (run or _run)(model, medium, method, given, score, reads, act, layouts)
        outputs[number] = seen.output
        rows, cells = medium.cells(model, given, layouts, seen.attention, seen.features)
        _deal(scores, own, layouts, rows)
        _deal(features, own, layouts, cells)
        few = [part[..., :1] for part in seen.features]
        if any(acts):
            every = [torch.arange(len(row), device=row.device) for row in rows]
            _deal(shared, own, layouts, seen.shared or every)
        streams: list[tuple[str | int, list[Tensor]]] = [*seen.layers.items()]
        streams += [("patches", seen.patches)] if seen.patches else []
        streams += [("keys", seen.keys)] if seen.keys else []
        streams += [("joined", seen.joined)] if seen.joined else []
        for name, calls in streams:
            check_calls(calls, seen.attention, name, who)
            rows = medium.cells(model, given, layouts, calls, few)[0]
            _deal(more.setdefault(name, {}), own, layouts, rows)
        for layer, calls in seen.states.items():
            check_calls(calls, seen.attention, layer, who)
            rows = medium.cells(model, given, layouts, calls, few)[0]
            _deal(more.setdefault(f"state {layer}", {}), own, layouts, rows)
        if reads.semantic is not None:
            _deal(beside, own, layouts, [crop for call in seen.semantic for crop in call])
        if reads.projected:
            tokens = medium.projected(model, seen.output, layouts)
            flat = [per_cell(one, t.detach()) for one, t in zip(layouts, tokens, strict=True)]
            grids = [
                f.view(one.crops, one.patches, -1) for one, f in zip(layouts, flat, strict=True)
            ]
            _deal(more.setdefault("projected", {}), own, layouts, [c for g in grids for c in g])
        told = [seen.words] if attends else []
        words += [one for one in told + also(reads) if one not in words]
    order, most = range(len(geometry.items)), geometry.cells
    stacked = torch.stack([_tall(crop, most) for i in order for crop in features[i]])
    attention = torch.stack([wide(row, most) for i in order for row in scores[i]])

    def all_of(name: str | int) -> Tensor | None:
        parts = more.get(name)
        if parts is None:
            return None
        rows = [row if row.ndim == 2 else row[:, None] for i in order for row in parts[i]]
        return torch.stack([_tall(row, most).to(attention.device) for row in rows])

    patches, joined = all_of("patches"), all_of("joined")
    layers = {layer: all_of(layer) for layer in reads.layers}
    states = {layer: all_of(f"state {layer}") for layer in reads.states}
    alike = [wide(row, most) for i in order for row in shared.get(i, [])]
    grouped = torch.stack(alike).to(attention.device) if alike else None
    there = geometry.candidates
    view = EncoderView(
        attention,
        stacked.detach(),
        there if grouped is None else there & (grouped >= 0).to(there.device),
        geometry.images,
        tuple(one.grid for one in geometry.layouts for _ in range(one.crops)),
        tuple(one.kind == "video" for one in geometry.layouts),
        {layer: rows[..., 0] for layer, rows in layers.items() if rows is not None},
        None if patches is None else patches[..., 0],
        None if patches is None else patches[..., 1],
        all_of("keys"),
        all_of("projected"),
        shared=grouped,
        states={layer: rows for layer, rows in states.items() if rows is not None},
        semantic=torch.stack([c for i in order for c in beside[i]]) if beside else None,
        joined=None if joined is None else joined[..., 0],
        joined_keys=None if joined is None else joined[..., 1:],
    )
    return Encoded(outputs, view, "; ".join(words), stacked, acts)


def encoded_again(
    originals: Mapping[str, Callable[..., Any]],
    medium: Medium,
    inputs: Mapping[str, Any],
    more: Mapping[str, Any],
) -> Any:
    """What the host's own method returns when it is asked for more than the first time.

    Args:
        originals: the host's own methods by name.
        medium: the modality.
        inputs: the request's inputs of it.
        more: arguments beside those of the first time.
    """
    call = encoder_call(originals[medium.method], inputs, medium.inputs, medium.host_only)
    with outside():
        return call.also(more).run()


def _deal(
    into: dict[int, list[Tensor]],
    own: Sequence[int],
    layouts: Sequence[Layout],
    crops: Sequence[Tensor],
) -> None:
    """Give each item its crops."""
    start = 0
    for i, layout in zip(own, layouts, strict=True):
        into[i] = list(crops[start : start + layout.crops])
        start += layout.crops


def _run(
    model: nn.Module,
    medium: Medium,
    method: Callable[..., Any],
    inputs: Mapping[str, Any],
    score: Score,
    reads: Reads,
    inside: Inside | None,
    layouts: Sequence[Layout],
    looked: frozenset[nn.Module] = frozenset(),
) -> TowerReads:
    """One call of the host's own method, and what was seen of it.

    `looked` has the layers whose attention is proved; empty for those that are read.
    """
    scored = None if medium.unattended else medium.scored(model, inputs)
    head = medium.pooling_head(model) if score == "pooling" else None
    if score == "pooling" and head is None:
        raise VlmpruneError(
            f"the vision tower of {type(model).__name__} has no pooling head whose attention could "
            "score tokens; use score='auto'."
        )
    tap = Tap("received" if scored is None else scored.rows)
    score_layer = None if scored is None or head is not None else scored.layer
    features: list[Tensor] = []
    call = encoder_call(method, inputs, medium.inputs, medium.host_only)
    tower, acts = medium.encoder(model, inputs), inside is not None and inside.acts
    looked = looked or _looked(tower, score_layer, reads, inside)
    proves = proof.due(model, medium, tower, looked, layouts)
    if proves and acts:
        # Of the tower as it is, in which no tokens merge.
        _run(model, medium, method, inputs, score, Reads(), None, layouts, looked)
        proves = False
    with Hooks() as hooks:
        hooks.enter_context(outside())
        run = hooks.enter_context(acting(model, medium, inputs, inside))
        if head is not None:
            hooks.enter_context(pooling(head, tap))
        elif score_layer is not None:
            hooks.enter_context(tapped(score_layer, tap))
        taps: dict[str | int, Tap] = {}
        states: dict[int, list[Tensor]] = {}
        if reads.layers or reads.states or any(n is not None for n in reads.single):
            for number in reads.states:
                states[number] = hooks.enter_context(passing(tower.layers[number]))
            for number in reads.layers:
                same = tower.layers[number] is score_layer and tap.rows == tower.rows
                taps[number] = tap if same else Tap(tower.rows)
                if taps[number] is not tap:
                    hooks.enter_context(tapped(tower.layers[number], taps[number]))
            if reads.patches is not None:
                taps["patches"] = PatchTap(tower.cls)
                hooks.enter_context(tapped(tower.layers[reads.patches], taps["patches"]))
            if reads.keys is not None:
                taps["keys"] = KeyTap()
                hooks.enter_context(tapped(tower.layers[reads.keys], taps["keys"]))
            if reads.joined is not None:
                taps["joined"] = JoinedTap(tower.rows)
                hooks.enter_context(tapped(tower.layers[reads.joined], taps["joined"]))
        left = {one: hooks.enter_context(passing(one)) for one in looked if proves}
        patches = None
        if reads.semantic is not None:
            patches = hooks.enter_context(semantic_tokens.recorded(tower))
            # Only what the method's own tokens go through is trained.
            hooks.enter_context(torch.no_grad())

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            features.append(first_of(args, kwargs))

        hooks.before(medium.projector(model), keep)
        output = call.run()
    _check_seen(model, tap, taps, features, bool(states) or scored is None)
    words = "" if scored is None else scored.words
    words = words if head is None else "attention of the tower's pooling head"
    attention = tap.rows_seen or blank(next(iter(states.values()), features))
    rows = {name: one.rows_seen for name, one in taps.items()}
    output = medium.completed(model, output)
    if proves and (tap.rows_seen or scored is None):
        again = Encoding(
            model,
            medium,
            tower,
            left,
            inputs,
            layouts,
            attention,
            features,
            output,
            call.run,
        )
        with outside():
            proof.check(again)
    if tap.rows_seen and contract.checks():
        medium.check_seen(model, inputs, layouts, tap.rows_seen)
    return TowerReads(
        output,
        run.words(words),
        run.per_patch(score_layer, attention),
        features,
        {layer: rows[layer] for layer in reads.layers},
        rows.get("patches", []),
        rows.get("keys", []),
        states,
        run.shared,
        [] if patches is None or reads.semantic is None else patches.run(reads.semantic),
        rows.get("joined", []),
    )


def _looked(
    tower: Encoder, scored: nn.Module | None, reads: Reads, inside: Inside | None
) -> frozenset[nn.Module]:
    """The encoder layers whose attention, or keys, a method acts by."""
    numbers = [*reads.layers, *(n for n in reads.single if n is not None)]
    if inside is not None:
        numbers += [*range(len(inside.merges)), *(n for n, out in enumerate(inside.leaves) if out)]
    found = [tower.layers[n] for n in numbers]
    return frozenset(found if scored is None else [*found, scored])


def _check_seen(
    model: nn.Module,
    tap: Tap,
    taps: Mapping[str | int, Tap],
    features: Sequence[Tensor],
    states: bool,
) -> None:
    """Refuse a tower that passed by what was to look at it.

    Raises:
        ContractError: a tap, or the projector, saw nothing.
    """
    blind = [name for name, one in taps.items() if not one.rows_seen]
    if (not tap.rows_seen and not states) or blind:
        where = "a layer" if not blind else f"layer {blind[0]}"
        raise contract.broken(
            model, f"{where} of its vision encoder ran without the attention that was to be seen"
        )
    if not features:
        raise contract.broken(
            model, "its projector ran without the features of its vision encoder being seen"
        )


def _tall(values: Tensor, length: int) -> Tensor:
    """Padded with zeros along the dimension before the last, or as they are."""
    missing = length - values.shape[-2]
    return nn.functional.pad(values, (0, 0, 0, missing)) if missing else values
