"""What a harness is told on its command line: the method, its settings, the model."""

from __future__ import annotations

from dataclasses import fields

import pytest

from vlmprune import PLPHP, VisPruner, VlmpruneError, spec
from vlmprune.integrations import arguments
from vlmprune.methods import METHODS


def test_settings_are_merged_into_the_method() -> None:
    read = arguments.read(
        arguments.split("pretrained=,method=vispruner,keep=128,important_ratio=0.75,batch_size=4")
    )
    assert read.pruner == VisPruner(keep=128, important_ratio=0.75)
    assert (read.pretrained, read.batch_size, read.max_new_tokens) == (None, 4, 128)
    assert arguments.read({"keep": 0.25, "method": "vispruner"}).pruner == VisPruner(keep=0.25)
    without = arguments.read(arguments.split("method=vispruner,keep=29,newlines=drop"))
    assert without.pruner == VisPruner(keep=29, newlines="drop")


def test_chains_and_quotes() -> None:
    chain = VisPruner(keep=64, important_ratio=0.25) | PLPHP(r=0.3)
    for text in (
        "method=vispruner+plphp,keep=64,important_ratio=0.25,r=0.3",
        'method="vispruner:keep=64,important_ratio=0.25+plphp:r=0.3"',
        "method='vispruner:keep=64,important_ratio=0.25|plphp',r=0.3",
    ):
        assert spec.dump(arguments.read(arguments.split(text)).pruner) == spec.dump(chain)


@pytest.mark.parametrize("given", ["", "method=", "method=none", "pretrained=embedded"])
def test_no_method_is_the_unpruned_embedded_model(given: str) -> None:
    read = arguments.read(arguments.split(given))
    assert read.pruner is None
    assert read.pretrained is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "method=vispruner,keep=64,kept=3",
            r"argument 'kept' \(did you mean 'keep'\?\) is none of pretrained, .*vispruner",
        ),
        ("keep=64", "argument 'keep' is none of .*without method="),
        ("method=vispruner", "needs keep"),
        ("method=vispruner:keep=3,keep=4", "keep is given twice"),
        ("method=vispruner,keep=3,keep=4", "'keep' is given twice"),
        ("method=vispruner,keep", "'keep' is not of the form"),
        ("method=visprune,keep=3", "'visprune' is unknown"),
        ("batch_size=auto", "batch_size=auto is no whole number"),
        ("batch_size=0", "batch_size=0 is no whole number"),
        ("max_new_tokens=1.5", "max_new_tokens=1.5 is no whole number"),
    ],
)
def test_refused_arguments(given: str, said: str) -> None:
    with pytest.raises(VlmpruneError, match=said):
        arguments.read(arguments.split(given))


def test_no_setting_of_a_method_hides_behind_an_argument() -> None:
    settings = {one.name for cls in METHODS.values() for one in fields(cls)}
    assert "keep" in settings
    assert not settings & set(arguments.NAMES)
