"""Releases of methods: where their code is, at which commit, and how files of it are imported.

Nothing of theirs stands here. A file is imported as it is; packages around it whose `__init__`
would import more than is needed are entered without running that, and libraries that such a file
imports but does not use for what is run here are stood in for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

# Repository and commit.
RELEASES = {
    "prumerge": ("42Shawn/LLaVA-PruMerge", "097c04116a58465e4bcb58cec44a94018a68ff1a"),
    "visionzip": ("dvlab-research/VisionZip", "3151f6df4fca36a4cd1c985e5956e725b1f9ad02"),
    "fastervlm": ("Theia-4869/FasterVLM", "f5d5f12037e105a51865ecb4b28a73cd86eb4921"),
    "tome": ("facebookresearch/ToMe", "af95e4b1befa172dadccd8c81e223b10090f9579"),
    "dart": ("xqy1111111/DART", "d6a5af6f24f9d0c2f3f3a8eb09b8ca7cef58b58a"),
    "sparsevlm": ("Gumpest/SparseVLMs", "26a5f48813c46cd1c7364160354e7fdd3febaa67"),
    "fastv": ("pkunlp-icler/FastV", "d1659729b5bf1be225e99ee15783deeea80f63b1"),
    "pyramiddrop": ("Cooperx521/PyramidDrop", "6444f304aee4b7edcb022839fb9e8cd07859704a"),
}
# What of each is needed.
FOLDERS = {
    "prumerge": "llava/model/multimodal_encoder",
    "visionzip": "visionzip",
    "fastervlm": "llava",
    "tome": "tome",
    "dart": "llava/model/language_model",
    "sparsevlm": "llava/model/language_model",
    "fastv": "src/transformers/src/transformers/models/llama",
    "pyramiddrop": "llava",
}


def fetch(method: str, into: Path, source: str) -> Path:
    """The release's files at its commit, cloned unless they are there.

    Args:
        method: its name.
        into: folder for clones.
        source: where repositories are cloned from, "{repo}" in place of owner/name.
    """
    repo, commit = RELEASES[method]
    folder = into / method
    if not folder.exists():
        place = source.format(repo=repo, mirror=repo.replace("/", "+"))
        subprocess.run(["git", "clone", "-q", "--no-checkout", place, folder], check=True)
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "checkout", "-q", commit, "--", FOLDERS[method]], check=True)
    return folder


def enter(name: str, folder: Path) -> None:
    """Let a package be imported from without running its `__init__`."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    if "." in name:
        parent, _, own = name.rpartition(".")
        setattr(sys.modules[parent], own, module)


def load(name: str, file: Path) -> Any:
    """A file, imported as a module of a name, so that what is relative in it is found."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds libraries that are not installed, as modules whose every name is a stand-in."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing is run."""


def stand_in(names: Sequence[str]) -> None:
    """Let libraries be imported that are not there and that nothing here uses."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        sys.meta_path.append(_Absent(missing))
