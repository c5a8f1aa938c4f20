"""How far positions are ahead of columns, as the host remembers it."""

from __future__ import annotations

import pytest

from vlmprune import VisPruner, VlmpruneError
from zoo import ZOO


def test_a_host_that_remembers_nothing_of_it_is_refused() -> None:
    built = ZOO["qwen2_vl"].build()
    VisPruner(keep=2).attach(built).detach()
    del built.model.rope_deltas
    said = (
        r"^Qwen2VLModel of transformers .* has no rope_deltas, by which positions go on after a p"
    )
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=2).attach(built)
