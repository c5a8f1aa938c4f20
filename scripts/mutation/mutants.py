"""Small faults: those that are named in a file, and the text and place of any one."""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutation.tree import Tree


@dataclass(frozen=True)
class Mutant:
    """One fault in one file of the package.

    Attributes:
        fault: in words.
        file: of the package.
        where: the function that holds it, as Python qualifies it; "" outside of any.
        before, after: the lines that differ, without the white space around them.
        text: of the whole file with the fault.
        lines: numbers, in the file without it, of the lines of the statement that it is in.
        runs: whether a function's body holds it; else it runs as the file is imported.
    """

    fault: str
    file: str
    where: str
    before: str
    after: str
    text: str
    lines: frozenset[int]
    runs: bool

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from others, wherever in the file it stands."""
        return self.file, self.where, self.before, self.after


def mutant(fault: str, file: str, whole: str, text: str) -> Mutant:
    """The fault that makes `text` of a file's `whole`."""
    old, new = whole.splitlines(), text.splitlines()
    steps = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = [step for step in steps if step[0] != "equal"]
    if not changed:
        raise ValueError(f"{fault}: nothing of {file} is changed")
    first, last = changed[0], changed[-1]
    start, stop = first[1] + 1, max(first[1] + 1, last[2])
    names, runs, lines = _place(ast.parse(whole), start, stop)
    return Mutant(
        fault,
        file,
        ".".join(names),
        _joined(old[first[1] : last[2]]),
        _joined(new[first[3] : last[4]]),
        text,
        frozenset(lines),
        runs,
    )


def _joined(lines: list[str]) -> str:
    return "\n".join(line.strip() for line in lines)


def _place(module: ast.Module, start: int, stop: int) -> tuple[list[str], bool, range]:
    """Where some lines stand: the functions around them, whether one's body has them, and the lines
    of the statement that they are part of; of one with a body its head alone.
    """
    names: list[str] = []
    runs, lines = False, range(start, stop + 1)
    node: ast.AST = module
    while True:
        inner = [one for one in _statements(node) if _covers(_span(one), start, stop)]
        if not inner:
            return names, runs, lines
        node = inner[0]
        first, last = _span(node)
        body = _statements(node)
        head = min(_span(one)[0] for one in body) - 1 if body else last
        if stop <= head:
            return names, runs, range(first, head + 1)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
            runs = not isinstance(node, ast.ClassDef)


def _statements(node: ast.AST) -> list[ast.AST]:
    kinds = ast.stmt | ast.ExceptHandler | ast.match_case
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]


def _covers(span: tuple[int, int], start: int, stop: int) -> bool:
    return span[0] <= start and stop <= span[1]


def _span(node: ast.AST) -> tuple[int, int]:
    """First and last line of a statement, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    if isinstance(node, ast.match_case):
        return node.pattern.lineno, node.body[-1].end_lineno or node.pattern.lineno
    first = min([node.lineno, *(one.lineno for one in decorators)])  # type: ignore[attr-defined]
    return first, node.end_lineno  # type: ignore[attr-defined]


def named(tree: Tree, path: Path) -> Iterator[Mutant]:
    """The faults that a file lists: each with its file, and the text before and after.

    Raises:
        ValueError: a text does not stand in its file exactly once.
    """
    for one in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
        whole, before = tree.read(one["file"]), one["before"]
        if whole.count(before) != 1:
            raise ValueError(
                f"{one['fault']!r}: its text stands {whole.count(before)} times in {one['file']}"
            )
        text = whole.replace(before, one["after"])
        compile(text, one["file"], "exec")
        yield mutant(one["fault"], one["file"], whole, text)


def accepted(path: Path) -> dict[tuple[str, str, str, str], str]:
    """Why faults that no test notices change nothing that counts, by `Mutant.key`."""
    listed = tomllib.loads(path.read_text(encoding="utf-8")).get("accepted", [])
    return {
        (one["file"], one["where"], one["before"], one["after"]): one["reason"] for one in listed
    }
