"""What methods that drop tokens between layers need of a decoder, told at attach."""

from __future__ import annotations

import pytest

from tiny import model
from vlmprune import FastV, VlmpruneError


def test_renumbering_needs_a_module_that_makes_rotary_angles() -> None:
    built = model()
    decoder = built.model.language_model
    FastV(keep=4, positions="compact").attach(built).detach()
    decoder.rotary_emb.__class__ = type("Angles", (type(decoder.rotary_emb),), {})
    said = "^Llava.* has no module that makes rotary angles, so tokens cannot be renumbered inside"
    with pytest.raises(VlmpruneError, match=said):
        FastV(keep=4, positions="compact").attach(built)
    FastV(keep=4, positions="original").attach(built).detach()
