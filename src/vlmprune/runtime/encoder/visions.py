"""What pruning left of images and videos, kept for later requests: encode once, ask often.

Only for methods that do not look at the question. What is stored is small: the visual tokens that
were kept, and where they lay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError, reason
from vlmprune.files import replacing
from vlmprune.hosts import outputs, requests
from vlmprune.method import by_default, defaults_then, name_then
from vlmprune.report import Report
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.encoder.pruned import Pruned
from vlmprune.runtime.geometry import Geometry, Item, spans
from vlmprune.version import __version__
from vlmprune.views.layout import Layout

FORMAT = "vlmprune vision 1"


@dataclass(frozen=True)
class StoredItem:
    """One image or video after pruning.

    Attributes:
        kind: "image" or "video".
        layout: where its visual tokens lie, nothing dropped.
        kept: [n] bool over them.
        features: [k, D] what the language model gets.
        extra: further features for later layers, each [k, D].
        roles: [n] bools by name.
        inputs: its rows of the processor's outputs other than pixels.
        patches: of each crop that was encoded.
        members: [n] int64, as in the report; None where nothing was merged.
    """

    kind: str
    layout: Layout
    kept: Tensor
    features: Tensor
    extra: tuple[Tensor, ...] = ()
    roles: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    patches: tuple[int, ...] = ()
    members: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored of it."""
        named = {"features": self.features, "kept": self.kept, "labels": self.layout.labels}
        named |= {f"extra.{i}": layer for i, layer in enumerate(self.extra)}
        named |= {f"role.{name}": mask for name, mask in self.roles.items()}
        named |= {} if self.members is None else {"members": self.members}
        return named | {f"input.{name}": rows for name, rows in self.inputs.items()}


@dataclass(frozen=True)
class Vision:
    """The images and videos of a request after pruning, in prompt order.

    `a + b` puts b's after a's; `a * 3` repeats them for a batch of three questions.

    Attributes:
        items: one an image or video.
        method: the pruner that chose, with its settings.
        score: where its attention came from.
        architecture: the model that encoded them.
    """

    items: tuple[StoredItem, ...]
    method: str
    score: str
    architecture: str

    def __len__(self) -> int:
        return len(self.items)

    def __add__(self, other: Vision) -> Vision:
        """These, then the other's.

        Raises:
            VlmpruneError: they come from different methods or models.
        """
        if (self.method, self.architecture) != (other.method, other.architecture):
            raise VlmpruneError(
                f"visions of {self.method} on {self.architecture} and of {other.method} on "
                f"{other.architecture} cannot be joined; encode all with one pruner and model."
            )
        return replace(self, items=self.items + other.items)

    def __mul__(self, times: int) -> Vision:
        return replace(self, items=self.items * times)

    def holds(self, kind: str) -> bool:
        """Whether there is one of a kind ("image" or "video") among them."""
        return any(item.kind == kind for item in self.items)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for item in self.items for t in item.tensors().values())

    def to(self, device: torch.device | str) -> Vision:
        """The same on another device."""

        def moved(item: StoredItem) -> StoredItem:
            return replace(
                item,
                layout=replace(item.layout, labels=item.layout.labels.to(device)),
                kept=item.kept.to(device),
                features=item.features.to(device),
                extra=tuple(layer.to(device) for layer in item.extra),
                roles={name: mask.to(device) for name, mask in item.roles.items()},
                inputs={name: rows.to(device) for name, rows in item.inputs.items()},
                members=None if item.members is None else item.members.to(device),
            )

        return replace(self, items=tuple(map(moved, self.items)))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            VlmpruneError: the disk refuses.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        about = []
        for number, item in enumerate(self.items):
            own = {f"{number}.{name}": t.contiguous().cpu() for name, t in item.tensors().items()}
            tensors |= {name: tensor.clone() for name, tensor in own.items()}
            one = item.layout
            about.append(
                {
                    "kind": item.kind,
                    "crops": one.crops,
                    "grid": list(one.grid),
                    "blended": one.blended,
                    "whole_crop": one.whole_crop,
                    "cls": one.cls,
                    "patches": list(item.patches),
                }
            )
        meta = {
            "format": FORMAT,
            "version": __version__,
            "method": self.method,
            "score": self.score,
            "architecture": self.architecture,
            "items": json.dumps(about),
        }
        try:
            with replacing(path) as made:
                save_file(tensors, str(made), metadata=meta)
        except SafetensorError as error:
            raise VlmpruneError(
                f"{str(path)!r} cannot be written ({reason(error)}); give another path."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Vision:
        """Read what `save` wrote.

        Raises:
            VlmpruneError: the file cannot be read, or is of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise VlmpruneError(f"{str(path)!r} cannot be read as a stored vision.") from error
        if meta.get("format") != FORMAT:
            raise VlmpruneError(
                f"{str(path)!r} holds no stored vision of this version; encode the images again."
            )

        def named(number: int, prefix: str) -> dict[str, Tensor]:
            start = f"{number}.{prefix}."
            return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}

        items = []
        for number, about in enumerate(json.loads(meta["items"])):
            kind, grid = about["kind"], (about["grid"][0], about["grid"][1])
            labels = tensors[f"{number}.labels"]
            extra = sorted(named(number, "extra").items(), key=lambda pair: int(pair[0]))
            items.append(
                StoredItem(
                    kind,
                    # Files of earlier versions do not say which crop is the whole view.
                    Layout(
                        labels,
                        about["crops"],
                        grid,
                        about["blended"],
                        kind,
                        about.get("whole_crop"),
                        about.get("cls", False),
                    ),
                    tensors[f"{number}.kept"],
                    tensors[f"{number}.features"],
                    tuple(layer for _, layer in extra),
                    named(number, "role"),
                    named(number, "input"),
                    tuple(about["patches"]),
                    # Files of earlier versions have none.
                    tensors.get(f"{number}.members"),
                )
            )
        return cls(tuple(items), meta["method"], meta["score"], meta["architecture"])

    def brought(
        self, attachment: Attachment, inputs: Mapping[str, Any], visual: list[Tensor]
    ) -> tuple[list[dict[str, Any]], Geometry]:
        """What a request would bring, and the geometry of its items, without pixels.

        Args:
            attachment: of the method to the model.
            inputs: the request's inputs.
            visual: for each modality [B, L] bool, its placeholders.

        Raises:
            VlmpruneError: the prompt has other placeholders than these items need.
        """
        out: list[dict[str, Any]] = []
        items: list[Item] = []
        for number, (medium, columns) in enumerate(
            zip(attachment.family.media, visual, strict=True)
        ):
            own = [item for item in self.items if item.kind == medium.kind]
            places = spans(columns, [len(item.kept) for item in own], medium.kind)
            if not own:
                out.append({})
                continue
            rows = {
                name: torch.stack([item.inputs[name] for item in own]).to(columns.device)
                for name in own[0].inputs
            }
            given = {k: v for k, v in inputs.items() if k != medium.inputs[0]} | rows
            given[medium.inputs[0]] = medium.blank(given, len(own))
            out.append(given)
            items += [
                Item(number, i, item.layout, place)
                for i, (item, place) in enumerate(zip(own, places, strict=True))
            ]
        return out, Geometry(tuple(sorted(items, key=lambda item: item.span.order)))

    def pruned(self, attachment: Attachment, geometry: Geometry, batch: int) -> dict[str, Pruned]:
        """Encoder outputs of a request that brings these items."""
        out = {}
        for number, medium in enumerate(attachment.family.media):
            own = [item for item in self.items if item.kind == medium.kind]
            if not own:
                continue
            depth = len(own[0].extra)
            out[medium.method] = Pruned(
                medium,
                None,
                [item.features for item in own],
                [[item.extra[i] for item in own] for i in range(depth)],
                geometry.rows(batch, number),
                # Releases that encode within their forward do not part the items.
                not requests.encodes_ahead(attachment.model),
                cls=outputs.output_class(attachment.originals[medium.method]),
            )
        return out

    def in_order(self, geometry: Geometry, attachment: Attachment) -> list[StoredItem]:
        """The items as the prompt has them."""
        queues = {
            number: iter([item for item in self.items if item.kind == medium.kind])
            for number, medium in enumerate(attachment.family.media)
        }
        return [next(queues[item.medium]) for item in geometry.items]


def gather(
    attachment: Attachment,
    geometry: Geometry,
    inputs: Sequence[Mapping[str, Any]],
    kept: list[Tensor],
    pruned: dict[str, Pruned],
    report: Report,
) -> Vision:
    """What `handle.encode` returns, from what a request came to, and its report."""
    items: list[StoredItem | None] = [None] * len(geometry.items)
    for number, medium in enumerate(attachment.family.media):
        own = geometry.of(number)
        if not own:
            continue
        left, given = pruned[medium.method], inputs[number]
        layouts = [geometry.items[i].layout for i in own]
        patches = iter(medium.patches(attachment.model, given, layouts))
        others = {
            name: given[name]
            for name in medium.inputs[1:]
            if name in given and isinstance(given[name], Tensor) and len(given[name]) == len(own)
        }
        for at, i in enumerate(own):
            one = geometry.items[i].layout
            items[i] = StoredItem(
                medium.kind,
                one,
                kept[i],
                left.features[at],
                tuple(layer[at] for layer in left.extra),
                report.roles[i],
                {name: rows[at] for name, rows in others.items()},
                tuple(next(patches) for _ in range(one.crops)),
                report.members[i] if report.members else None,
            )
    done = tuple(item for item in items if item is not None)
    return Vision(done, shortening(attachment), report.score, attachment.architecture)


def shortening(attachment: Attachment) -> str:
    """The part of a pruner that acts before the language model, with its settings."""
    stages = attachment.method.links
    return " | ".join(repr(stage) for stage in stages if stage.shortens)


def check(attachment: Attachment, vision: Vision | None = None) -> None:
    """Refuse what cannot be reused, before any work.

    Raises:
        VlmpruneError: the method looks at the question or chooses nothing, or the vision comes
            from another method or model.
    """
    stages = [stage for stage in attachment.method.links if stage.shortens]
    if not stages:
        raise VlmpruneError(
            f"{attachment.method!r} chooses nothing before the language model, so there is nothing "
            "to store; chain it after a method that does."
        )
    if attachment.family.counted:
        raise VlmpruneError(
            f"{type(attachment.model).__name__} is in no record, so what its encoder makes cannot "
            "be stored; pass pixel_values."
        )
    for stage in stages:
        if not stage.text_agnostic:
            raise VlmpruneError(
                f"{stage!r} looks at the question, so what it keeps cannot serve another one."
            )
    if vision is None:
        return
    if not isinstance(vision, Vision):
        raise VlmpruneError(
            f"vision={type(vision).__name__} is not what `handle.encode` returns; pass that, or "
            "what Vision.load reads."
        )
    method, instead = shortening(attachment), ""
    if vision.method == name_then(stages):
        # What earlier versions stored is what this method does, by another name.
        method = vision.method
    elif vision.method == name_then(by_default(stages)):
        settings = defaults_then(stages)
        instead = f", or give {settings}, which was the default up to version 0.2"
    for what, before, now in (
        ("method", vision.method, method),
        ("model", vision.architecture, attachment.architecture),
    ):
        if before != now:
            raise VlmpruneError(
                f"the vision was encoded with another {what} ({before}) than this one ({now}); "
                f"encode the images again{instead}."
            )
