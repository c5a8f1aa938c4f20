"""Arguments of decoder layers with an entry a token: gathered where they are known, else told."""

from __future__ import annotations

import pytest
import torch

from tiny import model, request
from vlmprune import FastV, VlmpruneError


def test_an_argument_of_each_token_that_nobody_knows_is_told() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    columns = inputs["input_ids"].shape[1]
    said = "^the decoder layers take weights_of of each token, of which tokens cannot be dropped; "
    with FastV(keep=4)(built), torch.no_grad():
        # What has no entry a token goes on as it is.
        built(**inputs, weights_of=torch.ones(1, columns + 1))
        with pytest.raises(VlmpruneError, match=said):
            built(**inputs, weights_of=torch.ones(1, columns))
