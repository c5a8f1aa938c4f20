"""CDPruner: visual tokens that differ from each other, weighted by the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlmprune import select
from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import scoring
from vlmprune.select.settings import check_choice
from vlmprune.views import EncoderView, Reads, Selection

Asked = Literal["bare", "prompt"]


@dataclass(frozen=True)
class CDPruner(Budgeted):
    """Keep visual tokens that differ from each other, conditioned on the question.

    A determinantal point process over cosines of the projected features, each row and column
    weighted by the token's relevance; its most probable set is sought greedily. Relevance is the
    mean cosine to the parts of the question, negated by a text tower, scaled from 0 to 1.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
    MLLMs", arXiv 2506.10967 (NeurIPS 2025), section 3; given the relevance it chooses the same
    tokens as the authors' code does in float32.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        budget: "crop" gives each crop the same number of tokens (as the release does), "image"
            shares one number among all crops of an image; of a video "frame" and "clip".
        text_tower: where the relevance comes from. "auto" takes the model's own text tower where
            it has one, else the language model's text embeddings, and the report says which; the
            folder or id of a CLIP model takes its text tower, as the release does with the model
            that the vision tower is of.
        question: what a text tower compares with: "bare", the last question of the prompt, as the
            release does, without the words of a chat template and without the instructions of
            LLaVA's evaluation ("Answer the question using a single word or phrase." and the one
            for options); "prompt", all text behind the image, as vlmprune 0.1 did. The language
            model's embeddings are of all text behind the image in either case.
        newlines: "keep" or "drop" (as the release does), by name only: whether newline tokens are
            kept, see `WithBudget`.

    Where it deviates from the release: relevance is scaled over each image, where the release
    scales over all crops that come together, and is 1 where all tokens are alike; without a text
    tower the language model's embeddings stand in; the question is found in the prompt, where the
    release is given it beside the prompt; ties go to the lower index; newline tokens are by default
    kept and not counted.

    Shapes: projected [crops, N, D], relevance [crops, N] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    text_tower: str = "auto"
    question: Asked = "bare"

    needs: ClassVar[str] = "projected features, the question, a text tower (else text embeddings)"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2506.10967"
    text_agnostic: ClassVar[bool] = False
    former: ClassVar[Mapping[str, Any]] = {"question": "prompt"}
    added: ClassVar[Mapping[str, Any]] = {"newlines": "keep", "question": "prompt"}
    attends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.text_tower, str) or not self.text_tower:
            raise VlmpruneError(
                f"text_tower={self.text_tower!r} is no source of relevance; use 'auto', or the "
                "folder or id of a CLIP model."
            )

        check_choice("question", self.question, Asked)

    def reads(self, depth: int, feature: int) -> Reads:
        """The projected features and their relevance to the question."""
        return Reads(projected=True, relevance=self.text_tower, asked=self.question)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        assert view.projected is not None and view.relevance is not None
        features = view.projected.flatten(0, 1)
        images = torch.tensor(view.images, device=view.relevance.device)
        cosine = -view.relevance if view.by_words else view.relevance
        weights = scoring.relevance(cosine, view.candidates, images).flatten()
        kept = self.each(
            view,
            lambda cells, keep: select.conditional_dpp(features[cells], weights[cells], keep),
        )
        return Selection(kept, {"diverse": kept})
