"""The question of a request as the language model itself reads it: its state at the last token.

The question is the text of a row behind its last image, up to the first token of an answer; where
there is none behind it, all text of the row. It passes the host's own decoder alone, without any
visual token and without anything dropped.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config
from vlmprune.hosts.decoder import states_alone
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.encoder.relevance import Question
from vlmprune.runtime.geometry import Geometry
from vlmprune.runtime.scope import Scope, under

WORDS = "the language model's state of the question"


def of_row(question: Question, row: int, bos: int | None = None) -> Tensor:
    """[n] int64; ids of the question that a row asks.

    Args:
        question: the request's columns.
        row: which.
        bos: a token that goes before the question if the row begins with it.

    Raises:
        VlmpruneError: the row holds no text but an answer.
    """
    text = question.text(row)
    ids, columns = question.ids[row], torch.arange(len(text), device=text.device)
    seen = columns[question.visual[row]]
    behind = text & (columns > seen[-1]) if len(seen) else text
    chosen = behind if bool(behind.any()) else text
    if not bool(chosen.any()):
        raise VlmpruneError(
            f"row {row} holds an image and no question, which this method looks at; ask one, or "
            "use a method that does not look at it."
        )
    first = columns[question.mask[row]][:1]
    if bos is not None and bool((ids[first] == bos).all()):
        chosen = chosen.clone()
        chosen[first] = True
    return ids[chosen]


def check(question: Question, geometry: Geometry) -> None:
    """Refuse, before anything is encoded, an image that nothing is asked about.

    Raises:
        VlmpruneError: a row holds an image and no text.
    """
    for row in {item.span.row for item in geometry.items}:
        of_row(question, row)


def states(attachment: Attachment, question: Question, geometry: Geometry) -> Tensor:
    """[crops, D] state of the question behind the last layer, for each crop that of its row.

    Questions of one length run together and none is padded, so that neither the padding of the
    request nor the other rows matter, whatever mask the decoder would make of them.

    Args:
        attachment: of the method to the model.
        question: the request's columns.
        geometry: that of the items.
    """
    model = attachment.model
    bos = config.bos_id(model.config)
    rows = sorted({item.span.row for item in geometry.items})
    found = {row: of_row(question, row, bos) for row in rows}
    lengths: dict[int, list[int]] = defaultdict(list)
    for row, ids in found.items():
        lengths[len(ids)].append(row)
    last: dict[int, Tensor] = {}
    # A call of this attachment, of which nothing is cut or dropped.
    with under(Scope(attachment)):
        for own in lengths.values():
            ids = torch.stack([found[row] for row in own])
            last |= dict(zip(own, states_alone(model, ids)[:, -1], strict=True))
    crops = [item.span.row for item in geometry.items for _ in range(item.layout.crops)]
    return torch.stack([last[row] for row in crops])
