"""The KV caches that `decode.py` compares, filled with random keys and values, and their models.

A prompt is `text` tokens with `visual` tokens in their middle. What a layer keeps of the visual
ones follows PLPHP's three retention rates; which tokens they are is drawn by chance, and chosen
from these scores by the functions that PLPHP uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.release import with_cache
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.runtime.cache.bound_cache import adopt, attending
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.select import retention
from vlmprune.study.measure import peak_bytes, stored_bytes

# How a cache is cut, then how it is held.
CUTS = ("equal", "adaptive")
KINDS = ("dense", "dense, in place", "masked", "floor", "floor, in place", *CUTS)

# Random keys of this size make attention differ from token to token, so that a wrong mask shows.
KEY_SIZE = 2.0
MASKED = "per_head_mask"


def _config(kind: Any, sizes: tuple[int, ...]) -> Any:
    """A decoder's config: widths, layers, heads, KV heads and vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size")
    return kind(
        **dict(zip(names, sizes, strict=True)),
        head_dim=sizes[0] // sizes[3],
        max_position_embeddings=2**17,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


SHAPES = {
    "llava-1.5-7b": _config(LlamaConfig, (4096, 11008, 32, 32, 32, 32064)),
    "qwen2.5-vl-7b": _config(Qwen2Config, (3584, 18944, 28, 28, 4, 152064)),
    "small": _config(LlamaConfig, (512, 1376, 6, 8, 8, 1024)),
    "small-gqa": _config(LlamaConfig, (512, 1376, 6, 8, 2, 1024)),
}


@dataclass(frozen=True)
class Setting:
    """One prompt and how it is cut.

    Attributes:
        batch: samples, all of one length.
        visual: visual tokens of a sample.
        text: its other tokens, all of which stay.
        r, dr: retention rate of an ordinary layer; what others keep more or less.
        shares: of attentive and of ordinary layers; the rest is indifferent.
        by_sample: whether each sample has kinds of layers of its own.
    """

    batch: int
    visual: int
    text: int = 64
    r: float = 0.4
    dr: float = 0.3
    shares: tuple[float, float] = (1 / 3, 1 / 3)
    by_sample: bool = False

    @property
    def length(self) -> int:
        """Columns of the prompt."""
        return self.visual + self.text

    def kept(self, layers: int) -> Tensor:
        """[layers, B] int64: visual tokens that a head keeps in an equal split."""
        most, middle = (round(share * layers) for share in self.shares)
        middle = min(middle, layers - most)
        rates = [self.r + self.dr] * most + [self.r] * middle
        rates += [self.r - self.dr] * (layers - most - middle)
        generator = torch.Generator().manual_seed(0)
        orders = [
            torch.randperm(layers, generator=generator)
            for _ in range(self.batch if self.by_sample else 1)
        ]
        spread = torch.stack([torch.tensor(rates)[order] for order in orders], dim=1)
        counts = (spread * self.visual + 0.5).floor().long().clamp(min=1, max=self.visual)
        return counts.expand(-1, self.batch)

    def mean(self, counts: Tensor) -> int:
        """Tokens of a layer that hold as many bytes as those that its samples keep, `counts`."""
        return int(counts.sum()) // self.batch + self.text

    def stored(self, layers: int) -> int:
        """Tokens that one KV head of every sample and layer holds, all of these together."""
        return int(self.kept(layers).sum()) + layers * self.batch * self.text

    def masks(self, keep: Tensor, heads: int, device: torch.device) -> dict[str, Tensor]:
        """What each head of one layer keeps, by kind of cut: [B, heads, length] bool.

        Args:
            keep: [B], a row of `kept`.
            heads: KV heads.
            device: of the masks.
        """
        B, V = self.batch, self.visual
        # Some heads attend more to everything, and get more of a shared budget.
        scores = torch.rand(B, heads, V, device=device)
        scores = scores * torch.randn(B, heads, 1, device=device).mul(0.5).exp()
        images = torch.zeros(B, V, dtype=torch.long, device=device)
        out, first = {}, self.text // 2
        for name, choose in zip(CUTS, (retention.per_image, retention.shared), strict=True):
            mask = torch.ones(B, heads, self.length, dtype=torch.bool, device=device)
            mask[:, :, first : first + V] = choose(scores, images, keep[:, None].to(device))
            out[name] = mask
        return out


class InPlaceLayer(DynamicLayer):
    """A dense layer that was given room: new tokens are written, nothing is copied."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new columns."""
        held, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        keys, values = self.room
        keys[:, :, held:end] = key_states
        values[:, :, held:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def nbytes(self) -> int:
        """Bytes that it holds, room included."""
        return sum(x.nbytes for x in self.room)


class Decoder:
    """A causal language model with random weights, run one token at a time."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config, self.device, self.dtype = config, device, dtype
        with device:
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        layers = self.model.model.layers
        self.attentions = {index: attention_of(layer) for index, layer in enumerate(layers)}

    def empty(self) -> Any:
        """A stock cache."""
        return DynamicCache(config=self.model.config)

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Logits [B, vocabulary] of one more token `ids` [B, 1]; its keys join the cache."""
        positions = torch.full_like(ids, position)
        with attending(cache, self.attentions, None):
            given = with_cache(type(self.model), {"use_cache": True}, cache)
            out = self.model(input_ids=ids, position_ids=positions, **given)
        return out.logits[:, -1]

    @contextmanager
    def masked(self, masks: list[Tensor]) -> Iterator[None]:
        """Inside the block add `masks`, of each layer [B, H, 1, columns or more], to scores."""
        _masks.extend(masks)
        self.model.set_attn_implementation(MASKED)
        try:
            yield
        finally:
            self.model.set_attn_implementation("sdpa")
            _masks.clear()


_masks: list[Tensor] = []


def _attend_masked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA with one mask for each KV head; as no sample is padded, `mask` says nothing."""
    B, Hq, Q, D = query.shape
    # The queries of a head's group become its rows: nothing is repeated.
    rows = query.reshape(B, key.shape[1], -1, D)
    seen = _masks[module.layer_idx][..., : key.shape[2]].expand(-1, -1, rows.shape[2], -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=seen, scale=kwargs["scaling"]
    )
    return out.reshape(B, Hq, Q, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(MASKED, _attend_masked)
AttentionMaskInterface.register(MASKED, sdpa_mask)


class Case:
    """One prompt's cache in all the forms that are compared, which share what they can.

    `room` is the number of tokens that will be decoded at most.
    """

    def __init__(self, decoder: Decoder, setting: Setting, room: int) -> None:
        torch.manual_seed(1)
        config, L = decoder.config, setting.length
        H = config.num_key_value_heads
        self.decoder, self.setting, self.room = decoder, setting, room
        self.full: list[tuple[Tensor, Tensor]] = []
        self.floor: list[tuple[Tensor, Tensor, int]] = []
        self.keep: dict[str, list[Tensor]] = {name: [] for name in CUTS}
        self.ragged: dict[str, list[Ragged]] = {name: [] for name in CUTS}
        for counts in setting.kept(config.num_hidden_layers):
            keys, values = random_pair(decoder, setting.batch, L + room)
            self.full.append((keys.mul_(KEY_SIZE), values))
            for name, mask in setting.masks(counts, H, decoder.device).items():
                self.keep[name].append(mask)
                cut = Ragged.cut(keys[:, :, :L], values[:, :, :L], mask)
                self.ragged[name].append(cut)
            mean = setting.mean(counts)
            short = [x[:, :, : mean + room].clone() for x in (keys, values)]
            self.floor.append((short[0], short[1], mean))

    def cache(self, kind: str) -> Any:
        """A cache of that kind as prefill leaves it."""
        cache, L = self.decoder.empty(), self.setting.length
        if kind in CUTS:
            count = len(self.full)
            adopt(cache, range(count), count, RaggedLayer)
            for layer, prefix in zip(cache.layers, self.ragged[kind], strict=True):
                layer.lazy_initialization(prefix.keys, prefix.values)
                layer.set_prefix(prefix, L)
            return cache
        full = [(keys, values, L) for keys, values in self.full]
        for i, held in enumerate(self.floor if "floor" in kind else full):
            layer = InPlaceLayer(*held)
            if "in place" in kind:
                cache.layers[i] = layer
            else:
                cache.layers[i].lazy_initialization(layer.keys, layer.values)
                cache.layers[i].keys, cache.layers[i].values = layer.keys, layer.values
        return cache

    def around(self, kind: str, cut: str = "equal") -> AbstractContextManager[None]:
        """What a decode with a cache of that kind runs inside; `cut` says what is masked."""
        if kind != "masked":
            return nullcontext()
        return self.decoder.masked([self._added(keep) for keep in self.keep[cut]])

    def _added(self, keep: Tensor) -> Tensor:
        seen = torch.nn.functional.pad(keep, (0, self.room), value=True)[:, :, None]
        mask = torch.zeros(seen.shape, dtype=self.decoder.dtype, device=seen.device)
        return mask.masked_fill_(~seen, -torch.inf)

    def formula(self, kind: str, decoded: int) -> int:
        """Bytes of the keys and values that a cache of that kind needs, by its lengths."""
        setting, config = self.setting, self.decoder.config
        layers = config.num_hidden_layers
        cut = kind in CUTS or "floor" in kind
        tokens = setting.stored(layers) if cut else layers * setting.batch * setting.length
        return (tokens + layers * setting.batch * decoded) * pair_bytes(config, self.decoder.dtype)


def random_pair(decoder: Decoder, batch: int, length: int) -> list[Tensor]:
    """Keys and values of one layer: [batch, KV heads, length, head dim] each."""
    size = batch, decoder.config.num_key_value_heads, length, decoder.config.head_dim
    return [torch.randn(size, device=decoder.device, dtype=decoder.dtype) for _ in range(2)]


def pair_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all KV heads of one layer."""
    return 2 * int(config.num_key_value_heads) * int(config.head_dim) * dtype.itemsize


def fill_as_prefill(decoder: Decoder, setting: Setting, kind: str, room: int) -> Any:
    """A cache and its masks, filled and cut layer by layer, so that one layer at most is whole.

    `kind` is "dense", "masked", "floor" or a cut; masks have `room` columns beyond the prompt.
    """
    config, cache, masks = decoder.config, decoder.empty(), []
    count, heads = config.num_hidden_layers, config.num_key_value_heads
    if kind in CUTS:
        adopt(cache, range(count), count, RaggedLayer)
    for layer, counts in zip(cache.layers, setting.kept(count), strict=True):
        new = random_pair(decoder, setting.batch, setting.length)
        if kind == "floor":
            new = [x[:, :, : setting.mean(counts)] for x in new]
        layer.update(*new)
        del new
        if kind in CUTS:
            keep = setting.masks(counts, heads, decoder.device)[kind]
            layer.set_prefix(Ragged.cut(layer.keys, layer.values, keep), setting.length)
        elif kind == "masked":
            size = setting.batch, heads, 1, setting.length + room
            masks.append(torch.zeros(size, dtype=decoder.dtype, device=decoder.device))
    return cache, masks


def peaks(decoder: Decoder, setting: Setting, kind: str, steps: int) -> dict[str, int]:
    """The most bytes beyond the model's as one kind of cache is filled and cut, and decodes."""
    made: list[Any] = []
    filling = peak_bytes(
        lambda: made.extend(fill_as_prefill(decoder, setting, kind, steps)), decoder.device
    )
    cache, masks = made
    held = stored_bytes(cache) + sum(mask.nbytes for mask in masks)
    ids = torch.zeros(setting.batch, 1, dtype=torch.long, device=decoder.device)

    def decode() -> None:
        for i in range(steps):
            decoder.step(cache, ids, setting.length + i)

    with decoder.masked(masks) if masks else nullcontext():
        decoding = peak_bytes(decode, decoder.device)
    return {"filling": filling or 0, "decoding": held + (decoding or 0)}


def case_bytes(config: Any, setting: Setting, room: int, dtype: torch.dtype) -> int:
    """What one case takes at its peak, estimated from above."""
    layers, held = config.num_hidden_layers, pair_bytes(config, dtype)
    longest = replace(setting, text=setting.text + room)
    dense = held * layers * setting.batch * longest.length
    cut = held * longest.stored(layers)
    heads = setting.batch * config.num_key_value_heads
    masks = layers * heads * longest.length * (2 + dtype.itemsize)
    sorting = 64 * heads * setting.visual
    # The dense one twice, as a stock cache copies itself to grow.
    return int(1.05 * (2 * dense + 3 * cut + masks + sorting)) + 2**28
