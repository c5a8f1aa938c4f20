"""Whether all that the package knows of Transformers stands in the rooms that may know it.

And whether its own rooms are imported where the arrows between them can be seen.

    python scripts/door.py               # the whole package
    python scripts/door.py PATH [PATH …] # some files or folders of it

Transformers renames things without notice, and `kwargs.get("some_name")` or
`getattr(config, "some_name", None)` then goes on with nothing. So names of its are looked up in
few places, where a missing one is an error, and this program finds the other places, on the syntax
tree:

- `import`: Transformers is imported outside `hosts`, `io`, `training` and `integrations`, in
  whatever form;
- `argument`: the arguments of a call, or a request, are read by a name outside those rooms and the
  families' records;
- `attribute`: something may lack an attribute and is asked for it all the same, there.

`make lint` holds the arrows between the rooms by what is imported, so an import that it cannot
follow is found here, in every file outside `former`:

- `former`: a module is imported, or named, as it was called before the rooms (`vlmprune.budget`,
  which is `former/budget.py`), in whatever form; `former` is for users alone;
- `by name`: a module of the package is imported by a string, but for the places in `BY_NAME`.

It prints file, line and rule of each place, and fails if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "vlmprune"

IMPORTING = ("hosts", "io", "training", "integrations")
# A record of a family knows names, and takes what is imported from the rest of `hosts`.
RECORDS = "hosts/families/"

# What is asked for attributes, or looked up in, without being a host's: the file, the receiver as
# it is written there, and why nothing of a host is read.
NO_HOSTS: dict[tuple[str, str], str] = {
    ("runtime/shadows.py", "found.__func__"): "a function that we marked when we made it",
}
# Where modules of the package are imported by a string, and why not by a statement.
BY_NAME: dict[str, str] = {
    "__init__.py": "gives names when they are first asked for, so that help needs no torch",
    "integrations/vllm/startup.py": "vLLM names the class of a model by a string, in its registry",
}
# The object that a method belongs to is one of ours wherever it is written.
OWN = ("self", "cls", "type(self)")

# What the arguments of a host's call, or its inputs, are called.
_ARGUMENTS = re.compile(r"kwargs|.+_kwargs|inputs")
_CONSTANT = re.compile(r"_{0,2}[A-Z][A-Z0-9_]*")
_READING = ("get", "pop", "setdefault", "__getitem__", "__contains__")
_LOOKING = ("getattr", "hasattr")
_IMPORTS = ("import_module", "__import__", "find_spec", "reload", "importorskip")
_LIBRARY = re.compile(r"transformers(\.|$)")
# A module of this package in a string, its whole name or one relative to where it is asked for.
_OWN = re.compile(r"vlmprune(\.|$)|\.")


@dataclass(frozen=True, order=True)
class Finding:
    """A place that breaks a rule."""

    path: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.what}"


def findings(root: Path, paths: Sequence[Path] = ()) -> list[Finding]:
    """All places in a package that break a rule.

    Args:
        root: the package's folder, of which the rooms are subfolders.
        paths: files and folders in it to look at; by default everything.
    """
    found: list[Finding] = []
    former = {file.stem for file in (root / "former").glob("*.py")} - {"__init__"}
    for file in sorted(_files(paths or [root])):
        name = file.resolve().relative_to(root.resolve()).as_posix()
        found += _File(name, ast.parse(file.read_text(encoding="utf-8")), former).findings()
    return sorted(found)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from path.rglob("*.py")
        else:
            yield path


class _File:
    """One file: its tree, and the names in it that stand for something."""

    def __init__(self, name: str, tree: ast.Module, former: Collection[str]) -> None:
        self.name, self.former = name, former
        self.room = name.split("/")[0]
        self.nodes = list(ast.walk(tree))
        self.bound = list(_bound(self.nodes))
        self.words = self._words()
        self.arguments = self._arguments()
        called = (node.func for node in self.nodes if isinstance(node, ast.Call))
        self.called = set(map(id, called))

    def findings(self) -> Iterator[Finding]:
        """What breaks a rule that holds here."""
        for node in self.nodes:
            if self.room not in IMPORTING or self.name.startswith(RECORDS):
                yield from self._imports(node)
            if self.room not in IMPORTING:
                yield from self._reads(node)
                yield from self._looks(node)
            if self.room != "former":
                yield from self._formers(node)
                yield from self._by_name(node)

    def _at(self, node: ast.AST, rule: str, why: str) -> Finding:
        line: int = getattr(node, "lineno", 0)
        return Finding(self.name, line, rule, f"{ast.unparse(node)} {why}")

    # Names.

    def _words(self) -> dict[str, str]:
        """Names that are bound to a string, or go through a row of strings, and one such string."""
        found: dict[str, str] = {}
        for name, value, each in self.bound:
            strings = _strings(value) if each else [value]
            for one in strings:
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    found[name] = one.value
        return found

    def _arguments(self) -> set[str]:
        """Names of dictionaries that hold arguments: by what they are called, or made of one."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.arguments) and node.kwarg is not None:
                found.add(node.kwarg.arg)
        before = -1
        while before != len(found):
            before = len(found)
            found |= {
                name
                for name, value, each in self.bound
                if not each and self._holds_arguments(value, found)
            }
        return found

    def _holds_arguments(self, node: ast.expr | None, known: set[str]) -> bool:
        """Whether an expression is a dictionary of arguments, or a copy of one."""
        inside: list[ast.expr | None] = []
        match node:
            case ast.Name(id=name):
                return name in known or bool(_ARGUMENTS.fullmatch(name))
            case ast.Attribute(attr=name):
                return bool(_ARGUMENTS.fullmatch(name))
            case ast.Call(func=ast.Attribute(value=value, attr="copy" | "items" | "unwrap")):
                inside = [value]
            case ast.Call(func=ast.Name(id="dict" | "OrderedDict" | "ChainMap"), args=args):
                inside = [*args, *(word.value for word in node.keywords if word.arg is None)]
            case ast.Call(func=ast.Name(id="copy" | "deepcopy"), args=args):
                inside = [*args]
            case ast.Call(func=ast.Attribute(attr="deepcopy" | "ChainMap"), args=args):
                inside = [*args]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                inside = [left, right]
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                inside = [value for key, value in pairs if key is None]
            case ast.DictComp(generators=[first, *_]):
                inside = [first.iter]
            case ast.BoolOp(values=parts):
                inside = [*parts]
            case ast.IfExp(body=body, orelse=other):
                inside = [body, other]
            case ast.NamedExpr(value=value):
                inside = [value]
        return any(self._holds_arguments(one, known) for one in inside)

    def _is_named(self, node: ast.expr) -> bool:
        """Whether a key is a word, written there or through a constant."""
        match node:
            case ast.Constant(value=str()) | ast.JoinedStr():
                return True
            case ast.Name(id=name):
                return name in self.words or bool(_CONSTANT.fullmatch(name))
            case ast.Attribute(attr=name):
                return bool(_CONSTANT.fullmatch(name))
        return False

    # Rules.

    def _imports(self, node: ast.AST) -> Iterator[Finding]:
        told = f"is for {', '.join(IMPORTING)} alone"
        match node:
            case ast.Import(names=names):
                if any(_LIBRARY.match(one.name) for one in names):
                    yield self._at(node, "import", told)
            case ast.ImportFrom(module=str(module), level=0):
                if _LIBRARY.match(module):
                    yield self._at(node, "import", told)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                if name in _IMPORTS and self._is_text(first, _LIBRARY):
                    yield self._at(node, "import", told)
            case ast.Subscript(value=ast.Attribute(attr="modules"), slice=key):
                if self._is_text(key, _LIBRARY):
                    yield self._at(node, "import", told)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="modules"), attr=name), args=[key, *_]
            ) if name in _READING and self._is_text(key, _LIBRARY):
                yield self._at(node, "import", told)

    def _is_text(self, node: ast.expr, pattern: re.Pattern[str]) -> bool:
        """Whether an expression is a string that begins as a pattern says."""
        match node:
            case ast.Constant(value=str(word)):
                return bool(pattern.match(word))
            case ast.Name(id=name):
                return bool(pattern.match(self.words.get(name, "")))
            case ast.JoinedStr(values=[first, *_]):
                return self._is_text(first, pattern)
            case ast.BinOp(left=left):
                return self._is_text(left, pattern)
        return False

    def _formers(self, node: ast.AST) -> Iterator[Finding]:
        told = "is a former name; import the module that it stands for"
        named: list[str] = []
        match node:
            case ast.Import(names=names):
                named = [one.name for one in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                base = self._package(level, module)
                named = [f"{base}.{one.name}" for one in names]
            case ast.Attribute(value=ast.Name(id="vlmprune"), attr=name):
                named = [f"vlmprune.{name}"]
            case ast.Constant(value=str(word)) if not re.search(r"\s", word):
                named = [word]
        for one in named:
            package, _, rest = one.partition(".")
            if package == "vlmprune" and rest.split(".")[0] in self.former:
                yield self._at(node, "former", told)
                return

    def _package(self, level: int, module: str | None) -> str:
        """What stands after `from`, without leading dots."""
        if not level:
            return module or ""
        folders = ["vlmprune", *self.name.split("/")[:-1]]
        place = folders[: len(folders) - level + 1]
        return ".".join([*place, module] if module else place)

    def _by_name(self, node: ast.AST) -> Iterator[Finding]:
        told = "imports a module of the package by a string, which no contract can follow"
        if self.name in BY_NAME:
            return
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                if name in _IMPORTS and (self._is_text(first, _OWN) or _is_here(first)):
                    yield self._at(node, "by name", told)
            case ast.Subscript(value=ast.Attribute(attr="modules"), slice=key):
                if self._is_text(key, _OWN) or _is_here(key):
                    yield self._at(node, "by name", told)

    def _reads(self, node: ast.AST) -> Iterator[Finding]:
        told = "reads an argument by its name; take it from a record of hosts"
        match node:
            case ast.Call(func=ast.Attribute(value=held, attr=name), args=[key, *_]):
                known = self._holds_arguments(held, self.arguments) or self._is_vars(held)
                if name in _READING and known and self._is_named(key):
                    yield self._at(node, "argument", told)
            case ast.Subscript(value=held, slice=key, ctx=ast.Load() | ast.Del()):
                known = self._holds_arguments(held, self.arguments) or self._is_vars(held)
                if known and self._is_named(key):
                    yield self._at(node, "argument", told)
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[held]):
                if self._is_named(key) and self._holds_arguments(held, self.arguments):
                    yield self._at(node, "argument", told)
            case ast.Attribute(value=held, attr=name):
                # A method that is kept for later, as `get = kwargs.get`.
                kept = name in _READING and id(node) not in self.called
                if kept and self._holds_arguments(held, self.arguments):
                    yield self._at(node, "argument", told)

    def _is_vars(self, node: ast.expr) -> bool:
        """Whether an expression is the dictionary of an object that is not one of ours."""
        match node:
            case (
                ast.Call(func=ast.Name(id="vars"), args=[held])
                | ast.Attribute(value=held, attr="__dict__")
            ):
                ours = (self.name, ast.unparse(node)) in NO_HOSTS
                return ast.unparse(held) not in OWN and not ours
        return False

    def _looks(self, node: ast.AST) -> Iterator[Finding]:
        told = "asks for what may not be there; ask hosts, where a missing name is an error"
        match node:
            case ast.Call(func=ast.Name(id=name), args=[held, *rest]) if name in _LOOKING:
                spread = any(isinstance(one, ast.Starred) for one in rest)
                more = len(rest) > 1 or spread or name == "hasattr"
                where = ast.unparse(held)
                if more and where not in OWN and (self.name, where) not in NO_HOSTS:
                    yield self._at(node, "attribute", told)
            case ast.Name(id=name, ctx=ast.Load()) if name in _LOOKING:
                if id(node) not in self.called:
                    yield self._at(node, "attribute", "is handed on under another name")
            case ast.Attribute(attr=name) if name in (*_LOOKING, "__getattr__"):
                yield self._at(node, "attribute", "looks an attribute up in a roundabout way")


def _is_here(node: ast.expr) -> bool:
    """Whether a string begins with the name of the module that it stands in, or of its package."""
    match node:
        case ast.Name(id="__package__" | "__name__"):
            return True
        case ast.FormattedValue(value=inside) | ast.JoinedStr(values=[inside, *_]):
            return _is_here(inside)
        case ast.BinOp(left=left):
            return _is_here(left)
    return False


def _strings(node: ast.expr | None) -> list[ast.expr]:
    """The entries of a row that is written out."""
    match node:
        case ast.Tuple(elts=entries) | ast.List(elts=entries) | ast.Set(elts=entries):
            return entries
    return []


def _bound(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr | None, bool]]:
    """(name, value, whether the name goes through the value's entries) of all that is bound."""
    for node in nodes:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _pairs(target, value)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                yield from _pairs(target, value)
            case ast.AugAssign(target=target, value=value):
                yield from _pairs(target, value)
            case ast.NamedExpr(target=target, value=value):
                yield from _pairs(target, value)
            case ast.For(target=ast.Name(id=name), iter=value):
                yield name, value, True
            case ast.comprehension(target=ast.Name(id=name), iter=value):
                yield name, value, True


def _pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr | None, bool]]:
    match target, value:
        case ast.Name(id=name), _:
            yield name, value, False
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            for one, other in zip(targets, values, strict=True):
                yield from _pairs(one, other)


def main(arguments: Sequence[str]) -> int:
    """Print what is found; 1 if there is something."""
    found = findings(PACKAGE, [Path(one) for one in arguments])
    for one in found:
        print(f"src/vlmprune/{one}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
