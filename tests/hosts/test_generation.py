"""Classes whose `generate` makes otherwise what sees the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

from tiny import model
from vlmprune import VisPruner, VlmpruneError


class Own(LlavaForConditionalGeneration):
    """Hands its own stopping criteria on, whatever the config says."""

    def _get_stopping_criteria(self, stopping_criteria: Any, **_: Any) -> Any:
        return stopping_criteria


def test_stopping_criteria_that_are_made_otherwise_are_refused() -> None:
    built = model()
    VisPruner(keep=4).attach(built).detach()
    built.__class__ = Own
    said = (
        r"^Own of transformers .* makes what changes scores or stops otherwise than by "
        "_get_stopping_criteria, so it would see a shortened prompt; install"
    )
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=4).attach(built)
