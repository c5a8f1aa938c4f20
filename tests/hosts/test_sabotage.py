"""The sabotage table: a fact about the host that no longer holds makes a call refused, not wrong.

Each row of `sabotage.ROWS` changes a host so that it answers by itself as before while something
that we know of it is not so. A pruned call must then equal the one to the untouched host, which
other tests prove equal to masking, or be refused in one sentence that leaves no trace, and of some
rows it is known what that sentence says (`sabotage.said`).
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import cycle, islice

import pytest
import torch

from masked import kept_columns, masking
from sabotage import ROWS, UNREAD
from sabotage.hosts import (
    DTYPES,
    HOSTS,
    METHODS,
    TOLERANCE,
    Row,
    attentions_of,
    far,
    host,
    outcomes,
    pruner,
    run,
)
from sabotage.said import SAID
from vlmprune.hosts import contract
from zoo.base import IMAGE


def cases() -> list[object]:
    """Every row with each attention and each type that it has, but not with each pair of them."""
    return [
        pytest.param(row, attention, dtype, id=f"{row.name}-{attention}-{dtype}")
        for row in ROWS
        for attention, dtype in islice(
            zip(cycle(row.attentions), cycle(row.types)), max(len(row.attentions), len(row.types))
        )
    ]


@pytest.mark.parametrize(("row", "attention", "dtype"), cases())
def test_a_changed_host_is_pruned_right_or_refused(row: Row, attention: str, dtype: str) -> None:
    said = outcomes(row, attention, dtype)
    assert (said.pop("alone")[0] == "as before") == row.alone
    assert said.keys() == set(METHODS)
    bad = {method: told for method, told in said.items() if told[0] not in ("right", "refused")}
    assert not bad
    if not row.alone:
        assert {told[0] for told in said.values()} == {"refused"}
    sentences = [sentence for told, sentence in said.values() if told == "refused"]
    for words in SAID.get(row.name, ()):
        assert any(words in sentence for sentence in sentences), f"{words!r}: {sentences}"


def test_what_is_said_is_of_rows_that_there_are() -> None:
    assert not SAID.keys() - {row.name for row in ROWS}


# Facts that are asked at every attach, contract or not, so that it is no control for them.
ASKED = {"generate hands no positions on", "generate hands no positions on, tiles"}


def test_what_is_asked_at_attach_needs_no_contract() -> None:
    asked = [row for row in ROWS if row.name in ASKED]
    assert len(asked) == len(ASKED)
    with contract.switched_off():
        for row in asked:
            said = outcomes(row, row.attentions[0], "float32")
            told = {said[method][0] for method in METHODS}
            assert told <= {"right", "refused"}


def test_the_contract_is_what_makes_the_difference() -> None:
    """The control: without it at least half of the rows answer wrong; every third is tried."""
    facts = [row for row in ROWS if row.name not in UNREAD | ASKED][::3]
    wrong: Counter[str] = Counter()
    with contract.switched_off():
        for row in facts:
            found: set[str] = set()
            for attention in row.attentions:
                said = outcomes(row, attention, "float32")
                found |= {told for told, _ in (said[method] for method in METHODS)}
                if "wrong" in found:
                    break
            wrong["wrong"] += "wrong" in found
            wrong["traceback"] += "traceback" in found and "wrong" not in found
    assert wrong["wrong"] >= len(facts) / 2, f"{wrong} of {len(facts)} rows"


RIGHT = (
    "queries come scaled, and scaling says 1, decoder",
    "queries come scaled, and scaling says 1, tower",
    "layers return tuples",
    "the cache is of a subclass",
)


@pytest.mark.oracle
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_equals_masking_on_the_untouched_host(name: str) -> None:
    """The table compares with our own answers elsewhere; here is the reference itself."""
    row = next(row for row in ROWS if row.name == name)
    found = host(row.host, "sdpa", "float32")
    inputs = found.inputs[row.batch]
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    with pytest.MonkeyPatch.context() as patch:
        model = copy.deepcopy(found.model)
        row.change(model, patch)
        with pruner("VisPruner", row, found)(model) as handle:
            few = run(model, inputs, "generate", {})
        with pruner("PLPHP", row, found)(model) as cut:
            short = run(model, inputs, "generate", {})

    untouched = copy.deepcopy(found.model)
    places = (ids == IMAGE).nonzero().split(len(handle.report.layouts[0].labels))
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    for place, kept in zip(places, handle.report.kept, strict=True):
        hidden[tuple(place.T)] = True
        hidden[tuple(place[kept].T)] = False
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
    masked = {"attention_mask": seen * ~hidden, "position_ids": positions}
    assert not far(few, run(untouched, inputs | masked, "generate", {}), "float32")
    with masking(untouched, kept_columns(cut.report, ids, IMAGE)):
        assert not far(short, run(untouched, inputs, "generate", {}), "float32")
    # The control: nothing masked.
    whole = run(untouched, inputs, "generate", {})
    assert far(few, whole, "float32") and far(short, whole, "float32")


def test_rows_have_names_of_their_own() -> None:
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS)
    assert UNREAD - names <= {"mm_encoder_outputs is called encoded"}


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_have_unusual_scales(name: str) -> None:
    """A scale that is misread as the usual one must show."""
    found = host(name, "eager", "float32")
    scales = [
        getattr(one, factor)
        for one in attentions_of(found.model)
        for factor in ("scaling", "scale")
        if hasattr(one, factor)
    ]
    assert len(scales) == len(attentions_of(found.model)) and set(scales) == {1.0, 0.125}
    assert {8**-0.5}.isdisjoint(scales)


def test_tolerances_are_those_of_the_types() -> None:
    assert TOLERANCE.keys() == DTYPES.keys() and TOLERANCE["float32"] == 1e-5
    assert all(isinstance(one, torch.dtype) for one in DTYPES.values())
