"""`scripts/mutate.py` notices a fault that no test does, and leaves the tree as it is."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from repository import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from mutation import mutants, reach
from mutation.tree import Tree

SCRIPTS = ROOT / "scripts"
SOURCE = '''"""Sizes."""

LEAST = 2


def area(width: int, height: int) -> int:
    if width < LEAST:
        raise ValueError("too narrow")
    return width * height


def around(width: int, height: int) -> int:
    return 2 * (width + height)


def loop(times: int) -> int:
    while times > 0:
        times = times - 1
    return times
'''
TESTS = """from shapes.sizes import area, around, loop


def test_area():
    assert area(3, 4) == 12


def test_around():
    assert around(2, 2) == 8


def test_loop():
    assert loop(3) == 0
"""
NOTICED = {
    "a sum for a product": ("return width * height", "return width + height"),
    "no end": ("times = times - 1", "times = times - 0"),
    "a fault at import": ("LEAST = 2", "LEAST = 2 / 0"),
}
# Of a square of 2 the sum is the product.
SURVIVES = {"a product for a sum": ("(width + height)", "(width * height)")}
# No test has a width below the least.
UNREACHED = {"another error": ("ValueError", "TypeError")}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A package of one file and its tests, with what these reach."""
    root = tmp_path / "repository"
    for file, text in {
        "src/shapes/__init__.py": "",
        "src/shapes/sizes.py": SOURCE,
        "tests/test_sizes.py": TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    made = Tree(root, "shapes")
    reached = {"area": [7, 9], "around": [13], "loop": [17, 18, 19]}
    found = {
        "digest": reach.told(root / "tests/test_sizes.py"),
        "tests": {f"tests/test_sizes.py::test_{name}": 0.01 for name in reached},
        "lines": {
            "sizes.py": [
                [lines, [f"tests/test_sizes.py::test_{name}"]] for name, lines in reached.items()
            ]
        },
        "shared": {},
        "sources": {"sizes.py": reach.told(root / "src/shapes/sizes.py")},
    }
    kept = tmp_path / "reach" / "tests.test_sizes.py.json.gz"
    kept.parent.mkdir()
    kept.write_bytes(gzip.compress(json.dumps(found).encode()))
    return made


def listed(path: Path, faults: dict[str, tuple[str, str]]) -> Path:
    texts = [
        f"[[mutant]]\nfault = {json.dumps(fault)}\nfile = 'sizes.py'\n"
        f"before = {json.dumps(before)}\nafter = {json.dumps(after)}\n"
        for fault, (before, after) in faults.items()
    ]
    path.write_text("\n".join(texts))
    return path


def mutate(tree: Tree, faults: dict[str, tuple[str, str]], accepted: str = "") -> tuple[int, Any]:
    """The command's exit code and its report."""
    folder = tree.root.parent
    (folder / "accepted.toml").write_text(accepted)
    named, report = listed(folder / "named.toml", faults), folder / "report.json"
    words = [
        *("--named", "--root", tree.root, "--package", tree.package, "--list", named),
        *("--accept", folder / "accepted.toml", "--reach", folder / "reach", "--json", report),
        *("--most", "0.02", "--grace", "3", "--preload", "pytest", "--jobs", "2"),
    ]
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "mutate.py"), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert ended.returncode in (0, 1), ended.stderr
    return ended.returncode, json.loads(report.read_text())


def contents(tree: Tree) -> dict[str, bytes]:
    files = (path for path in tree.root.rglob("*") if path.is_file())
    return {str(path.relative_to(tree.root)): path.read_bytes() for path in files}


def test_a_planted_survivor_is_found_and_the_tree_left_alone(tree: Tree) -> None:
    before = contents(tree)
    code, report = mutate(tree, NOTICED | SURVIVES | UNREACHED)
    assert code == 1 and contents(tree) == before
    found = {one["fault"]: one["result"] for one in report["faults"]}
    outcomes = {fault: one["outcome"] for fault, one in found.items()}
    assert outcomes == dict.fromkeys(NOTICED, "noticed") | dict.fromkeys(
        (*SURVIVES, *UNREACHED), "survived"
    )
    assert report["counts"] == {"noticed": 3, "survived": 2, "all": 5}
    assert found["a sum for a product"]["by"] == "tests/test_sizes.py::test_area"
    assert found["no end"]["by"] == "ended by time"
    assert found["a fault at import"]["by"].startswith("collecting")
    # Behind the one that reaches the line those of the mirrored file, for what they start may.
    assert found["a product for a sum"]["of"] == 3 and found["a product for a sum"]["line"]
    assert found["another error"]["of"] == 3 and not found["another error"]["line"]


def test_a_reason_stands_for_a_test(tree: Tree) -> None:
    reason = """
[[accepted]]
file = "sizes.py"
where = "around"
before = "return 2 * (width + height)"
after = "return 2 * (width * height)"
reason = "All that is measured are squares of 2."
"""
    code, report = mutate(tree, SURVIVES, reason)
    assert code == 0 and report["counts"] == {"accepted": 1, "all": 1}
    assert report["faults"][0]["accepted"].startswith("All that is measured")
    # Of another place it says nothing.
    assert mutate(tree, SURVIVES, reason.replace('"around"', '"area"'))[0] == 1


def test_tests_that_fail_by_themselves_notice_nothing(tree: Tree) -> None:
    file = tree.root / "tests" / "test_sizes.py"
    kept = tree.root.parent / "reach" / "tests.test_sizes.py.json.gz"
    file.write_text("import nowhere\n" + TESTS)
    found = json.loads(gzip.decompress(kept.read_bytes())) | {"digest": reach.told(file)}
    kept.write_bytes(gzip.compress(json.dumps(found).encode()))
    code, report = mutate(tree, {"a sum": NOTICED["a sum for a product"]})
    assert code == 1 and report["counts"] == {"not run": 1, "all": 1}
    assert "is not collected without it either" in report["faults"][0]["result"]["by"]


def test_a_fault_stands_in_its_file_once(tree: Tree) -> None:
    for before, times in (("width", 5), ("depth", 0)):
        path = listed(tree.root.parent / "named.toml", {"a fault": (before, "x")})
        with pytest.raises(ValueError, match=f"'a fault': its text stands {times} times"):
            list(mutants.named(tree, path))


def test_where_a_fault_stands() -> None:
    """The lines of its statement; of one with a body those of its head."""
    whole = "\n".join(
        [
            "class Box:",
            "    side: int = (",
            "        1",
            "    )",
            "",
            "    @property",
            "    def area(self) -> int:",
            "        if (",
            "            self.side > 0",
            "        ):",
            "            return max(",
            "                self.side,",
            "                1,",
            "            )",
            "        return 0",
        ]
    )
    for old, new, where, lines, runs in (
        ("        1\n", "        2\n", "Box", {2, 3, 4}, False),
        ("@property", "@other", "Box", {6, 7}, False),
        ("side > 0", "side > 1", "Box.area", {8, 9, 10}, True),
        ("1,", "2,", "Box.area", {11, 12, 13, 14}, True),
        ("return 0", "return 1", "Box.area", {15}, True),
    ):
        assert whole.count(old) == 1
        found = mutants.mutant("a fault", "box.py", whole, whole.replace(old, new))
        assert (found.where, found.lines, found.runs) == (where, lines, runs)


def test_named_faults_can_be_put_into_the_package() -> None:
    here = SCRIPTS / "mutation"
    tree = Tree(ROOT, "vlmprune")
    found = list(mutants.named(tree, here / "named.toml"))
    assert len({one.key for one in found}) == len(found) > 19
    reasons = mutants.accepted(here / "accepted.toml")
    for (file, where, before, _), reason in reasons.items():
        # What a reason speaks of is still there.
        lines = {line.strip() for line in tree.read(file).splitlines()}
        assert set(before.splitlines()) <= lines, (file, where)
        assert reason.endswith(".")
