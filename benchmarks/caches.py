"""The KV caches that `decode.py` compares, filled with random keys and values, and their models.

A prompt is `text` tokens with `visual` tokens in their middle. What a layer keeps of the visual
ones follows PLPHP's three retention rates; which tokens they are is drawn by chance, and chosen
from these scores by the functions that PLPHP uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlmprune.hosts.attention import attention_of
from vlmprune.hosts.release import with_cache
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.runtime.cache.ragged_cache import adopt, attending
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.select import retention

# How a cache is cut, then how it is held.
CUTS = ("equal", "adaptive")
KINDS = ("dense", "dense, in place", "masked", "floor", "floor, in place", *CUTS)

# Random keys of this size make attention differ from token to token, so that a wrong mask shows.
KEY_SIZE = 2.0
MASKED = "per_head_mask"


@dataclass(frozen=True)
class Shape:
    """A decoder, in the terms of a config."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    family: str = "llama"

    @property
    def parameters(self) -> int:
        """Numbers in the weights, but for norms and biases."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + 2 * self.hidden * self.vocabulary

    def config(self) -> Any:
        """The Transformers config."""
        kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
        return kinds[self.family](
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=2**17,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's key and value in one KV head of one layer."""
        return 2 * self.head_dim * dtype.itemsize


SHAPES = {
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 32, 128, 32064),
    "qwen2.5-vl-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, "qwen2"),
    "small": Shape(512, 1376, 6, 8, 8, 64, 1024),
    "small-gqa": Shape(512, 1376, 6, 8, 2, 64, 1024),
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

    def stored(self, layers: int) -> int:
        """Tokens that one KV head of every sample and layer holds, all of these together."""
        return int(self.kept(layers).sum()) + layers * self.batch * self.text

    def masks(self, keep: Tensor, heads: int, device: str) -> dict[str, Tensor]:
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


class Decoder:
    """A causal language model with random weights, run one token at a time."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.dtype = shape, device, dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                kind = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[shape.family]
                self.model: Any = kind(shape.config()).eval()
        finally:
            torch.set_default_dtype(before)
        self.attention = attention_of(self.model.model.layers[0])

    def empty(self) -> Any:
        """A stock cache."""
        return DynamicCache(config=self.model.config)

    def step(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Logits [B, vocabulary] of one more token `ids` [B, 1]; its keys join the cache."""
        positions = torch.full_like(ids, position)
        with attending(cache, self.attention, None):
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
        shape, device, dtype = decoder.shape, decoder.device, decoder.dtype
        B, H, D, L = setting.batch, shape.kv_heads, shape.head_dim, setting.length
        self.decoder, self.setting, self.room = decoder, setting, room
        self.full: list[tuple[Tensor, Tensor]] = []
        self.floor: list[tuple[Tensor, Tensor, int]] = []
        self.keep: dict[str, list[Tensor]] = {name: [] for name in CUTS}
        self.ragged: dict[str, list[Ragged]] = {name: [] for name in CUTS}
        for counts in setting.kept(shape.layers):
            keys, values = (
                torch.randn(B, H, L + room, D, device=device, dtype=dtype) for _ in range(2)
            )
            self.full.append((keys.mul_(KEY_SIZE), values))
            for name, mask in setting.masks(counts, H, device).items():
                self.keep[name].append(mask)
                cut = Ragged.cut(keys[:, :, :L], values[:, :, :L], mask)
                self.ragged[name].append(cut)
            mean = int(counts.sum()) // B + setting.text
            short = [x[:, :, : mean + room].clone() for x in (keys, values)]
            self.floor.append((short[0], short[1], mean))

    def cache(self, kind: str) -> Any:
        """A cache of that kind as prefill leaves it."""
        cache, L = self.decoder.empty(), self.setting.length
        if kind in CUTS:
            count = len(self.full)
            adopt(cache, range(count), count)
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
        setting, shape = self.setting, self.decoder.shape
        tokens = shape.layers * setting.batch * setting.length
        if kind in CUTS or "floor" in kind:
            tokens = setting.stored(shape.layers)
        tokens += shape.layers * setting.batch * decoded
        return tokens * shape.kv_heads * shape.token_bytes(self.decoder.dtype)


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer):
            total += layer.nbytes()
        else:
            total += sum(x.nbytes for x in getattr(layer, "room", (layer.keys, layer.values)))
    return total


def fill_as_prefill(decoder: Decoder, setting: Setting, kind: str, room: int) -> Any:
    """A cache and its masks, filled and cut layer by layer, so that one layer at most is whole.

    `kind` is "dense", "masked", "floor" or a cut; masks have `room` columns beyond the prompt.
    """
    shape, cache, masks = decoder.shape, decoder.empty(), []
    if kind in CUTS:
        adopt(cache, range(shape.layers), shape.layers)
    size = setting.batch, shape.kv_heads, setting.length, shape.head_dim
    for layer, counts in zip(cache.layers, setting.kept(shape.layers), strict=True):
        new = [torch.randn(size, device=decoder.device, dtype=decoder.dtype) for _ in range(2)]
        if kind == "floor":
            mean = int(counts.sum()) // setting.batch + setting.text
            new = [x[:, :, :mean] for x in new]
        layer.update(*new)
        del new
        if kind in CUTS:
            keep = setting.masks(counts, shape.kv_heads, decoder.device)[kind]
            layer.set_prefix(Ragged.cut(layer.keys, layer.values, keep), setting.length)
        elif kind == "masked":
            added = torch.zeros(*size[:2], 1, size[2] + room, dtype=decoder.dtype)
            masks.append(added.to(decoder.device))
    return cache, masks


def peak_bytes(job: dict[str, Any]) -> dict[str, int]:
    """This process's peaks as it fills and cuts one `kind` of cache ("model": none), and decodes.

    `job` also has names of shape, device and dtype, fields of the setting, steps and threads.
    """
    torch.set_num_threads(job["threads"])
    decoder = Decoder(SHAPES[job["shape"]], job["device"], getattr(torch, job["dtype"]))
    setting, steps = Setting(**job["setting"]), job["steps"]
    cache, masks, length = decoder.empty(), [], 0
    if job["kind"] != "model":
        cache, masks = fill_as_prefill(decoder, setting, job["kind"], steps)
        length = setting.length
    filled = _peak(job["device"], restart=True)
    ids = torch.zeros(setting.batch, 1, dtype=torch.long, device=job["device"])
    with decoder.masked(masks) if masks else nullcontext():
        for i in range(steps):
            decoder.step(cache, ids, length + i)
    decoding = _peak(job["device"])
    return {"filling": filled, "decoding": decoding, "held": held_bytes(cache)}


def _peak(device: str, restart: bool = False) -> int:
    """The peak so far; `restart` forgets it. Of processes only Linux tells."""
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status").read_text()
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def case_bytes(shape: Shape, setting: Setting, room: int, dtype: torch.dtype) -> int:
    """What one case takes at its peak, estimated from above."""
    held = shape.token_bytes(dtype) * shape.kv_heads
    longest = replace(setting, text=setting.text + room)
    dense = held * shape.layers * setting.batch * longest.length
    cut = held * longest.stored(shape.layers)
    masks = shape.layers * setting.batch * shape.kv_heads * longest.length * (2 + dtype.itemsize)
    sorting = 64 * setting.batch * shape.kv_heads * setting.visual
    # The dense one twice, as a stock cache copies itself to grow.
    return int(1.05 * (2 * dense + 3 * cut + masks + sorting)) + 2**28


def free_bytes(device: str) -> int:
    """Memory that can be had."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
