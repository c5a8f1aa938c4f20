"""The loss of a shorter request: each column that is left predicts the next one that is left."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import IMAGE, Request, dropped_columns, model, request
from vlmprune import VisPruner, VlmpruneError

pytestmark = pytest.mark.oracle


def losses(req: Request, logits: Tensor, dropped: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss of each labelled column, from the logits of the last real one that is left before it."""
    found = []
    left = (req.inputs["attention_mask"] != 0) & ~dropped
    for row, (stays, own) in enumerate(zip(left, labels, strict=True)):
        places = stays.nonzero()[:, 0].tolist()
        for before, after in pairwise(places):
            if own[after] != -100:
                scores = logits[row, before].log_softmax(-1)
                found.append(-scores[own[after]])
    return found


@pytest.mark.parametrize("answers", ["text", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_masked_model(side: str, answers: str) -> None:
    built = model()
    req = request(built, [2, 1], text=[3, 7], side=side)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    # A word behind an image is predicted by a visual token, of those that are left the last.
    # Nothing that is left predicts a row's first one.
    hidden = (mask == 0) | (mask.cumsum(1) < 2) | ((ids == IMAGE) if answers == "text" else False)
    labels = ids.masked_fill(hidden, -100)
    moved = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    given: dict[str, Any] = {"labels": labels}
    with VisPruner(keep=4)(built) as handle, torch.no_grad():
        plain = built(**req.inputs, **given).loss
        shifted = built(**req.inputs, **given, shift_labels=moved).loss
        # The labels only ask for a loss then.
        alone = built(**req.inputs, labels=ids, shift_labels=moved).loss
        count = built(**req.inputs, **given, shift_labels=moved, num_items_in_batch=10).loss
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report.kept)
    seen = {"attention_mask": mask * ~dropped}
    seen["position_ids"] = torch.arange(ids.shape[1]) - dropped.long().cumsum(1)
    with torch.no_grad():
        logits = built(**(req.inputs | seen)).logits
    own = losses(req, logits, dropped, labels)
    expected = torch.stack(own).mean()
    for loss in (plain, shifted, alone):
        assert float((loss - expected).abs()) < 1e-5
    assert float((count * 10 - torch.stack(own).sum()).abs()) < 1e-3
    # Were they gathered as they are, a column would predict what came behind it before.
    wrong = torch.cat(
        [
            logits[row, stays]
            .log_softmax(-1)
            .gather(1, moved[row, stays, None].clamp(min=0))[:, 0][moved[row, stays] != -100]
            for row, stays in enumerate((mask != 0) & ~dropped)
        ]
    )
    assert float((-wrong.mean() - expected).abs()) > 1e-3


def test_what_the_last_column_predicts_stays_with_it() -> None:
    """Of a sequence that goes on elsewhere, as under context parallelism."""
    built = model()
    req = request(built, [1])
    ids = req.inputs["input_ids"]
    moved = torch.full_like(ids, -100)
    moved[:, -1] = 9
    given = {"labels": ids, "shift_labels": moved}
    with VisPruner(keep=4)(built), torch.no_grad():
        out = built(**req.inputs, **given)
    expected = -out.logits[0, -1].log_softmax(-1)[9]
    assert float((out.loss - expected).abs()) < 1e-6


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_length_are_refused(name: str) -> None:
    built = model()
    req = request(built, [1])
    given = {"labels": req.inputs["input_ids"]}
    given[name] = req.inputs["input_ids"][:, 2:]
    with VisPruner(keep=4)(built), pytest.raises(VlmpruneError, match=f"^{name} .* columns where"):
        built(**req.inputs, **given)
