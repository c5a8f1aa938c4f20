"""What the tests prove of each model with a record: the table from which they are made.

`tests/hosts/families/test_every_family.py` and its like prove what stands here, and that what is
left out is refused; `vlmprune models` and docs/models.md show it. A model that is not here, or of
which more is said than holds, makes a test fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlmprune.hosts.families.record import Family

Stage = Literal["attention", "features", "cut", "read", "rows"]

# Where methods of a kind act, and the one with which the tests prove it.
STAGES: Mapping[Stage, tuple[str, str]] = {
    "attention": ("before the language model, by the encoder's attention", "VisPruner"),
    "features": ("before the language model, by features alone", "DivPrune"),
    "cut": ("on the KV cache, after the prompt", "PLPHP"),
    "read": ("on the KV cache, step by step", "Recall"),
    "rows": ("between decoder layers", "FastV"),
}
ATTENTION: Sequence[str] = ("sdpa", "eager")
STEPS = 6
# Prompts of a batch, padded where there are several; each a list of what it holds.
BATCHES: Mapping[str, Sequence[Sequence[str]]] = {
    "one image": [["image"]],
    "several images": [["image", "image", "image"]],
    "padded batch": [["image", "image"], ["image"], []],
}
VIDEO_BATCHES: Mapping[str, Sequence[Sequence[str]]] = {
    "one video": [["video"]],
    "mixed": [["video", "image"], ["image", "video", "image"], []],
}

# Models whose names are not their record's, or of which one has several that differ in what is
# proved: their names here, and for users.
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "llava:pixtral": {"pixtral": "Pixtral"},
    "paligemma": {"paligemma": "PaliGemma", "paligemma2": "PaliGemma 2"},
    "gemma4": {"gemma4": "Gemma 4", "gemma4_small": "Gemma 4 (E2B, E4B)"},
}
_RECURRENT: Mapping[Stage, str] = {
    "rows": "linear attention, whose state every token passes through"
}
_CAPPED: Mapping[Stage, str] = {"cut": "attention is capped", "read": "attention is capped"}
_BY_TOKEN: Mapping[Stage, str] = {"rows": "takes per_layer_input of each token"}
# What is refused at attach, and words of the sentence that says so.
REFUSED: Mapping[str, Mapping[Stage, str]] = {
    "paligemma2": _CAPPED,
    "mistral_large4": {
        "cut": "caches a latent",
        "read": "caches a latent",
        "rows": "indexed attention, which cannot be followed",
    },
    "gemma4_small": _BY_TOKEN,
    "gemma3n": {"attention": "a convolutional vision tower, in which nothing attends", **_BY_TOKEN},
    "gemma4_unified": {"attention": "has no vision encoder"},
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
}


@dataclass(frozen=True)
class Proved:
    """What is proved of a model.

    Attributes:
        model: its name in the tests.
        record: the key of its record.
        name: as users call it.
        media: its modalities.
        together: whether images and videos may stand in one prompt.
        refused: for each kind of methods that is refused words of the reason.
    """

    model: str
    record: str
    name: str
    media: tuple[str, ...]
    together: bool
    refused: Mapping[Stage, str]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The kinds of methods that are proved."""
        return tuple(stage for stage in STAGES if stage not in self.refused)

    @property
    def batches(self) -> Mapping[str, Sequence[Sequence[str]]]:
        """The batches that are proved, by name."""
        return {**BATCHES, **VIDEO_BATCHES} if "video" in self.media else BATCHES

    @property
    def words(self) -> str:
        """The same in a sentence for users."""
        media = " and ".join(f"{one}s" for one in self.media)
        if len(self.media) > 1:
            media += ", both in one prompt too" if self.together else ", in prompts of their own"
        because: dict[str, list[str]] = {}
        for stage, why in self.refused.items():
            because.setdefault(why, []).append(STAGES[stage][1])
        left = [f"{' and '.join(names)} ({why})" for why, names in because.items()]
        but = f" but such as {', '.join(left)}" if left else ""
        return f"{media}; every kind of method{but}"


def table(families: Mapping[str, Family]) -> dict[str, Proved]:
    """What is proved, model by model, in the records' order.

    Args:
        families: the package's own records by their key.
    """
    out = dict[str, Proved]()
    for key, family in families.items():
        media = tuple(one.kind for one in family.media)
        together = len({one.token for one in family.media}) == len(media)
        for model, name in VARIANTS.get(key, {key: family.name}).items():
            out[model] = Proved(model, key, name, media, together, REFUSED.get(model, {}))
    return out
