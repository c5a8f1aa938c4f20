"""Without the variable VLMPRUNE nothing changes: a plain server, held to Transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import VISUAL
from client import Asked, ask
from reference import Reference, difference
from serving import ONE_PROCESS, Server, environment

TEXT = "where is the cat?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(serve, tiny: Path, folder: Path) -> Server:
    return serve(tiny, {**ONE_PROCESS, "VLMPRUNE_VLLM_RECORD": str(folder)})


@pytest.mark.parametrize("images", [0, 1, 2])
def test_prompt_and_answer_are_those_of_transformers(
    server: Server, folder: Path, tiny_reference: Reference, pictures, images: int
) -> None:
    asked = Asked(TEXT, tuple(pictures[:images]), tokens=12)
    got, expected = ask(server, asked), tiny_reference(asked)
    assert got.status == 200, got.error
    assert got.prompt_tokens == len(got.prompt) == expected.prompt_tokens
    assert got.prompt.count(4) == images * VISUAL
    assert list(got.ids) == expected.ids
    assert difference(got, expected) < 1e-4
    assert not list(folder.iterdir())


def test_the_picture_matters(server: Server, pictures) -> None:
    """Control: the comparison above would see another picture."""
    first, second = (ask(server, Asked(TEXT, (p,), tokens=12)) for p in pictures[:2])
    shared = first.tops[0].keys() & second.tops[0].keys()
    assert first.tops[0].keys() != second.tops[0].keys() or any(
        abs(first.tops[0][i] - second.tops[0][i]) > 1e-3 for i in shared
    )


def test_a_budget_is_not_taken_for_one(server: Server, pictures) -> None:
    """The key is one that a plain server does not know: it prunes nothing, whatever it says."""
    got = ask(server, Asked(TEXT, (pictures[0],), keep=16))
    print(got.status, got.error)
    assert got.status != 200 or got.prompt.count(4) == VISUAL


def test_registries_are_left_alone() -> None:
    """In a process of its own: vLLM's classes and hooks before and after its plugins are loaded."""
    program = """
import sys
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.plugins import load_plugins_by_group

models, hooks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
plugins = load_plugins_by_group("vllm.general_plugins")
assert "vlmprune" in plugins
for call in plugins.values():
    call()
    call()
assert dict(ModelRegistry.models) == models
assert dict(MODELS_CONFIG_MAP) == hooks
loaded = sorted(m for m in sys.modules if m.startswith("vlmprune.integrations.vllm"))
assert loaded == ["vlmprune.integrations.vllm", "vlmprune.integrations.vllm.names"], loaded
print("untouched")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip().endswith("untouched"), done.stderr[-2000:]
