"""vLLM's models with pruning inside `embed_multimodal`: a mixin for each family's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vlmprune.integrations.vllm import policy as policies
from vlmprune.integrations.vllm import tower_reads
from vlmprune.integrations.vllm.fields import field_of, unpack
from vlmprune.integrations.vllm.host import Host, Served
from vlmprune.integrations.vllm.journal import Journal
from vlmprune.integrations.vllm.positions import OriginalPositions
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder import merging
from vlmprune.runtime.encoder.encode import Encoded, encode
from vlmprune.runtime.encoder.reads import wanted
from vlmprune.runtime.geometry import Geometry, Item, Span
from vlmprune.views import EncoderView
from vlmprune.views.layout import Layout, kept_tokens


class PrunedModel(OriginalPositions):
    """Mixed in before a model of vLLM; a subclass sets `media` and `host`."""

    media: ClassVar[Sequence[Served]]
    host: ClassVar[type[Host]] = Host
    # Its count of tokens is not that of the embeddings any more.
    supports_tower_connector_lora: ClassVar[bool] = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.policy = policies.from_environment()
        config = vllm_config.model_config.hf_config
        self.original = policies.positions(self.policy, config) == "original"
        self.journal = Journal.from_environment()
        if self.original:
            self._prepare_positions(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode with vLLM's own code, and hand on what is kept of each image or video."""
        told = {medium.kind: kwargs.pop(field_of(medium.kind), None) for medium in self.media}
        present = [one for one in self.media if kwargs.get(one.inputs[0]) is not None]
        call = partial(super().embed_multimodal, **kwargs)  # type: ignore[misc]
        if not present:
            return call()
        (medium,) = present
        fields = told[medium.kind]
        assert fields is not None
        budgets = [unpack(field) for field in fields]
        host = self.host(self.config, self)  # type: ignore[attr-defined]
        items = medium.items(kwargs)
        layouts = medium.described(medium.layouts_of(host, items))
        methods = [self.policy.method(keep) for keep, _, _ in budgets]
        if any(method is not None for method in methods):
            encoded = self._encoded(host, medium, items, layouts, call)
            output = encoded.outputs[0]
            kept, order, tokens = self._chosen(host, medium, layouts, methods, encoded)
        else:
            output = call()
            tokens = medium.split(output, layouts)
            kept = [torch.ones(len(one.labels), dtype=torch.bool) for one in layouts]
            order = [None] * len(layouts)
        # What later layers add goes where its token goes; it is not merged.
        deep = medium.extra(output, layouts)
        out = []
        for number, (features, stays) in enumerate(zip(tokens, kept, strict=True)):
            _, before, after = budgets[number]
            found = (len(features), int(stays.sum()))
            if found != (before, after):
                raise RuntimeError(
                    f"one {medium.kind} has {found[0]} visual tokens, of which {found[1]} are "
                    f"kept, where {before} and {after} were counted beforehand; please report this."
                )
            numbers = stays.nonzero()[:, 0].to(features.device)
            again = order[number]
            if again is not None:
                numbers = numbers[again.to(features.device)]
            parts = [features, *(layer[number] for layer in deep)]
            short = torch.cat([one[numbers] for one in parts], dim=1)
            if self.original:
                far = self.offsets(layouts[number], items[number])[numbers.cpu()]
                short = self.with_offsets(short, far.to(features.device))
            out.append(short)
            self.journal(medium, items[number], methods[number], stays)
        return out

    def offsets(self, layout: Layout, inputs: Any) -> Tensor:
        """[n, axes] int64; how far each visual token of an item lies behind the first."""
        return torch.arange(len(layout.labels))[:, None]

    def _encoded(
        self,
        host: Host,
        medium: Served,
        items: Sequence[Any],
        layouts: Sequence[Layout],
        call: Any,
    ) -> Encoded:
        pruner = self.policy.pruner
        assert pruner is not None
        nowhere = Span(0, torch.zeros(0, dtype=torch.long))
        geometry = Geometry(tuple(Item(0, i, one, nowhere) for i, one in enumerate(layouts)))

        inputs, module = medium.joined(items), cast(nn.Module, host)
        reads = wanted(module, [medium], [inputs], [True], pruner.reads, repr(pruner))

        def run(*_: Any) -> Any:
            return tower_reads.run(call, host, medium, items, layouts, reads, pruner.attends)

        return encode(
            module,
            [medium],
            {medium.method: call},
            [inputs],
            geometry,
            reads=reads,
            who=repr(pruner),
            attends=pruner.attends,
            run=run,
        )

    def _chosen(
        self,
        host: Host,
        medium: Served,
        layouts: list[Layout],
        methods: Sequence[Pruner | None],
        encoded: Encoded,
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """Of each item which tokens are kept, in which order, and all of its tokens."""
        tokens = list(medium.split(encoded.outputs[0], layouts))
        kept = [torch.ones(len(one.labels), dtype=torch.bool) for one in layouts]
        order: list[Tensor | None] = [None] * len(layouts)
        for method in {repr(one): one for one in methods if one is not None}.values():
            own = [i for i, one in enumerate(methods) if repr(one) == repr(method)]
            mine = [layouts[i] for i in own]
            view, cells = part(encoded, own)
            selection = method.select(view)
            if selection.merge is not None and len(selection.merge.into):
                made = merging.merged(
                    selection.merge,
                    selection.kept,
                    mine,
                    cells,
                    [tokens[i] for i in own],
                    [partial(medium.project, host)] * len(own),
                )
                for i, new in zip(own, made, strict=True):
                    tokens[i] = new
            stays = kept_tokens(mine, selection.kept, method.newlines)
            behind = None
            if selection.last is not None and not self.original:
                # Where the others lie, `merging.order` does not ask.
                behind = kept_tokens(mine, selection.last, "drop")
            for place, i in enumerate(own):
                kept[i] = stays[place].cpu()
                if behind is not None:
                    order[i] = merging.order(mine[place], stays[place], behind[place])
        return kept, order, tokens


def part(encoded: Encoded, items: Sequence[int]) -> tuple[EncoderView, Tensor]:
    """What was seen of some items alone, and their features."""
    view = encoded.view
    if len(items) == len(view.videos):
        return view, encoded.cells
    places = {item: number for number, item in enumerate(items)}
    crops = [crop for crop, item in enumerate(view.images) if item in places]

    def of(values: Any) -> Any:
        return None if values is None else values[crops]

    return replace(
        view,
        attention=of(view.attention),
        features=of(view.features),
        candidates=of(view.candidates),
        images=tuple(places[view.images[crop]] for crop in crops),
        grids=tuple(view.grids[crop] for crop in crops),
        videos=tuple(view.videos[item] for item in items),
        layers={layer: of(rows) for layer, rows in view.layers.items()},
        received=of(view.received),
        given=of(view.given),
        keys=of(view.keys),
        projected=of(view.projected),
    ), encoded.cells[crops]
