"""Pruners as text: what is read, what is written, and that one undoes the other."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune import METHODS, PLPHP, VisPruner, spec
from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Pruner


@dataclass(frozen=True)
class Any4(Pruner):
    """A method that takes whatever it is given."""

    a: Any
    b: Any = 1
    c: Any = field(default_factory=lambda: "x")
    made: int = field(default=3, init=False)

    @classmethod
    def from_file(cls, path: Any, **changes: Any) -> Any4:
        return cls(**({"a": f"read from {path}"} | changes))


@pytest.fixture(autouse=True, scope="module")
def _one_more_method() -> Any:
    METHODS["any"] = Any4
    yield
    del METHODS["any"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vispruner:keep=64", VisPruner(64)),
        (" vispruner : keep = 0.25 , important_ratio=1 ", VisPruner(0.25, 1)),
        ("vispruner:keep=6,positions=compact,budget=image", VisPruner(6, 0.5, "compact", "image")),
        ("plphp", PLPHP()),
        ("plphp:r=.5,dr=1e-1,max_layer_bytes=None", PLPHP(r=0.5, dr=0.1)),
        ("plphp:coverage=0.5", PLPHP(coverage=0.5)),
        ("vispruner:keep=64|plphp:r=0.5", VisPruner(64) | PLPHP(r=0.5)),
        ("vispruner:keep=64+plphp:r=0.5", VisPruner(64) | PLPHP(r=0.5)),
        ("vispruner:keep=64 + vispruner:keep=8 | plphp", VisPruner(64) | VisPruner(8) | PLPHP()),
        ("any:a=1e+5", Any4(1e5)),
        ("any:a=1e+5+plphp", Any4(1e5) | PLPHP()),
        ("any:a=+3,b=-4", Any4(3, -4)),
        ("any:a=TRUE,b=false,c=none", Any4(True, False, None)),
        ("any:a=inf,b=-inf,c=1.", Any4(float("inf"), float("-inf"), 1.0)),
        ("any:a=1_000,b=0x10,c=\u0661", Any4("1_000", "0x10", "\u0661")),
        ("any:a=C:\\x=y,b=a+b.json", Any4("C:\\x=y", "a+b.json")),
        ('any:a="1",b="x|y+z,\\"",c=""', Any4("1", 'x|y+z,"', "")),
        ('any:a=" +plphp"', Any4(" +plphp")),
    ],
)
def test_reads(text: str, expected: Pruner) -> None:
    found = spec.parse(text)
    assert found == expected

    def kinds(pruner: Pruner) -> list[list[type]]:
        return [[type(v) for v in vars(stage).values()] for stage in pruner.links]

    # 1 and 1.0 are equal but mean different things to `keep`.
    assert kinds(found) == kinds(expected)
    assert repr(spec.parse(spec.dump(found))) == repr(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the method is empty; write for example vispruner:keep=64"),
        ("  ", "the method is empty"),
        ("magic", "method 'magic' is unknown; use one of vispruner, plphp, "),
        ("vispruner:keep=4|magic:r=1", "method 'magic' is unknown"),
        ("VisPruner:keep=4", "method 'VisPruner' is unknown"),
        ("vispruner:keep=4|", "a method is missing in 'vispruner:keep=4|'"),
        ("vispruner:keep=4+", "a method is missing"),
        ("|plphp", "a method is missing"),
        ("plphp||plphp", "a method is missing"),
        (":keep=4", "a method is missing"),
        ("plphp:", "no settings follow the colon of 'plphp:'"),
        ("vispruner", "method 'vispruner' needs keep; write vispruner:keep="),
        ("vispruner:important_ratio=1", "method 'vispruner' needs keep"),
        (
            "vispruner:keep=4,kep=5",
            "no setting 'kep' (did you mean 'keep'?); it has keep, important_ratio, pos",
        ),
        ("vispruner:from=x.json", "method 'vispruner' has no setting 'from'"),
        ("plphp:rr=1", "coverage, from=FILE"),
        ("any:a=1,made=4", "has no setting 'made'; it has a, b, c, from=FILE"),
        ("vispruner:keep=4,keep=4", "setting 'keep' of vispruner is given twice"),
        ("any:from=x,from=x", "setting 'from' of any is given twice"),
        ("vispruner:keep", "setting 'keep' of vispruner is not of the form name=value"),
        ("vispruner:keep=", "setting 'keep=' of vispruner is not of the form"),
        ("vispruner:=4", "setting '=4' of vispruner is not of the form"),
        ("vispruner:keep=4,", "setting '' of vispruner is not of the form"),
        ('any:a="x', 'value "x of any is not one text in double quotes'),
        ('any:a="x"y', 'value "x"y of any is not one text'),
        ('any:a="\\q"', "is not one text in double quotes"),
        # The method's own words.
        ("vispruner:keep=0", "keep=0 leaves no visual tokens"),
        ("vispruner:keep=many", "keep='many' is not a number"),
        ("vispruner:keep=true", "keep=True is not a number"),
        ("plphp:r=2", "r=2 is not a number from 0 to 1"),
        ("vispruner:keep=4,positions=compact|vispruner:keep=2,positions=original", "different pos"),
        ("plphp|vispruner:keep=4", "must come last in a chain"),
        ("plphp:from=/nowhere/x.json", "'/nowhere/x.json' cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(text: str, said: str) -> None:
    with pytest.raises(VlmpruneError) as caught:
        spec.parse(text)
    told = str(caught.value)
    assert said in told
    assert "\n" not in told and told.endswith(".")


def test_settings_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "a, b+plphp.json"
    path.write_text(json.dumps({"plphp": {"alpha": 0.5, "beta": 0.2}}))
    assert spec.parse(f'plphp:from="{path}",r=0.5') == PLPHP(alpha=0.5, beta=0.2, r=0.5)
    # A file beside which nothing stands, and one whose name looks like a number.
    assert spec.parse("any:from=5") == Any4("read from 5")
    assert spec.parse("any:a=1,from=5") == Any4(1)
    # A file gives what is required; what it gave is written out.
    assert spec.read("any:from=5")[0].missing == []
    assert spec.dump(spec.parse("any:from=5")) == "any:a=read from 5"


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cls: type, path: Any, **changes: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Any4, "from_file", classmethod(refuse))
    with pytest.raises(VlmpruneError, match=r"from=x\.json cannot be read \(Permission denied\)"):
        spec.parse("any:from=x.json")


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
values = (
    plain
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(
        [
            "true",
            "None",
            "1",
            "1e5",
            "inf",
            "nan",
            "x,y",
            "a|b",
            'say "x"',
            " x",
            "a\\",
            "+plphp",
            "=:",
        ]
    )
)
vispruners = st.builds(
    VisPruner,
    keep=st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True),
    important_ratio=st.floats(0, 1) | st.sampled_from([0, 1]),
    positions=st.sampled_from(["auto", "original"]),
    budget=st.sampled_from(["crop", "image"]),
)
plphps = st.builds(
    PLPHP,
    r=st.floats(0.3, 0.7),
    alpha=st.floats(0.5, 1),
    beta=st.floats(0, 0.5),
    per_head=st.sampled_from(["equal", "adaptive"]),
    max_layer_bytes=st.none() | st.integers(1, 10**12),
    coverage=st.floats(0, 1),
)
anys = st.builds(Any4, a=values, b=values, c=values)


@given(st.lists(vispruners | anys, max_size=3), plphps | vispruners | anys)
def test_what_is_written_is_read_again(before: list[Pruner], last: Pruner) -> None:
    pruner = reduce(or_, [*before, last])
    text = spec.dump(pruner)
    again = spec.parse(text)
    # repr tells -0.0 from 0.0 and 1 from True.
    assert again == pruner and repr(again) == repr(pruner)
    assert spec.dump(again) == text
    assert "\n" not in text


def test_defaults_are_left_out() -> None:
    assert spec.dump(PLPHP()) == "plphp"
    assert spec.dump(VisPruner(0.25, 0.75) | PLPHP(dr=0.1)) == (
        "vispruner:keep=0.25,important_ratio=0.75|plphp:dr=0.1"
    )
    # Equal to the default, but not the same.
    assert spec.dump(Any4(1, b=1.0, c="x")) == "any:a=1,b=1.0"
    assert spec.dump(Any4(1, b=True)) == "any:a=1,b=true"


def test_what_has_no_text() -> None:
    @dataclass(frozen=True)
    class Unlisted(Pruner):
        pass

    with pytest.raises(VlmpruneError, match="Unlisted is none of vispruner, plphp"):
        spec.dump(VisPruner(4) | Unlisted())
    with pytest.raises(VlmpruneError, match=r"a=\[1\] cannot be written in a spec"):
        spec.dump(Any4([1]))


def test_stages_can_be_filled_before_they_are_built() -> None:
    first, second = spec.read("vispruner:important_ratio=1|plphp")
    assert (first.name, first.settings, first.missing) == (
        "vispruner",
        {"important_ratio": 1},
        ["keep"],
    )
    assert second.missing == []
    # Those that go by name only stand behind the others.
    assert first.names[-1] == "newlines"
    assert set(first.names) == {one.name for one in dataclasses.fields(VisPruner)}
    first.settings["keep"] = 3
    assert spec.build([first, second]) == VisPruner(3, 1) | PLPHP()


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("vispruner", ["vispruner"]),
        (" a, b ,c", ["a", "b", "c"]),
        ("vispruner:important_ratio=0.75,fastv", ["vispruner:important_ratio=0.75", "fastv"]),
        ("a:x=1,y=2,b:z=3,w=4,c", ["a:x=1,y=2", "b:z=3,w=4", "c"]),
        ("a:x=1 , y = 2,b", ["a:x=1,y = 2", "b"]),
        ("vispruner+plphp:r=0.4,dr=0.3,random", ["vispruner+plphp:r=0.4,dr=0.3", "random"]),
        ('plphp:from="a,b=c.json",r=0.5,a', ['plphp:from="a,b=c.json",r=0.5', "a"]),
        ("a:x=1,b:y=2+c:z=3", ["a:x=1", "b:y=2+c:z=3"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_a_list_of_specs_is_parted_between_methods(text: str, specs: list[str]) -> None:
    assert spec.listed(text) == specs


def test_a_setting_fills_the_stages_that_leave_it_open() -> None:
    stages = spec.read("vispruner:keep=8+random+plphp")
    assert spec.fill(stages, "keep", 64) == 1
    assert [stage.settings.get("keep") for stage in stages] == [8, 64, None]
    assert spec.fill(stages, "keep", 32) == 0 and spec.fill(stages, "tau", 1) is None
    assert [stage.settings.get("keep") for stage in stages] == [8, 64, None]


def test_a_stage_as_text_and_what_its_method_is() -> None:
    one, two, video = spec.read("random:keep=0.5,seed=3+plphp:from=a.json,r=0.3+evs:keep=0.5")
    assert one.text() == "random:keep=0.5,seed=3" and one.text(without=("keep",)) == "random:seed=3"
    assert two.text() == "plphp:r=0.3,from=a.json"
    assert [stage.is_control for stage in (one, two, video)] == [True, False, False]
    assert [stage.for_videos for stage in (one, two, video)] == [False, False, True]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_and_its_name(name: str) -> None:
    assert spec.class_of(name) is METHODS[name]
    needed = dict.fromkeys(spec.Stage(name).missing, 2)
    if set(needed) <= {"keep"}:
        assert spec.name_of(METHODS[name](**needed)) == name
    assert spec.name_of(VisPruner(keep=1) | PLPHP()) is None


@pytest.mark.parametrize(
    ("text", "pair"),
    [(" a = b=c ", ("a", "b=c")), ("a", None), ("a=", None), ("=b", None), ("", None)],
)
def test_a_name_and_its_value(text: str, pair: tuple[str, str] | None) -> None:
    assert spec.pair(text) == pair


def test_what_is_no_pruner_has_no_spec() -> None:
    with pytest.raises(VlmpruneError, match=r"^str is no pruner, so it has no spec"):
        spec.dump("vispruner:keep=64")  # type: ignore[arg-type]
