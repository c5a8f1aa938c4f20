"""Where the stages of a chain act: resolved once, as the chain is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmprune.errors import VlmpruneError
from vlmprune.method import Method

# Stands in a slot that no stage takes: a method that declares nothing and chooses nothing.
NOTHING = Method()


@dataclass(frozen=True)
class Slots:
    """The stages of a chain by where they act; a slot that none takes holds `NOTHING`.

    Attributes:
        choosing: before the language model, left to right, among them that of `encoder`.
        encoder: inside the vision encoder.
        cache: in the layers' KV caches.
        decoder: between or around decoder layers.
    """

    choosing: tuple[Method, ...]
    encoder: Method = NOTHING
    cache: Method = NOTHING
    decoder: Method = NOTHING

    @property
    def inner(self) -> Method:
        """The one stage inside the language model."""
        return self.cache if self.cache.cuts else self.decoder


@dataclass(frozen=True)
class _Single:
    """What one stage of a chain may be, and no more.

    Attributes:
        name: of its slot; empty where it has none of its own.
        takes: whether a stage is of this kind.
        place: number of the stage that alone may be it, from the end if negative; None for any.
        misplaced: what such a stage does and where it belongs, in words.
        doubled: what several would do, in words; None where that comes to a wrong place.
    """

    name: str
    takes: Callable[[Method], bool]
    place: int | None
    misplaced: str = ""
    doubled: Callable[[Sequence[Method]], str] | None = None


def _layers(stages: Sequence[Method]) -> str:
    does = "skip" if any(stage.routes for stage in stages) else "drop tokens between"
    return f"{does} decoder layers; chain only one"


# In the order in which a chain is refused for them.
_SINGLES = (
    _Single(
        "encoder",
        lambda stage: bool(stage.acts),
        0,
        "acts inside the vision encoder and must come first",
    ),
    _Single(
        "cache",
        lambda stage: stage.cuts,
        -1,
        "acts after prefill and must come last",
        lambda _: "cut the KV cache; chain only one",
    ),
    _Single(
        "decoder",
        lambda stage: stage.drops or stage.routes,
        -1,
        "acts inside the language model and must come last",
        _layers,
    ),
    _Single(
        "",
        lambda stage: stage.merges,
        None,
        doubled=lambda _: "merge visual tokens; chain only one that does",
    ),
)


def resolve(stages: Sequence[Method]) -> Slots:
    """Where each stage acts.

    Args:
        stages: left to right, none of them a chain.

    Raises:
        VlmpruneError: two of them would do what one alone can, or one stands where it cannot.
    """
    found: dict[str, Method] = {}
    for single in _SINGLES:
        own = {number: stage for number, stage in enumerate(stages) if single.takes(stage)}
        if len(own) > 1 and single.doubled is not None:
            both = " and ".join(map(repr, own.values()))
            raise VlmpruneError(f"{both} would both {single.doubled(list(own.values()))}.")
        for number, stage in own.items():
            if single.name == "decoder" and "cache" in found:
                does = "lets tokens skip" if stage.routes else "drops tokens between"
                raise VlmpruneError(
                    f"{stage!r} {does} decoder layers, whose caches {found['cache']!r} cannot cut; "
                    "chain only one of them."
                )
            if single.place is not None and number != single.place % len(stages):
                raise VlmpruneError(f"{stage!r} {single.misplaced} in a chain.")
            if single.name:
                found[single.name] = stage
    return Slots(tuple(stage for stage in stages if stage.shortens), **found)
