"""Faults drawn from all that Cosmic Ray's operators can make of some files."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mutation.mutants import Mutant, mutant
from mutation.tree import Tree

ROOMS = (
    "runtime/",
    "hosts/",
    "select/",
    "costs/",
    "report/",
    "study/stats.py",
    "study/tasks/scorers.py",
    "study/tasks/vqa_words.py",
)
"""What faults are drawn from."""
# These take arguments that nobody could choose at random.
_LEFT_OUT = ("VariableReplacer", "VariableInserter")


@dataclass(frozen=True)
class Site:
    """A place in a file at which one kind of operator can act.

    Attributes:
        file: of the package.
        rank: what decides over the order of the draw; it hangs on nothing outside the line.
        operators: names, and which of its occurrences this is.
    """

    file: str
    rank: str
    operators: tuple[tuple[str, int], ...]


def draw(tree: Tree, seed: int, count: int, rooms: tuple[str, ...] = ROOMS) -> Iterator[Mutant]:
    """So many faults, each at a place of its own.

    A place's turn comes by a hash of the seed and of its line, so that a change of one file leaves
    the faults of the others as they are. What is no Python, or says the same to Python, is passed.

    Args:
        tree: what they are drawn from.
        seed: of the draw.
        count: how many.
        rooms: how the names of files begin.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider: Any = OperatorProvider()
    files = [path.relative_to(tree.source).as_posix() for path in tree.source.rglob("*.py")]
    files = sorted(file for file in files if file.startswith(rooms))
    whole = {file: tree.read(file) for file in files}
    same = {file: _meaning(text) for file, text in whole.items()}
    found: set[tuple[str, str, str, str]] = set()
    for site in sorted(
        (site for file in files for site in _sites(file, whole[file], seed, provider)),
        key=lambda one: one.rank,
    ):
        if len(found) == count:
            return
        chosen = int(site.rank[:8], 16) % len(site.operators)
        name, occurrence = site.operators[chosen]
        text = mutate_code(whole[site.file], provider[name](), occurrence)
        try:
            if text is None or _meaning(text) == same[site.file]:
                continue
        except SyntaxError:
            continue
        one = mutant(name, site.file, whole[site.file], text)
        if one.key not in found:
            found.add(one.key)
            yield one


def _sites(file: str, whole: str, seed: int, provider: Any) -> list[Site]:
    """All places of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast

    operators = _by_type(provider)
    lines = whole.splitlines()
    counts: dict[str, int] = defaultdict(int)
    at: dict[tuple[Any, str], list[tuple[str, int]]] = {}
    for node in ast_nodes(get_ast(whole)):
        for name, operator in operators[_type(node)]:
            for start, _ in operator.mutation_positions(node):
                kind = name.partition("_")[0]
                at.setdefault((start, kind), []).append((name, counts[name]))
                counts[name] += 1
    seen: dict[str, int] = defaultdict(int)
    sites = []
    for ((line, column), kind), some in at.items():
        what = f"{file}|{lines[line - 1].strip()}|{column}|{kind}"
        seen[what] += 1
        rank = hashlib.sha256(f"{seed}|{what}|{seen[what]}".encode()).hexdigest()
        sites.append(Site(file, rank, tuple(some)))
    return sites


def _by_type(provider: Any) -> dict[str, list[tuple[str, Any]]]:
    """Operators by the `_type` of the nodes on which they can act at all, for speed alone."""
    from cosmic_ray.operators.binary_operator_replacement import BinaryOperators

    found: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    others = []
    for name in provider:
        kind, _, more = name.partition("_")
        if name in _LEFT_OUT:
            continue
        one = name, provider[name]()
        if kind == "ReplaceBinaryOperator":
            found[BinaryOperators[more.partition("_")[0]].value].append(one)
        elif kind == "ReplaceComparisonOperator":
            found["comparison"].append(one)
        elif kind == "ReplaceUnaryOperator":
            found["factor"].append(one)
            found["not_test"].append(one)
        else:
            others.append(one)
    return defaultdict(lambda: others, {type_: some + others for type_, some in found.items()})


def _type(node: Any) -> str:
    return str(node.value if node.type == "operator" else node.type)


class _Plain(ast.NodeTransformer):
    """Takes away what says nothing to Python as it runs: annotations, and what only they import."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def _meaning(text: str) -> str:
    return ast.dump(_Plain().visit(ast.parse(text)))
