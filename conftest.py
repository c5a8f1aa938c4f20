"""Shared by all tests, those beside programs too: their helpers are importable, and runs repeat."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

HELPERS = Path(__file__).parent / "tests"
sys.path.insert(0, str(HELPERS))


def pytest_configure(config: pytest.Config) -> None:
    """Deprecated use is an error in the tests' helpers too, as pyproject.toml has it of tests."""
    packages = [path.parent.name for path in HELPERS.glob("*/__init__.py")]
    modules = [path.stem for path in HELPERS.glob("*.py") if not path.stem.startswith("test_")]
    names = "|".join([*packages, *modules])
    config.addinivalue_line("filterwarnings", rf"error::DeprecationWarning:({names})(\.|$)")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--share K/N` takes one of N parts of the tests, and of those of `hosts` all."""
    parser.addoption("--share", metavar="K/N", help="only the K-th of N parts, K from 0 on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; a share goes by name, so that it is always one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    share = config.getoption("--share")
    if not share:
        return
    part, parts = map(int, share.split("/"))

    def stays(item: pytest.Item) -> bool:
        # Names and signatures of the host are looked at everywhere.
        own = item.path.parent == HELPERS / "hosts"
        return own or zlib.crc32(item.nodeid.encode()) % parts == part

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]


# No test is timed. In CI the examples are the same each time; elsewhere they are new ones.
settings.register_profile("vlmprune", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vlmprune")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_records() -> Iterator[None]:
    """Records that a test registers are gone behind it."""
    from vlmprune.hosts import families

    before = dict(families._records)
    yield
    families._records.clear()
    families._records.update(before)


@pytest.fixture
def without_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of `counted_cases` are such of which only placeholders are known."""
    from counted_cases import CASES
    from vlmprune.hosts import families

    left = {kind: one for kind, one in families.FAMILIES.items() if kind not in CASES}
    monkeypatch.setattr(families, "FAMILIES", left)


class _Deprecations(logging.Handler):
    """Collects what transformers' own logger says about deprecated use."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" not in message.lower():
            return
        # Pipelines of early 5.x releases call `generate` in a way that they themselves deprecate.
        own = "transformers/pipelines/"
        if not any(own in Path(frame.filename).as_posix() for frame in traceback.extract_stack()):
            self.said.append(message)


@pytest.fixture(autouse=True)
def _no_deprecated_use_of_transformers() -> Iterator[None]:
    """Transformers deprecates through its logger more often than by warnings."""
    # Each is said once a process; a test must hear what another has heard before.
    transformers.utils.logging.warning_once.cache_clear()
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.said, f"transformers calls this deprecated: {handler.said}"
