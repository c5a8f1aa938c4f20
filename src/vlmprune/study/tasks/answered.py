"""One question's answer: what was said, how right it is, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vlmprune.errors import VlmpruneError


@dataclass(frozen=True)
class Answered:
    """One sample's answer.

    Figures of cost are those of a prefill by the published formulas, as the pruner reports them.
    Samples that were answered together share their batch's figures alike.

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
        kv_bytes: of the visual tokens' keys and values once the prompt is read.
        kv_bytes_before: without pruning.
        seconds: wall time; of what was done for several samples at once, the sample's share.
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

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Answered:
        """What `dataclasses.asdict` made of one; unknown names are passed over.

        Raises:
            VlmpruneError: something is missing.
        """
        names = [one.name for one in fields(cls)]
        missing = [name for name in names if name not in given]
        if missing:
            raise VlmpruneError(
                f"a stored result lacks {', '.join(missing)}; evaluate anew into another file."
            )
        return cls(**{name: given[name] for name in names})
