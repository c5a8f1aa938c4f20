"""Original positions in vLLM: kept visual tokens stay where they were, and text behind them too.

vLLM's runner asks models with M-RoPE for the positions of a prompt when the request comes, before
anything is encoded. Positions of text follow from the sizes of images alone, so they are final at
once. A visual token gets that of its image's first token; by how much its own lies behind is known
once the image is encoded, travels in extra channels behind its embedding, which vLLM caches and
cuts into chunks as it does embeddings, and is added in the step that uses it.

So nothing depends on the gate of vLLM's video pruner, which the CPU runner does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vlmprune.integrations.vllm import policy as policies
from vlmprune.integrations.vllm.fields import field_of, unpack
from vlmprune.integrations.vllm.runs import Whole, unpruned

# Numbers are split into digits that every type of embedding holds exactly, bfloat16 included.
_BASE = 256
_DIGITS = 2


class OriginalPositions:
    """Mixed in before a model of vLLM.

    Attributes:
        axes: how many numbers a position is made of; 1 without M-RoPE.
        original: whether this server gives original positions.
    """

    supports_mrope: ClassVar[bool] = True
    axes: ClassVar[int] = 1
    original: bool = False
    _offsets: Tensor

    def _prepare_positions(self, vllm_config: Any) -> None:
        """Make room for the offsets of a step's tokens."""
        longest = vllm_config.scheduler_config.max_num_batched_tokens
        device = vllm_config.device_config.device
        offsets = torch.zeros(self.axes, longest, dtype=torch.long, device=device)
        self.register_buffer("_offsets", offsets, persistent=False)  # type: ignore[attr-defined]
        text = vllm_config.model_config.hf_config.get_text_config()
        if not (policies.has_plain_positions(text) and policies.can_extend(text)):
            return
        # A pruned prompt may leave room for an answer beyond the last position of the config.
        rows = text.max_position_embeddings + vllm_config.model_config.max_model_len
        for module in self.modules():  # type: ignore[attr-defined]
            cache = getattr(module, "cos_sin_cache", None)
            if isinstance(module, RotaryEmbeddingBase) and cache is not None and len(cache) < rows:
                module.max_position_embeddings = rows
                module.cos_sin_cache = module._compute_cos_sin_cache().to(cache)

    def with_offsets(self, embeddings: Tensor, offsets: Tensor) -> Tensor:
        """Embeddings [k, D] with their offsets [k, axes] in extra channels."""
        high = torch.div(offsets, _BASE, rounding_mode="floor")
        digits = torch.cat((high, offsets % _BASE), dim=1)
        return torch.cat((embeddings, digits.to(embeddings)), dim=1)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed as ever, and lay the offsets of this step's visual tokens aside."""
        if self.original:
            self._offsets.zero_()
        if self.original and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            joined = torch.cat([one.flatten(0, -2) for one in multimodal_embeddings])
            width = _DIGITS * self.axes
            digits = joined[:, -width:].round().long()
            offsets = digits[:, : self.axes] * _BASE + digits[:, self.axes :]
            mask = is_multimodal.to(self._offsets.device, non_blocking=True)
            place = self._offsets[:, : len(mask)]
            place.masked_scatter_(mask.expand(self.axes, -1), offsets.T.contiguous())
            multimodal_embeddings = [one[..., :-width] for one in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run with the offsets added."""
        if self.original and positions.ndim == 2:
            positions = positions + self._offsets[:, : positions.shape[1]]
            if self.axes == 1:
                positions = positions[0]
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Places in the unpruned prompt, three rows alike; of visual tokens their run's first."""
        whole = self.unpruned(input_tokens, mm_features)
        delta = len(whole.tokens) - len(input_tokens)
        return whole.places.expand(3, -1).contiguous(), delta

    def unpruned(self, input_tokens: list[int], mm_features: Sequence[Any]) -> Whole:
        """The prompt with all visual tokens."""
        counts = [unpack(one.data[field_of(one.modality)].data)[1:] for one in mm_features]
        return unpruned(input_tokens, mm_features, counts)
