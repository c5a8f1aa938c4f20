"""A fingerprint of what a method is made of, so that stale figures are found.

It covers the method's class, its bases, and whatever definitions of this package they use, in turn:
not the machinery around them, and no comments or docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "vlmprune"
MACHINERY = ("pruner", "views", "errors", "families", "taps", "report")
"""Modules that all methods stand on; a change of them is no change of a method."""


def fingerprint(cls: type) -> str:
    """Sixteen hexadecimal digits."""
    found: dict[tuple[str, str], str] = {}
    todo = [(cls.__module__, cls.__name__)]
    while todo:
        module, name = todo.pop()
        if (module, name) in found:
            continue
        for node in definitions(module).get(name, []):
            found[module, name] = found.get((module, name), "") + ast.unparse(node)
            todo += uses(module, node)
    text = "\n".join(f"{module}.{name}\n{code}" for (module, name), code in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def tree(module: str) -> ast.Module:
    """A module's source without docstrings."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    parsed = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(parsed):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)] or [ast.Pass()]  # type: ignore[attr-defined]
    return parsed


@cache
def definitions(module: str) -> dict[str, list[ast.stmt]]:
    """Top-level statements by the names that they define."""
    found: dict[str, list[ast.stmt]] = {}
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for one in (leaf for target in targets for leaf in ast.walk(target)):
                if isinstance(one, ast.Name):
                    found.setdefault(one.id, []).append(node)
    return found


@cache
def imports(module: str) -> dict[str, tuple[str, str | None]]:
    """What a module has from this package: by name there (module, name), or (module, None)."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in tree(module).body:
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
            continue
        for one in node.names:
            inner = f"{node.module}.{one.name}"
            there = importlib.util.find_spec(inner) if node.module == PACKAGE else None
            home = (inner, None) if there else (str(node.module), one.name)
            found[one.asname or one.name] = home
    return found


def uses(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The definitions of this package that a piece of code names, but for the machinery."""
    known = imports(module)
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and one.id in known and known[one.id][1] is not None:
            home = known[one.id]
        elif isinstance(one, ast.Name):
            home = (module, one.id)
        elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name):
            if known.get(one.value.id, ("", ""))[1] is not None:
                continue
            home = (known[one.value.id][0], one.attr)
        else:
            continue
        if not home[0].removeprefix(f"{PACKAGE}.").startswith(MACHINERY):
            yield home[0], str(home[1])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
