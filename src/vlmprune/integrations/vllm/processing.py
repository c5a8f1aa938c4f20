"""vLLM's multimodal processors with fewer placeholders: a mixin for each family's own.

The budget of a request comes among its `mm_processor_kwargs`. It is taken out before Transformers'
processor sees it, is part of the hash that names what the encoder makes of an image, and travels to
the model as one more field of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from vlmprune.errors import VlmpruneError
from vlmprune.integrations.vllm import policy as policies
from vlmprune.integrations.vllm.fields import field_of, pack, unpack
from vlmprune.integrations.vllm.host import Host, Served
from vlmprune.integrations.vllm.policy import Keep, Policy
from vlmprune.version import __version__


@dataclass
class Shortened(PromptUpdateDetails):
    """Placeholders of an image, fewer than it has visual tokens.

    Attributes:
        dropped: how many fewer.
    """

    dropped: int = 0


class PrunedProcessor:
    """Mixed in before a processor of vLLM; a subclass sets `media` and `host`."""

    media: ClassVar[Sequence[Served]]
    host: ClassVar[type[Host]] = Host

    @cached_property
    def policy(self) -> Policy:
        """The server's method."""
        return policies.from_environment()

    def _get_mm_hashes(self, inputs: Any) -> Any:
        keep, rest = policies.settings(inputs.hf_processor_mm_kwargs)
        # Caches may be shared by servers, so the server's own method is part of the name too.
        named = {**rest, "vlmprune": f"{__version__} {self._named(keep)}"}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=named))  # type: ignore[misc]

    def _named(self, keep: Keep) -> str:
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        return f"{self.policy.name(keep)} {policies.positions(self.policy, config)}"

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM measures its memory with, unpruned, as a request's own budget may be any."""
        found = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(
            found,
            hf_processor_mm_kwargs={**found.hf_processor_mm_kwargs, policies.KEEP: policies.ALL},
        )

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        keep, rest = policies.settings(hf_kwargs)
        method = self.policy.method(keep)
        for kind, items in mm_items.items():
            if isinstance(items, EmbeddingItems) and self.policy.pruner is not None:
                raise VlmpruneError(
                    f"{kind} embeddings cannot be pruned, as the vision encoder's attention is "
                    "not known; send pictures, or start the server without VLMPRUNE."
                )
        found = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        host = self.host(self.info.get_hf_config())  # type: ignore[attr-defined]
        for medium in self.media:
            if found.get(medium.inputs[0]) is None:
                continue
            medium.fits(method)
            told = [
                pack(keep, len(layout.labels), policies.count(method, layout))
                for layout in medium.described(medium.layouts_of(host, medium.items(found)))
            ]
            found[field_of(medium.kind)] = torch.stack(told)
        return found

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        rest = policies.settings(hf_processor_mm_kwargs)[1]
        own = {
            field_of(medium.kind): MultiModalFieldConfig.batched(medium.kind, keep_on_cpu=True)
            for medium in self.media
            if field_of(medium.kind) in hf_inputs
        }
        return {**super()._get_mm_fields_config(hf_inputs, rest), **own}  # type: ignore[misc]

    def _get_prompt_updates(
        self,
        mm_items: Any,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: Any,
    ) -> Sequence[Any]:
        rest = policies.settings(hf_processor_mm_kwargs)[1]
        found = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        kinds = {medium.kind: medium for medium in self.media}
        return [
            self._shorter(update, kinds[update.modality], out_mm_kwargs)
            if update.modality in kinds
            else update
            for update in found
        ]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        ids, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        dropped = sum(
            update.content.dropped
            for items in mm_res.prompt_updates.values()
            for updates in items
            for update in updates[:1]
            if isinstance(update.content, Shortened)
        )
        model_config = self.info.ctx.model_config  # type: ignore[attr-defined]
        config = model_config.hf_config
        if policies.positions(self.policy, config) == "original":
            policies.check_length(config, len(ids), dropped, model_config.max_model_len)
        return ids, places

    def _shorter(self, update: Any, medium: Served, out_mm_kwargs: Any) -> Any:
        """A prompt update that inserts as many placeholders as there are tokens left."""

        def content(number: int) -> Any:
            given = update.content
            given = given(number) if callable(given) else given
            if not isinstance(given, PromptUpdateDetails):
                given = PromptUpdateDetails.from_seq(given)
            item = out_mm_kwargs[medium.kind][number]
            element = item.get(field_of(medium.kind))
            if element is None:
                return given
            _, before, after = unpack(element.data)
            full, mask = list(given.full), torch.ones(len(given.full), dtype=torch.bool)
            if given.is_embed is not None:
                mask = given.is_embed(full)
            if int(mask.sum()) != before:
                raise RuntimeError(
                    f"vLLM gives {int(mask.sum())} placeholders to one {medium.kind} in which "
                    f"vlmprune sees {before} visual tokens; please report this."
                )
            keeps = medium.placeholders(mask, after)
            left = [token for token, stays in zip(full, keeps.tolist(), strict=True) if stays]
            return Shortened(left, given.is_embed, before - after)

        name = "replacement" if hasattr(update, "replacement") else "insertion"
        return replace(update, **{name: content})
