"""vLLM's stand-ins for Transformers' models take what the families' records hand them, by name.

Read on the syntax tree, so that it is noticed where vLLM is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmprune
from vlmprune.hosts.families import FAMILIES
from vlmprune.integrations.vllm import ARCHITECTURES

FAMILIES_ROOM = "vlmprune.hosts.families"
PLUGIN = Path(vlmprune.__file__).parent / "integrations" / "vllm"


def handed() -> dict[str, tuple[str, ...]]:
    """By name of a function of a model, the arguments that records call it with."""
    found = {}
    for family in FAMILIES.values():
        for medium in family.media:
            for name, arguments in medium.required().functions.items():
                if name.startswith("model."):
                    found[name.removeprefix("model.")] = arguments
    return found


def stand_ins() -> Iterator[tuple[str, str, ast.arguments]]:
    """Methods of the plugin's hosts that stand in for such a function."""
    for path in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Host"):
                for one in node.body:
                    if isinstance(one, ast.FunctionDef) and one.name in handed():
                        yield node.name, one.name, one.args


def imported() -> set[str]:
    """Names that the plugin takes from the families' records."""
    return {
        one.name
        for path in PLUGIN.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FAMILIES_ROOM)
        for one in node.names
    }


# A family's record for one of its towers is not served.
SERVED = [n for n, one in FAMILIES.items() if one.cls in ARCHITECTURES and ":" not in n]
STAND_INS = list(stand_ins())


def test_there_are_some() -> None:
    assert {name for _, name, _ in STAND_INS} >= {
        "pack_image_features",
        "pixel_shuffle",
        "apply_pooling",
    }


@pytest.mark.parametrize(
    ("host", "name", "given"), STAND_INS, ids=[f"{host}-{name}" for host, name, _ in STAND_INS]
)
def test_stand_ins_take_arguments_by_the_names_that_records_use(
    host: str, name: str, given: ast.arguments
) -> None:
    taken = {one.arg for one in [*given.args, *given.kwonlyargs]}
    missing = set(handed()[name]) - taken
    # What a stand-in hands on as it came needs no name of its own.
    assert not missing or (given.kwarg is not None and "image_features" in taken), (
        f"{host}.{name} lacks {sorted(missing)}"
    )


@pytest.mark.parametrize("name", SERVED)
def test_served_media_are_those_of_the_record(name: str) -> None:
    """A medium that a record came to split into several would be served as the plain one."""
    lacking = {type(one).__name__ for one in FAMILIES[name].media} - imported()
    assert not lacking, f"{name} is served without {sorted(lacking)}"
