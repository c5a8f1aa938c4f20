"""Shared by the tests of the vLLM plugin, which `make test-vllm` runs in an environment of its own.

One server runs at a time, as each takes about 2 GB; a test module asks for one by a fixture and
the next module's ends it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import checkpoints
from PIL import Image
from reference import Reference
from serving import Server

from vlmprune import embedded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What vLLM itself warns of is not ours to mend."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default::FutureWarning"))
        item.add_marker(pytest.mark.filterwarnings("default::DeprecationWarning"))


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start a server, or give the one that runs if it was asked for in the same way.

    Called with the model's folder, changes of the environment and more arguments.
    """
    logs = tmp_path_factory.mktemp("servers")
    running: dict[tuple[object, ...], Server] = {}

    def start(
        model: Path, changes: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
    ) -> Server:
        changes = changes or {}
        key = (model, *sorted(changes.items()), *arguments)
        if key not in running:
            for old in list(running):
                running.pop(old).stop()
            log = logs / f"{len(list(logs.iterdir()))}.log"
            running[key] = Server(model, log, changes, arguments)
            print(f"\n{model.name} {dict(changes)}: up in {running[key].seconds:.0f} s, {log}")
        return running[key]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaVA-1.5 of random weights, 64 visual tokens an image."""
    return checkpoints.llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path) -> Reference:
    return Reference(tiny)


@pytest.fixture(scope="session")
def embedded_reference() -> Reference:
    return Reference(embedded.path())


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Held-out scenes, 224 x 224 pixels."""
    names = sorted(embedded.held_out().glob("*.jpg"))
    return [Image.open(name).convert("RGB") for name in names[:24]]


@pytest.fixture(scope="session")
def questions() -> list[list[tuple[str, str]]]:
    """For each of `pictures` its questions and their true answers."""
    listed = json.loads((embedded.held_out() / "scenes.json").read_text())
    return [[(q["question"], q["answer"]) for q in one["questions"]] for one in listed[:24]]
