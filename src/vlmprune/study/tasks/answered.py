"""One question's answer: what was said, how right it is, and what it cost."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from vlmprune.costs.units import known, ready
from vlmprune.errors import VlmpruneError

# Fields that a model's config may leave unknown.
_COSTS = ("decoder_flops", "flops", "kv_bytes", "kv_read")


@dataclass(frozen=True)
class Answered:
    """One sample's answer.

    Figures of cost are those of a prefill by the published formulas, as the pruner reports them.
    Samples that were answered together share their batch's figures alike. What the model's config
    does not tell is NaN, and None in `as_dict`.

    Attributes:
        id: the sample's.
        group: the pictures that it shares with other samples.
        kind: of the question.
        answer: the text.
        score: 0 to 1; None where the true answer is not known.
        visual_tokens: that the language model's layers saw, on average over the layers.
        visual_tokens_before: that it would have seen without pruning.
        decoder_flops: of the language model on the visual tokens.
        decoder_flops_before: without pruning.
        flops: the same with the vision tower's, once for each question.
        flops_before: without pruning.
        kv_bytes: of the visual tokens' keys and values once the prompt is read; of a cache that is
            read in part those on the device, sketches included.
        kv_bytes_before: without pruning.
        seconds: wall time; of what was done for several samples at once, the sample's share.
        kv_read: bytes for visual tokens that a decode step reads; by default all that are held.
    """

    id: str
    group: str
    kind: str
    answer: str
    score: float | None
    visual_tokens: float
    visual_tokens_before: float
    decoder_flops: float
    decoder_flops_before: float
    flops: float
    flops_before: float
    kv_bytes: float
    kv_bytes_before: float
    seconds: float
    kv_read: float = -1.0

    def __post_init__(self) -> None:
        if self.kv_read < 0:
            object.__setattr__(self, "kv_read", self.kv_bytes)

    @property
    def kv_read_before(self) -> float:
        """Without pruning a step reads all that is held."""
        return self.kv_bytes_before

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Answered:
        """What `as_dict` made of one; unknown names are passed over.

        Raises:
            VlmpruneError: something is missing.
        """
        missing = [
            one.name for one in fields(cls) if one.default is MISSING and one.name not in given
        ]
        if missing:
            raise VlmpruneError(
                f"a stored result lacks {', '.join(missing)}; evaluate anew into another file."
            )
        names = {one.name for one in fields(cls)}
        found = {name: value for name, value in given.items() if name in names}
        costs = {f"{name}{when}" for name in _COSTS for when in ("", "_before")} & found.keys()
        return cls(**found | {name: known(found[name]) for name in costs})

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        made: dict[str, Any] = ready(asdict(self))
        return made
