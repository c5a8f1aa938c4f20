"""What enters the language model of a request, for models of which placeholders alone are known.

The host's own forward is run up to its language model and no further. Images are encoded by it as
ever, so nothing need be known of how.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import contract, decoder
from vlmprune.hosts.entrance import EntranceCall, EntranceReachedError
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.encoder.encode import Encoded
from vlmprune.runtime.geometry import Geometry
from vlmprune.runtime.hooks import Hooks
from vlmprune.views import EncoderView


@dataclass(frozen=True)
class Entered:
    """What a request hands to the language model.

    Attributes:
        call: as the host makes it; without the tensors that are below.
        embedded: [B, L, D] the prompt.
        positions: [3 or more, B, L]; None for a model that has one position a column.
    """

    call: EntranceCall
    embedded: Tensor
    positions: Tensor | None


def entered(model: Any, forward: Callable[..., Any], call: ModelCall) -> Entered:
    """Run a forward up to the language model.

    Args:
        model: the host.
        forward: its own.
        call: a whole request, without a cache.

    Raises:
        ContractError: the language model is given something else than an embedded prompt.
    """
    seen = list[EntranceCall]()

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(EntranceCall(kwargs))
        raise EntranceReachedError

    with Hooks() as hooks:
        hooks.before(decoder.decoder_of(model), stop)
        with suppress(EntranceReachedError):
            call.run(forward)
    ids = call.ids
    assert ids is not None
    embedded = seen[0].embedded if seen else None
    if embedded is None or embedded.shape[:2] != ids.shape:
        raise contract.broken(model, "its language model is not given an embedded prompt")
    positions = None
    if decoder.turns_in_three(model):
        positions = seen[0].positions
        if positions is None or positions.ndim != 3:
            raise contract.broken(
                model, "its language model is not given three positions of each column"
            )
    return Entered(seen[0], embedded, positions)


def view_of(found: Entered, geometry: Geometry) -> Encoded:
    """What a method sees that needs no more than to know how many visual tokens there are.

    A run of placeholders is a crop, and what enters the language model its features.
    """
    rows = [found.embedded[one.span.row, one.span.columns] for one in geometry.items]
    wide = [torch.nn.functional.pad(row, (0, 0, 0, geometry.cells - len(row))) for row in rows]
    stacked = torch.stack(wide).detach()
    view = EncoderView(
        stacked.new_zeros(stacked.shape[:2], dtype=torch.float32),
        stacked,
        geometry.candidates,
        geometry.images,
        tuple(one.grid for one in geometry.layouts),
        tuple(one.kind == "video" for one in geometry.layouts),
    )
    return Encoded({}, view, "", stacked, entered=found)
