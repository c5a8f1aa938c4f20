"""What several stages that choose before the language model want to see at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tiny import model, request
from vlmprune import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.views import EncoderView, Reads, Selection


@dataclass(frozen=True)
class Asking(Budgeted):
    """Sends tokens of its own through the vision encoder, and keeps all."""

    def reads(self, depth: int, feature: int) -> Reads:
        return Reads(semantic=torch.zeros(2, 32))

    def select(self, view: EncoderView) -> Selection:
        return Selection(view.candidates, {})


def test_one_stage_alone_sends_tokens_of_its_own() -> None:
    built: Any = model()
    inputs = request(built, [1]).inputs
    said = r"^the stages of Asking\(keep=8.*Asking\(keep=4.* each send tokens of their own through"
    with (Asking(8) | Asking(4))(built), pytest.raises(VlmpruneError, match=said):
        built(**inputs)
