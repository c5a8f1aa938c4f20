"""What `bench` measured: figures of each way, and how they stand against each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmprune.costs.units import ready


@dataclass(frozen=True)
class Quartiles:
    """What was measured in all turns.

    Attributes:
        median: of the values.
        low: first quartile.
        high: third quartile.
        values: one a turn.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Quartiles | None:
        """Those of some values; None of none."""
        if not values:
            return None
        low = middle = high = values[0]
        if len(values) > 1:
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, tuple(values))

    @property
    def share(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Figures:
    """One way. Sums go over all rows of the batch.

    Attributes:
        name: the method's spec, `ALL_TOKENS`, or the floor's number of tokens.
        visual_tokens: that the language model saw; where a method drops tokens inside it, those
            that reached its last layer.
        first_ms: from the call to the first token; vision tower and selection included.
        prefill_ms: of it the language model's layers on the prompt; None where that is not seen.
        selecting_ms: of it what choosing took, without the encoder; None for all tokens.
        decode_tokens_per_second: after the first token; None where there is no second.
        total_ms: the whole call, from end to end.
        visual_kv_bytes: that the visual tokens' keys and values take, by the formula; of a cache
            that is read in part those on the device, sketches included.
        visual_read_bytes: bytes for visual tokens that a decode step reads.
        visual_host_bytes: of the visual tokens' keys and values in host memory.
        cache_bytes: of all keys and values held after the last token, of text as well.
        peak_bytes: most memory that a call held at once, beyond weights and inputs, as
            `measure.peak_bytes` has it; None where it was not asked for on a CPU.
        flops: of prefill on visual tokens, vision tower included, by the published formula.
        first_tokens: id of each row's first new token.
    """

    name: str
    visual_tokens: int
    first_ms: Quartiles
    prefill_ms: Quartiles | None
    selecting_ms: Quartiles | None
    decode_tokens_per_second: Quartiles | None
    total_ms: Quartiles
    visual_kv_bytes: float
    visual_read_bytes: float
    visual_host_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    flops: float
    first_tokens: tuple[int, ...]

    def against(self, full: Figures) -> dict[str, Any]:
        """How many times faster or smaller this way is than another, and what it changes.

        Speed-ups are ratios of medians; above 1 this way is the better one. `selecting_share` is
        the part that choosing takes of the other's time to the first token. A ratio of what is
        unknown is None.
        """
        peak = None
        if self.peak_bytes and full.peak_bytes:
            peak = full.peak_bytes / self.peak_bytes
        pairs = zip(self.first_tokens, full.first_tokens, strict=True)
        selecting = self.selecting_ms
        return {
            "first_token_speedup": full.first_ms.median / self.first_ms.median,
            "prefill_speedup": _ratio(full.prefill_ms, self.prefill_ms),
            "decode_speedup": _ratio(self.decode_tokens_per_second, full.decode_tokens_per_second),
            "total_speedup": full.total_ms.median / self.total_ms.median,
            "selecting_share": selecting and selecting.median / full.first_ms.median,
            "visual_kv_ratio": _times(full.visual_kv_bytes, self.visual_kv_bytes),
            "visual_read_ratio": _times(full.visual_read_bytes, self.visual_read_bytes),
            "cache_ratio": full.cache_bytes / self.cache_bytes,
            "peak_ratio": peak,
            "flops_ratio": _times(full.flops, self.flops),
            "same_first_tokens": sum(mine == theirs for mine, theirs in pairs),
        }

    def over(self, prefill: Figures, decode: Figures) -> dict[str, float | None]:
        """This way's times as multiples of its floors'; 1 is as good as it gets."""
        rates = decode.decode_tokens_per_second, self.decode_tokens_per_second
        return {
            "first_token": self.first_ms.median / prefill.first_ms.median,
            "prefill": _ratio(self.prefill_ms, prefill.prefill_ms),
            "decode": _ratio(*rates),
        }


def _times(one: float, other: float) -> float | None:
    """How many times larger one figure is; None where one is unknown, or the other nothing."""
    return None if not other or math.isnan(one) or math.isnan(other) else one / other


def _ratio(one: Quartiles | None, other: Quartiles | None) -> float | None:
    """Of the medians; None where one is missing or nothing."""
    return one.median / other.median if one and other and other.median else None


@dataclass(frozen=True)
class BenchResult:
    """All ways over the same work.

    Attributes:
        model: its label.
        dtype: of its weights.
        device: the model's, as torch calls it.
        batch: rows.
        images: pictures of each prompt.
        prompt_tokens: length of the longest prompt, visual tokens included.
        new_tokens: generated in each row, end tokens ignored.
        repeat: turns.
        full: with all visual tokens.
        methods: the others.
        floors: natively short prompts; see `vlmprune.study.bench.floor`.
        floor_of: the names of each method's floors for prefill and for decoding, which may be
            that of all tokens.
        no_floor: why there is none, where it was asked for.
    """

    model: str
    dtype: str
    device: str
    batch: int
    images: int
    prompt_tokens: int
    new_tokens: int
    repeat: int
    full: Figures
    methods: tuple[Figures, ...]
    floors: tuple[Figures, ...] = ()
    floor_of: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    no_floor: str = ""

    def floor(self, method: Figures) -> tuple[Figures, Figures] | None:
        """A method's floors for prefill and for decoding; None where none was measured."""
        if method.name not in self.floor_of:
            return None
        known = {one.name: one for one in (self.full, *self.floors)}
        prefill, decode = self.floor_of[method.name]
        return known[prefill], known[decode]

    def as_dict(self) -> dict[str, Any]:
        """Everything that JSON can hold, the comparisons included; None for what is unknown."""
        apart = ("full", "methods", "floors", "floor_of")
        out = {k: v for k, v in asdict(self).items() if k not in apart}
        out["all_tokens"] = asdict(self.full)
        out["methods"] = []
        for one in self.methods:
            made = asdict(one) | {"against_all_tokens": one.against(self.full)}
            floor = self.floor(one)
            if floor is not None:
                made |= {"floor": floor[0].name, "decode_floor": floor[1].name}
                made |= {"times_the_floor": one.over(*floor)}
            out["methods"].append(made)
        out["floors"] = [
            asdict(one) | {"against_all_tokens": one.against(self.full)} for one in self.floors
        ]
        content: dict[str, Any] = ready(out)
        return content
