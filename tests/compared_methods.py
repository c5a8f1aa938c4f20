"""Methods that a comparison is tried with: one that is a control, and one that refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.views import EncoderView, Selection


@dataclass(frozen=True)
class First(Budgeted):
    """Keep the first tokens: a control whose choice needs no library."""

    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True

    def select(self, view: EncoderView) -> Selection:
        kept = torch.zeros_like(view.candidates)
        kept[:, : round(self.keep * kept.shape[1])] = True
        return Selection(kept, {})


@dataclass(frozen=True)
class Refusing(Budgeted):
    """A method that the request lacks something for."""

    paper: ClassVar[str] = "arXiv 0000.00000"

    def select(self, view: EncoderView) -> Selection:
        raise NotImplementedError

    def check_request(self, *_: Any) -> None:
        raise VlmpruneError("Refusing needs a video; use random.")
