"""Settings may be NumPy's numbers, which become Python's own; its booleans are no numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from tiny import model, request
from vlmprune import (
    DART,
    PLPHP,
    FastV,
    PruMerge,
    PyramidDrop,
    RandomTokens,
    Recall,
    VisionZip,
    VisPruner,
    VlmpruneError,
    VtcCls,
    ZipVL,
    spec,
)
from vlmprune.select import settings

CASES = [
    (VisPruner, {"keep": 4, "important_ratio": 0.5}),
    (VisPruner, {"keep": 0.25}),
    (VisionZip, {"keep": 6, "contextual_ratio": 0.5}),
    (PruMerge, {"keep": 6, "neighbours": 3}),
    (RandomTokens, {"keep": 4, "seed": 7}),
    (VtcCls, {"keep": 4, "first_layer": 1}),
    (FastV, {"keep": 4, "layer": 1}),
    (DART, {"keep": 4, "layer": 1}),
    (PyramidDrop, {"ratio": 0.5, "stages": 2}),
    (PLPHP, {"r": 0.5, "dr": 0.25}),
    (ZipVL, {"tau": 0.5}),
    (Recall, {"read": 4}),
    (Recall, {"read": 0.25}),
]
KINDS: dict[type, tuple[type, ...]] = {
    int: (np.int64, np.int32, np.uint8),
    float: (np.float64, np.float32),
}


def as_numpy(given: dict[str, Any], which: int) -> dict[str, Any]:
    made = {}
    for name, value in given.items():
        kinds = KINDS[type(value)]
        made[name] = kinds[which % len(kinds)](value)
    return made


@pytest.mark.parametrize(("cls", "given"), CASES)
def test_they_are_taken_for_pythons_own(cls: Any, given: dict[str, Any]) -> None:
    own = cls(**given)
    for which in range(3):
        other = cls(**as_numpy(given, which))
        assert other == own and repr(other) == repr(own) and hash(other) == hash(own)
        assert spec.dump(other) == spec.dump(own)
        for one in fields(other):
            assert type(getattr(other, one.name)) is type(getattr(own, one.name)), one.name


@pytest.mark.parametrize("name", ["keep", "layer"])
@pytest.mark.parametrize("value", [np.True_, np.False_, True])
def test_booleans_are_no_numbers(name: str, value: Any) -> None:
    with pytest.raises(VlmpruneError, match=f"{name}=.*(True|False)"):
        FastV(**{"keep": 4, "layer": 1, name: value})
    with pytest.raises(VlmpruneError, match="is neither true nor false"):
        PruMerge(plus=np.True_)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.int64(0), np.float32(1.5), np.float64("nan"), np.array([4])])
def test_what_is_wrong_of_pythons_is_wrong_of_numpys(value: Any) -> None:
    with pytest.raises(VlmpruneError, match=r"^keep="):
        VisPruner(keep=value)


def test_an_answer_is_the_same() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    found = []
    for keep in (4, np.int64(4), np.float32(0.25)):
        with torch.no_grad(), VisPruner(keep=keep)(built, logits="short"):
            found.append(built(**inputs).logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_method_of_ones_own_has_its_numbers_made_plain_too() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Own(RandomTokens):
        weights: tuple[float, ...] = ()

        def __post_init__(self) -> None:
            super().__post_init__()
            assert all(type(one) is float for one in self.weights)

    own = Own(keep=np.int64(3), weights=(np.float32(0.5), np.float64(0.25)))
    assert own.weights == (0.5, 0.25) and type(own.keep) is int


def test_plain_leaves_the_rest_alone() -> None:
    for value in (True, "4", None, 3, 0.5, (1, "a"), [np.int64(1)], torch.tensor(3)):
        assert settings.plain(value) is value
    assert settings.plain((np.int64(1), "a")) == (1, "a")
    assert settings.is_whole(np.uint8(3), 1) and not settings.is_whole(np.float64(3.0))
    assert settings.is_share(np.float32(0.5)) and not settings.is_share(np.bool_(True))
