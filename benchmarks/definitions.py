"""A fingerprint of what a method is made of, so that stale figures are found.

It covers the method's class, its bases, and whatever definitions of this package they use, in turn:
not the machinery around them, no comments or docstrings, and not which module each stands in.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "vlmprune"
MACHINERY = (
    "method",
    "pruner",
    "views",
    "errors",
    "hosts.families",
    "runtime.attention",
    "runtime.family",
    "runtime.scope",
    "report",
)
"""Rooms and modules that all methods stand on; a change of them is no change of a method."""


def fingerprint(cls: type) -> str:
    """Sixteen hexadecimal digits."""
    found: dict[tuple[str, str], str] = {}
    todo = [(cls.__module__, cls.__name__)]
    while todo:
        module, name = home(*todo.pop())
        if (module, name) in found:
            continue
        for node in definitions(module).get(name, []):
            found[module, name] = found.get((module, name), "") + text_of(module, node)
            todo += uses(module, node)
    text = "\n".join(sorted(f"{name}\n{code}" for (_, name), code in found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def home(module: str, name: str) -> tuple[str, str]:
    """Where a name is defined that a module has, perhaps from another one."""
    while name not in definitions(module):
        there, inner = imports(module).get(name, ("", None))
        if inner is None:
            break
        module, name = there, inner
    return module, name


def text_of(module: str, node: ast.stmt) -> str:
    """The code of a definition, in which `module.name` is `name`."""
    known = imports(module)

    class Bare(ast.NodeTransformer):
        def visit_Attribute(self, one: ast.Attribute) -> ast.AST:
            of = one.value.id if isinstance(one.value, ast.Name) else ""
            if of in known and known[of][1] is None:
                return ast.Name(one.attr, one.ctx)
            return self.generic_visit(one)

    return ast.unparse(Bare().visit(copy.deepcopy(node)))


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
    nodes = list(tree(module).body)
    # A room that gives names when they are asked for imports them for type checkers alone.
    nodes += [inner for node in nodes if isinstance(node, ast.If) for inner in node.body]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
            continue
        for one in node.names:
            inner = f"{node.module}.{one.name}"
            there = (inner, None) if _is_module(inner) else (str(node.module), one.name)
            found[one.asname or one.name] = there
    return found


def uses(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The definitions of this package that a piece of code names, but for the machinery."""
    known = imports(module)
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and one.id in known and known[one.id][1] is not None:
            where, name = home(known[one.id][0], str(known[one.id][1]))
        elif isinstance(one, ast.Name):
            where, name = module, one.id
        elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name):
            if one.value.id not in known or known[one.value.id][1] is not None:
                continue
            where, name = home(known[one.value.id][0], one.attr)
        else:
            continue
        rooms = (f"{PACKAGE}.{room}." for room in MACHINERY)
        if not f"{where}.".startswith(tuple(rooms)):
            yield where, name


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
