"""Which methods may serve, what a request's budget means, and how many tokens come of it.

Of an image vLLM wants to know before it encodes it how many placeholders it takes, and it keeps
encoder outputs by image and processor arguments, whatever the question. So a method serves only if
it looks at no text and the number that it keeps follows from the size of an image and the budget.

Imports no vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch

from vlmprune import spec
from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families import advised_positions
from vlmprune.integrations.vllm.names import VARIABLE
from vlmprune.method import Method
from vlmprune.methods.average_pooling import AveragePooling
from vlmprune.methods.evs import EVS
from vlmprune.methods.fopru import FoPru
from vlmprune.methods.prumerge import PruMerge
from vlmprune.pruner import Pruner
from vlmprune.select.budget import check_budget, check_keep
from vlmprune.views import EncoderView
from vlmprune.views.layout import Layout

# What a request calls its budget, among `mm_processor_kwargs`.
KEEP = "vlmprune_keep"
UNPRUNED = "none"
ALL = "all"

Keep = int | float | Literal["all"] | None

_SERVING = (
    "vispruner",
    "fastervlm",
    "visionzip",
    "divprune",
    "fopru",
    "vtc_cls",
    "evs",
    "random",
    "uniform",
    "average_pooling",
)


@dataclass(frozen=True)
class Policy:
    """What a server prunes with.

    Attributes:
        pruner: the server's method; None where nothing is pruned.
    """

    pruner: Pruner | None

    def method(self, keep: Keep) -> Pruner | None:
        """The method for a request; None where it is not pruned.

        Args:
            keep: as the request gives it; None where it gives none.

        Raises:
            VlmpruneError: it is no budget, or the server's method takes none.
        """
        if keep is None or self.pruner is None:
            if keep not in (None, ALL):
                raise VlmpruneError(
                    f"{KEEP}={keep!r} has no method to give it to, as the server runs with "
                    f"{VARIABLE}={UNPRUNED}; leave it out, or start the server with a method."
                )
            return self.pruner
        if isinstance(keep, str):
            if keep != ALL:
                raise VlmpruneError(
                    f"{KEEP}={keep!r} is not a budget; use a number of visual tokens, a fraction "
                    f'in (0, 1], or "{ALL}".'
                )
            return None
        try:
            check_keep(keep)
        except VlmpruneError as error:
            raise VlmpruneError(f"{KEEP}: {error}") from None
        if len(list(self.pruner.links)) > 1:
            raise VlmpruneError(
                f"{KEEP}={keep!r} does not say which method of {self.pruner!r} it is for; leave it "
                f'out, or use "{ALL}" for all visual tokens.'
            )
        method: Any = self.pruner
        return replace(method, keep=keep)

    def name(self, keep: Keep) -> str:
        """The method for a request in words that no other method or setting shares."""
        method = self.method(keep)
        return UNPRUNED if method is None else spec.dump(method)


def from_environment() -> Policy:
    """What the variable VLMPRUNE asks for.

    Raises:
        VlmpruneError: the spec is wrong, or its method cannot serve.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text or text == UNPRUNED:
        return Policy(None)
    pruner = spec.parse(text)
    check(pruner)
    return Policy(pruner)


def check(pruner: Pruner) -> None:
    """Refuse a method that cannot serve.

    Raises:
        VlmpruneError: one sentence says why, and which methods serve.
    """
    stages = list(pruner.links)
    for number, stage in enumerate(stages):
        why = _unfit(stage) or _unfit_chain(stages, number)
        if why:
            raise VlmpruneError(
                f"method {_name(stage)!r} cannot serve in vLLM, as it {why}; use one of "
                f"{', '.join(_SERVING)}, with a budget that is a number."
            )


def _unfit(stage: Method) -> str:
    """Why a method cannot serve, in a few words; empty if it can."""
    if stage.drops or stage.cuts or not stage.shortens:
        return "acts inside the language model"
    if not stage.text_agnostic:
        return "looks at the question, and vLLM keeps encoded images for any question"
    if stage.acts:
        return "acts inside the vision encoder"
    if isinstance(stage, PruMerge) or getattr(stage, "keep", None) is None:
        return "keeps a number of tokens that is known only once the image is encoded"
    if isinstance(stage, FoPru) and stage.choose == "row":
        return "keeps whole rows (choose='row')"
    if getattr(stage, "score", "auto") == "pooling":
        return "reads a pooling head (score='pooling'), which vLLM does not build"
    if _name(stage) not in _SERVING:
        return "is not adapted to it"
    return ""


def _unfit_chain(stages: list[Method], number: int) -> str:
    """Why a method cannot serve where it stands in a chain."""
    stage = stages[number]
    if len(stages) > 1 and isinstance(stage, EVS | AveragePooling):
        return "counts its tokens by what other methods of the chain leave"
    units = {getattr(one, "budget", "crop") for one in stages}
    if len(units) > 1:
        return f"is chained with a method whose budget counts something else ({units})"
    return ""


def _name(stage: Method) -> str:
    return spec.name_of(stage) or repr(stage)


def count(method: Pruner | None, layout: Layout) -> int:
    """Visual tokens that are left of an image or video, newlines included where they are kept.

    Args:
        method: None where it is not pruned.
        layout: of the image or video.

    Raises:
        VlmpruneError: the method's budget counts something that there is not.
    """
    if method is None:
        return len(layout.labels)
    candidates = layout.candidates()
    video = layout.kind == "video"
    stages: list[Any] = list(method.links)
    for stage in stages:
        check_budget(getattr(stage, "budget", "crop"), video or isinstance(stage, EVS))
    nothing = torch.zeros(*candidates.shape, 1)
    view = EncoderView(
        nothing[..., 0],
        nothing,
        candidates,
        (0,) * layout.crops,
        (layout.grid,) * layout.crops,
        (video,),
        projected=nothing,
    )
    if isinstance(method, EVS | AveragePooling):
        # Their numbers depend on shapes in a way of their own, but on nothing else.
        return int(method.select(view).kept.sum()) + layout.left_newlines(method.newlines)
    left = view.counts(stages[0].budget)
    for stage in stages:
        left = [stage.kept_of(n) if n else 0 for n in left]
    return sum(left) + layout.left_newlines(method.newlines)


def positions(policy: Policy, config: Any) -> Literal["compact", "original"]:
    """What kept tokens have as positions: the method's word, else the config's advice, else new.

    Args:
        policy: the server's.
        config: Transformers' config of the model.
    """
    asked = "auto" if policy.pruner is None else policy.pruner.positions
    text = getattr(config, "text_config", config)
    if not has_plain_positions(text):
        if asked == "compact":
            raise VlmpruneError(
                "positions='compact' would destroy the three positions that this model gives a "
                "visual token; use positions='original' or 'auto'."
            )
        return "original"
    if asked != "auto":
        return asked
    return advised_positions(SimpleNamespace(config=config)) or "compact"


def check_length(config: Any, length: int, dropped: int, longest: int) -> None:
    """Refuse a prompt whose original positions would go beyond the model's.

    vLLM holds lengths after pruning against the longest prompt, but angles of positions are made
    for so many positions alone.

    Args:
        config: Transformers' config of the model.
        length: of the prompt after pruning.
        dropped: tokens that pruning took out of it.
        longest: of a prompt and its answer, after pruning.

    Raises:
        VlmpruneError: the prompt has too many tokens.
    """
    text = config.get_text_config()
    if not has_plain_positions(text):
        return
    most = text.max_position_embeddings
    needed = length + dropped if can_extend(text) else longest + dropped
    if needed > most:
        raise VlmpruneError(
            f"the prompt has {length + dropped} tokens before pruning, and its answer more, but "
            f"the model has {most} positions; send fewer images, or use positions=compact."
        )


def has_plain_positions(text: Any) -> bool:
    """Whether a language model has one number for a position."""
    return "mrope_section" not in (getattr(text, "rope_parameters", None) or {})


def can_extend(text: Any) -> bool:
    """Whether more angles can be made for a language model than its config has positions."""
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") in ("default", "llama3")


def settings(mapping: Mapping[str, object]) -> tuple[Keep, dict[str, object]]:
    """A request's budget, and its processor arguments without it."""
    left = dict(mapping)
    keep: Any = left.pop(KEEP, None)
    return keep, left
