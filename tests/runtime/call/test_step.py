"""A forward within a pruned `generate`: what the host must hand on."""

from __future__ import annotations

from typing import Any

import pytest

from sabotage.tools import recast
from tiny import model, request
from vlmprune import VisPruner, VlmpruneError


def test_a_generate_that_embeds_its_prompt_itself_is_told() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    plain = type(built).prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = plain(self, *args, **kwargs)
        made["inputs_embeds"] = self.get_input_embeddings()(made.pop("input_ids"))
        return made

    recast(built, prepare_inputs_for_generation=prepare)
    told = pytest.raises(VlmpruneError, match="a forward within generate is given no input_ids")
    with VisPruner(keep=4)(built), told:
        built.generate(**inputs, max_new_tokens=2, do_sample=False)
